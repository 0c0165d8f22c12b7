"""The synchronisation step of each method against one dense mean of the same floats.

Times are medians, with the reference timed in turn; memory is what a step needs beyond
its inputs and the method's lasting state, in vectors of d floats. What a client of the
default takes from a message's bytes to the training, and from there to the answer's,
with its state read and written, has rows of its own.
"""

import argparse
import copy
import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _common import announced, parser, show
from flwr.common import FitIns
from torch import nn

from gwpf_baseline.config import compose_config, training_config, workbench
from gwpf_baseline.exchange.coding import (
    Classes,
    decode_bitmap,
    decode_positions,
    encode_bitmap,
    encode_positions,
)
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.messages import ClientRecord
from gwpf_baseline.exchange.payload import Part, Writer
from gwpf_baseline.learning import method_client
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState, InMemory
from gwpf_baseline.learning.training import Batches, StepHook
from gwpf_baseline.methods import Method, load_method
from gwpf_baseline.methods.gwpf_paper import GWPFPaperStrategy, GWPFPaperUpload
from gwpf_baseline.methods.shared.ternary import Ternary, TernaryStrategy
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import BoolVector

# The share of coordinates that a client votes for, of the frozen ones where some are
# not: what `gwpf` is set to; what the paper's rule comes to, by chance alone, after 5
# steps, and the share that is active then.
VOTES = {"gwpf": 0.04, "gwpf_paper": 0.33, "fedavg": 0.0}
ACTIVE = 0.6

# What is wanted, where it is not that a server's step takes two dense means.
GOALS = {"gwpf: server": "1.2", "gwpf: decode votes": "0.3"}
CLIENT_GOALS = {"before": "120 ms", "after": "200 ms"}

Step = Callable[[], object]


class Vector(nn.Module):
    """A model that is nothing but d parameters, in one matrix."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        columns = math.gcd(dimension, 3200)
        self.weight = nn.Parameter(torch.randn(dimension // columns, columns))


class Uncoded(Writer):
    """A payload whose bitmaps are dropped: their coding has rows of its own."""

    def bitmap(
        self,
        bits: BoolVector,
        expected: np.ndarray | None = None,
        part: Part = Part.POSITIONS,
    ) -> None:
        """Do nothing."""

    def positions(
        self, positions: np.ndarray, length: int, classes: Classes | None = None
    ) -> None:
        """Do nothing."""


def main() -> None:
    """Measure every step and print the table."""
    options = parser(
        __doc__, dimension=11_200_000, clients=10, repeats=9, seed=0
    ).parse_args()
    torch.manual_seed(options.seed)
    deltas = [torch.randn(options.dimension) for _ in range(options.clients)]
    # Twice the clients: the time doubles, the memory must not grow.
    steps: dict[str, Step] = {
        "dense mean": lambda: dense_mean(deltas),
        "dense mean, 2n clients": lambda: dense_mean([*deltas, *deltas]),
    }
    for name in VOTES:
        steps |= method_steps(name, deltas, options)
    rows = []
    for name, step in announced(steps.items(), "{0[0]}".format):
        milliseconds, ratio = measure(step, steps["dense mean"], options.repeats)
        memory = peak(step) / (4 * options.dimension)
        goal = "2" if ": server" in name and "2n" not in name else ""
        goal = GOALS.get(name, goal)
        rows.append((name, milliseconds, memory, ratio, goal))
    one = OneClient("gwpf", Vector(options.dimension), deltas[:1])
    # The first rounds touch new memory, and tell the client the whole model.
    rounds = [one.play() for _ in range(options.repeats + 2)][2:]
    mean = statistics.median(seconds(steps["dense mean"]) for _ in rounds)
    for part, goal in CLIENT_GOALS.items():
        time_taken = statistics.median(times[part] for times in rounds)
        name = f"gwpf: all of a client, {part} training"
        rows.append((name, 1000 * time_taken, "", time_taken / mean, goal))
    columns = ("step", "ms", "memory / d", "time / dense mean", "goal <=")
    options.threads = torch.get_num_threads()
    show("One synchronisation", columns, rows, options)


def dense_mean(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average vectors as they come in: one accumulator, one pass for each vector."""
    total = torch.zeros(deltas[0].numel())
    for delta in deltas:
        total.add_(delta)
    return total.div_(len(deltas))


