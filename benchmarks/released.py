"""A round's synchronisation beside that of GWPF's released code.

None of that code is here: its ``sync_manager.py`` is imported from a checkout. Both
sides start from the same vector of d parameters with the same coordinates frozen and
take the same five steps, which are not counted; one client, on one thread, in turn.

Released: ``Sync_Manager.try_sync_model``, which a worker calls after each step. Four
times it accumulates what is frozen; the fifth signals, sends, averages and freezes. Its
all-reduces cost nothing here. There is no server: what a worker makes of the mean, in
``restore_model_from_tensor_list_received``, stands for the server's step. For one line
of its log it adds up a rate of all frozen coordinates in Python, one after the other;
"its log" is that time, and "no log" the ratio without it.

Ours, by the paper's rule, uncoded as there: the client's ``upload``, which loads the
model, follows every step, checks, votes and picks the values; the server from
``begin_exchange`` to ``finish_exchange`` and the note of what changed; both once more
for what was thawed. "all" is the two together, beside all that a worker does.

Ours, by default, with everything counted: the client from a message's bytes to the
training and from there to the answer's bytes, with its state read and written, beside
all that a worker does; the server with the message's writing and the answer's reading.
"""

import contextlib
import copy
import importlib.util
import io
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _common import announced, parser, show
from sync_step import OneClient, Vector, client_of

from gwpf_baseline.config import compose_config
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.messages import ClientRecord
from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning import method_client
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.learning.training import StepHook
from gwpf_baseline.methods import load_method
from gwpf_baseline.methods.gwpf_paper import GWPFPaperUpload
from gwpf_baseline.utils import BoolVector

# Our method, and the shares that are frozen with us and in the released code. The
# default beside a worker that freezes nothing: the least that one ever has to do.
SETTINGS = (
    ("gwpf_paper", 0.0, 0.0),
    ("gwpf_paper", 0.12, 0.12),
    ("gwpf_paper", 0.6, 0.6),
    ("gwpf", 0.96, 0.96),
    ("gwpf", 0.96, 0.0),
)
STEPS = 5

Steps = Sequence[torch.Tensor]
Times = dict[str, float]


def main() -> None:
    """Measure every setting and print the table."""
    arguments = parser(__doc__, dimension=11_200_000, repeats=5, seed=0)
    arguments.add_argument("--checkout", type=Path, help="a clone of Dora233/GWPF")
    options = arguments.parse_args()
    if options.checkout is None:
        print("Skipped: clone Dora233/GWPF from GitHub and name its folder: --checkout")
        return
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = Vector(options.dimension)
    steps = [torch.randn(options.dimension) for _ in range(STEPS)]
    rng = np.random.default_rng(options.seed)
    draws = rng.random(options.dimension, dtype=np.float32)
    rows: list[tuple] = []
    for method, share, theirs in announced(SETTINGS, "{0[0]}, {0[1]:.0%}".format):
        coded = method == "gwpf"
        ours = (
            OneClient(method, model, steps)
            if coded
            else Ours(model, steps, draws >= share)
        )
        released = Released(options.checkout, model, steps, draws < theirs)
        played = [(released.play(), ours.play()) for _ in range(options.repeats + 2)]
        beside = "" if theirs == share else f" (released {theirs:.0%})"
        # The first ones touch new memory, and tell our client the whole model.
        rows += compare(f"{method}, {share:.0%}{beside}", played[2:], coded)
    columns = ["step, share frozen", "released ms", "its log", "ours ms"]
    columns += ["ratio", "no log", "goal >="]
    options.threads = torch.get_num_threads()
    show("One synchronisation, released and ours", columns, rows, options)


def compare(
    name: str, played: list[tuple[Times, Times]], coded: bool
) -> Iterator[tuple]:
    """Yield the rows of one setting."""
    for part in ("client" if coded else "all", "server"):
        theirs = "server" if part == "server" else "all"
        released = np.array([a[theirs] for a, _ in played])
        log = np.array([a["log"] * (theirs == "all") for a, _ in played])
        parts = ("before", "after") if part == "client" else (part,)
        ours = np.array([sum(b[p] for p in parts) for _, b in played])
        times = (1000 * np.median(t).item() for t in (released, log, ours))
        ratios = (np.median(t / ours).item() for t in (released, released - log))
        yield f"{name}: {part}", *times, *ratios, "30"


class Timed(contextlib.ContextDecorator):
    """Adds what passes meanwhile, or in a function, to one of the times."""

    def __init__(self, times: Times, name: str) -> None:
        self.times, self.name = times, name

    def __enter__(self) -> None:
        """Start."""
        self.times[self.name] -= time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.times[self.name] += time.perf_counter()