def method_steps(
    name: str, deltas: list[torch.Tensor], options: argparse.Namespace
) -> dict[str, Step]:
    """Return a method's steps: the server's, one client's, and a bitmap's coding."""
    cfg = compose_config([f"method={name}"])
    method, config = load_method(dict(cfg.method))
    model = Vector(options.dimension)
    strategy = method.strategy(model, config=config, num_clients=options.clients)
    rng = np.random.default_rng(options.seed)
    mask = rng.random(options.dimension, dtype=np.float32) < ACTIVE
    voters = options.dimension
    if isinstance(strategy, GWPFPaperStrategy):
        voters -= np.count_nonzero(mask)
    votes = [rng.random(voters, dtype=np.float32) < VOTES[name] for _ in deltas]
    if isinstance(strategy, GWPFPaperStrategy):
        inputs = strategy, mask, deltas, votes
        server = paper_server(*inputs)
    elif isinstance(strategy, TernaryStrategy):
        server = plain_server(strategy, list(map(signed_votes, deltas, votes)))
    else:
        server = plain_server(strategy, [delta.numpy() for delta in deltas])
    cohort = range(options.clients)
    steps: dict[str, Step] = {
        f"{name}: server": lambda: server(cohort),
        f"{name}: server, 2n clients": lambda: server([*cohort, *cohort]),
        f"{name}: client": client_step(method, config, model, mask, deltas[0]),
    }
    if isinstance(strategy, GWPFPaperStrategy):
        again = paper_server(*inputs, follow_up=True)
        steps[f"{name}: server, follow-up"] = lambda: again(cohort)
    if isinstance(strategy, TernaryStrategy) and strategy.activity is not None:
        vote = np.flatnonzero(votes[0]), voters, strategy.activity.classes
        code = encode_positions(*vote)
        steps[f"{name}: encode votes"] = lambda: encode_positions(*vote)
        steps[f"{name}: decode votes"] = lambda: decode_positions(code, 0, *vote[1:])
    elif VOTES[name]:
        code = encode_bitmap(votes[0])
        steps[f"{name}: encode votes"] = lambda: encode_bitmap(votes[0])
        steps[f"{name}: decode votes"] = lambda: decode_bitmap(code, 0, voters)
    return steps


def signed_votes(delta: torch.Tensor, ballot: BoolVector) -> Ternary:
    """Return what a client uploads that votes by signs."""
    positions = np.flatnonzero(ballot)
    signs = delta.numpy()[positions] > 0
    return Ternary(positions, signs, np.float32(abs(delta[0].item())))


def paper_server(
    strategy: GWPFPaperStrategy,
    mask: BoolVector,
    deltas: list[torch.Tensor],
    votes: list[BoolVector],
    follow_up: bool = False,
) -> Callable[[Sequence[int]], None]:
    """Return an exchange of the paper's server; a second one asks for all frozen."""
    values = [delta.numpy() for delta in deltas]

    def step(cohort: Sequence[int]) -> None:
        strategy.mask, strategy.thawed = mask, ~mask
        strategy.messages.follow_up = follow_up
        strategy.begin_exchange()
        strategy.reset_sums()
        count = strategy.value_sum.numel()
        for client in cohort:
            ballot = None if follow_up else votes[client]
            strategy.add_upload(GWPFPaperUpload(ballot, values[client][:count]), 1.0)
        strategy.finish_exchange(len(cohort))

    return step


def plain_server(
    strategy: SyncStrategy, uploads: Sequence[object]
) -> Callable[[Sequence[int]], None]:
    """Return a round of a server that has one exchange in it."""

    def step(cohort: Sequence[int]) -> None:
        strategy.reset_sums()
        for client in cohort:
            strategy.add_upload(uploads[client], 1.0)
        strategy.finish_exchange(len(cohort))

    return step


def client_step(
    method: Method, config: Any, model: nn.Module, mask: BoolVector, delta: torch.Tensor
) -> Step:
    """Return a client's part: all that it does beside training and coding."""
    training = training_config(compose_config())
    start = torch.zeros_like(delta)

    class Trained(method.client):  # type: ignore[name-defined, misc]
        """A client whose training is done: only the method's hook is called."""

        def train(
            self,
            start: torch.Tensor,
            task: Task,
            state: ClientState,
            on_step: StepHook | None = None,
        ) -> tuple[torch.Tensor, float]:
            """Return the prepared delta."""
            if on_step is not None:
                for _ in range(training.local_steps):
                    on_step(delta)
            return delta, 0.0

    client = client_of(Trained, config, model, start)
    header = Header(client.name, Kind.MODEL, 1, 0, delta.numel())
    task = Task(header, start, torch.zeros(0), mask)
    state = ClientState()
    return lambda: client.upload(task, state, Uncoded(header))


def client_of(
    kind: Callable[..., SyncClient], config: Any, model: nn.Module, start: torch.Tensor
) -> SyncClient:
    """Return a client that is not to train: it has the default's data, and one row."""
    cfg = compose_config()
    # They know the seed and the client's number.
    batches = Batches(workbench(cfg).data, np.arange(1), 0, 0)
    training = training_config(cfg)
    flat = FlatModel(model)
    return kind(InMemory(), flat, start, batches, training, config=config)


class OneClient:
    """A server and its one client, who exchange bytes; training is prepared.

    Parameters
    ----------
    name : str
        A method that has one exchange a round.
    model : Vector
        The model.
    steps : sequence of torch.Tensor
        float32 ``(d,)`` each, what a round's training moves the model by.
    """

    def __init__(self, name: str, model: Vector, steps: Sequence[torch.Tensor]) -> None:
        method, config = load_method(dict(compose_config([f"method={name}"]).method))
        self.server = method.strategy(model, config=config, num_clients=1)
        self.server.clients[0] = ClientRecord(version=0)
        start = self.server.weights.clone()
        self.client = client_of(method.client, config, copy.deepcopy(model), start)
        self.steps = steps
        self.began = self.trained = 0.0

    def play(self) -> dict[str, float]:
        """Play a round; return the seconds of the client's two parts, and the server's.

        ``before`` goes from the message's bytes to the training, ``after`` from there
        to the answer's bytes; the state is read and written in them.
        """
        server, messages = self.server, self.server.messages
        times = [time.perf_counter()]
        messages.open(False)
        server.begin_exchange()
        server.reset_sums()
        messages.ask_for(server.request())
        ins = FitIns(messages.write(0, with_mask=False).parameters, {"round": 1})
        times.append(time.perf_counter())
        with mock.patch.object(method_client, "train", self.train):
            answer = self.client.to_client().fit(ins)
        times.append(time.perf_counter())
        reader = messages.open_answer(0, answer.parameters, with_mask=False)
        upload = server.read_upload(reader)
        reader.finish()
        messages.confirm(0, used=True)
        server.add_upload(upload, 1.0)
        messages.close(server.finish_exchange(1.0))
        times.append(time.perf_counter())
        return {
            "before": self.began - times[1],
            "after": times[2] - self.trained,
            "server": times[1] - times[0] + times[3] - times[2],
        }

    def train(self, model: FlatModel, *_: Any, **__: Any) -> tuple[float, dict]:
        """Take the steps in place of training."""
        self.began = time.perf_counter()
        for step in self.steps:
            model.vector.detach().add_(step)
        self.trained = time.perf_counter()
        return 0.0, {}


def measure(step: Step, reference: Step, repeats: int) -> tuple[float, float]:
    """Return a step's median milliseconds, and the median ratio to the reference's."""
    step()
    times, ratios = [], []
    for _ in range(repeats):
        before = seconds(reference)
        times.append(seconds(step))
        ratios.append(times[-1] / before)
    return 1000 * statistics.median(times), statistics.median(ratios)


def seconds(step: Step) -> float:
    """Return the time that a step takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak(step: Step) -> float:
    """Return the bytes by which the process grows during a step, as Linux counts them.

    The resident set is the one account that has NumPy's, PyTorch's and the coder's
    memory in it. NaN on other systems.
    """
    if sys.platform != "linux":
        return float("nan")
    gc.collect()
    # Freed memory that the allocator keeps would hide what the step takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


if __name__ == "__main__":
    main()