class Released:
    """One of the released code's workers."""

    def __init__(
        self, checkout: Path, model: Vector, steps: Steps, frozen: BoolVector
    ) -> None:
        file = checkout / "sync_manager.py"
        spec = importlib.util.spec_from_file_location("released_sync_manager", file)
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.times: Times = {}
        module.CUDA = False
        module.sum = Timed(self.times, "log")(sum)
        module.dist = types.SimpleNamespace(
            all_reduce=lambda *_, **__: None,
            reduce_op=types.SimpleNamespace(SUM=None),
        )
        self.model, self.steps = copy.deepcopy(model), steps
        profile = {"sync_frequency": len(steps), "interlayer_type": "GWPF"}
        with alone(), mock.patch.object(module.Sync_Manager, "init_dist"):
            self.manager = module.Sync_Manager(
                self.model, {**profile, "dist_profile": {}}
            )
        self.manager.world_size = 1
        self.layer = self.manager.transmit_interlayer
        self.layer.restore_model_from_tensor_list_received = Timed(
            self.times, "server"
        )(self.layer.restore_model_from_tensor_list_received)
        mask = torch.from_numpy(frozen)
        self.start = {
            "active_mask": ~mask,
            "active_index": (~mask).nonzero(),
            "freeze_mask": mask,
            "freeze_index": mask.nonzero(),
            "stable_threshold": self.layer.stable_threshold,
        }

    def play(self) -> Times:
        """Play a round; return the seconds of all, of its server's part and its log."""
        vars(self.layer).update(self.start)
        self.layer.freezing_lengths.copy_(self.start["freeze_mask"])
        self.layer.freezing_lengths2.zero_()
        self.times.update(all=0.0, server=0.0, log=0.0)
        with alone():
            for number, step in enumerate(self.steps, start=1):
                self.model.weight.data.add_(step)
                with Timed(self.times, "all"):
                    self.manager.try_sync_model(number)
        return dict(self.times)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep the released code off the screen, and off a GPU that it asks for anyway."""
    stay = mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor)
    with stay, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Uncoded(Writer):
    """An answer that is handed over as it is."""

    votes: BoolVector | None = None
    values: np.ndarray

    def bitmap(self, bits: BoolVector, *_: object, **__: object) -> None:
        """Keep the votes."""
        self.votes = bits

    def vector(self, values: np.ndarray, *_: object, **__: object) -> None:
        """Keep the values."""
        self.values = values


class Ours:
    """Our server by the paper's rule, and its one client."""

    def __init__(self, model: Vector, steps: Steps, active: BoolVector) -> None:
        cfg = compose_config(["method=gwpf_paper"])
        method, config = load_method(dict(cfg.method))
        self.strategy: Any = method.strategy(model, config=config, num_clients=1)
        self.strategy.clients[0] = ClientRecord(version=0)
        start = self.strategy.weights.clone()
        self.client = client_of(method.client, config, copy.deepcopy(model), start)
        self.state = ClientState()
        self.steps, self.active = steps, active
        self.times: Times = {}

    def play(self) -> Times:
        """Play a round; return the seconds of all, of the client and the server."""
        self.times = {"all": 0.0, "client": 0.0, "steps": 0.0}
        self.strategy.mask = self.active
        with mock.patch.object(method_client, "train", self.train):
            with Timed(self.times, "all"):
                self.exchange(follow_up=False)
                if self.strategy.wants_follow_up():
                    self.exchange(follow_up=True)
        self.times["server"] = self.times["all"] - self.times["client"]
        self.times["all"] -= self.times["steps"]
        return self.times

    def exchange(self, follow_up: bool) -> None:
        """Play one exchange."""
        strategy = self.strategy
        strategy.messages.open(follow_up)
        strategy.begin_exchange()
        strategy.reset_sums()
        strategy.messages.ask_for(strategy.request())
        strategy.add_upload(self.plain_upload(), 1.0)
        strategy.messages.close(strategy.finish_exchange(1.0))

    def plain_upload(self) -> GWPFPaperUpload:
        """Exchange vectors with the client."""
        server, last = self.strategy, self.strategy.exchange - 1
        again, size = server.follow_up, server.dimension
        header = Header(server.name, Kind.VALUES, last + 1, last, size, follow_up=again)
        buffers = None if again else server.buffers
        task = Task(header, server.weights, buffers, server.request())
        writer = Uncoded(header)
        with Timed(self.times, "client"):
            self.client.settle(self.state)
            self.client.upload(task, self.state, writer)
        return GWPFPaperUpload(writer.votes, writer.values)

    def train(
        self, model: FlatModel, *_: Any, on_step: StepHook | None = None, **__: Any
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Take the steps in place of training."""
        vector = model.vector.detach()
        for step in self.steps:
            with Timed(self.times, "steps"):
                vector.add_(step)
            if on_step is not None:
                on_step(vector)
        return 0.0, {}


if __name__ == "__main__":
    main()
