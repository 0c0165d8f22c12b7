"""A federation in one process: real strategies, real clients, real bytes between."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.common import FitIns, FitRes, Parameters
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from torch import nn

from gwpf_baseline.callbacks import Checkpoints
from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import workbench
from gwpf_baseline.data.task import TaskData
from gwpf_baseline.exchange.payload import Reader, from_parameters, to_parameters
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.flat_model import FlatModel, parameters_to_vector
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState, StateStore
from gwpf_baseline.learning.training import Batches, StepHook, TrainingConfig
from gwpf_baseline.local import LocalFederation, LocalNode
from gwpf_baseline.methods import load_method
from gwpf_baseline.records.checkpoint import CheckpointFolder
from gwpf_baseline.server_app import make_strategy
from gwpf_baseline.strategy import Callback, SyncStrategy

# Every failure is meant; what the package says about it stands in its own log.
logging.getLogger("flwr").setLevel(logging.CRITICAL)


# GWPF as published, with one exchange a round; clients hold back what is frozen.
KEPT = {"frozen_update": "residual", "thaw_exchange": "next_round"}


class Node(LocalNode):
    """A node between which and the server messages can be watched, changed and lost.

    Attributes
    ----------
    reachable : bool
        Whether messages reach the node.
    tamper : callable, optional
        What becomes of an answer on its way; raises if it gets lost.
    received, sent : list of Parameters
        All that passed in either direction.
    starts : list of numpy.ndarray
        Where a :class:`Scripted` client has started from, float32 ``(d,)`` each.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reachable = True
        self.tamper: Callable[[FitRes], FitRes] | None = None
        self.received: list[Parameters] = []
        self.sent: list[Parameters] = []
        self.starts: list[np.ndarray] = []

    @property
    def state(self) -> ClientState:
        """The client's state."""
        return self.store.load() or ClientState()

    def uploaded(self) -> np.ndarray:
        """Return the coordinates of the last upload that the client has noted."""
        return self.build(self.store).sent(self.state)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client train, unless one of the two messages gets lost."""
        self.received.append(ins.parameters)
        if not self.reachable:
            raise ConnectionError("the node does not answer")
        answer = super().fit(ins, timeout, group_id)
        if self.tamper is not None:
            answer = self.tamper(answer)
        self.sent.append(answer.parameters)
        return answer


class Federation(LocalFederation):
    """A federation whose strategy and nodes tests reach into."""

    strategy: Any
    nodes: list[Node]  # type: ignore[assignment]


def configured(
    cfg: DictConfig, folder: Path = Path("unused"), **strategy: Any
) -> Federation:
    """Build what the package's own apps build from a configuration.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    folder : pathlib.Path
        The run's folder, for checkpoints.
    **strategy : object
        Arguments of the strategy, beside or instead of the configured ones.
    """
    bench = workbench(cfg)
    callbacks: list[Callback] = []
    if cfg.checkpoint_every:
        callbacks.append(Checkpoints(CheckpointFolder(folder), cfg.checkpoint_every))
    kind = bench.method.strategy

    def built(model: nn.Module, **given: Any) -> SyncStrategy:
        return kind(model, **{**given, **strategy})

    method = bench.method._replace(strategy=built)
    server = make_strategy(cfg, replace(bench, method=method), callbacks)
    if cfg.resume:
        server.load_state(CheckpointFolder(cfg.resume).server_state())

    nodes = [
        Node(client, partial(make_client, cfg, client, str(folder)))
        for client in range(cfg.num_clients)
    ]
    return Federation(server, nodes)


def digits() -> TaskData:
    """Return scikit-learn's digits at their own size of 8 by 8 pixels."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images * 15).astype(np.uint8).reshape(-1, 1, 8, 8)
    scale = np.full((1, 1, 1), 0.5, np.float32)
    train, test = slice(0, 1500), slice(1500, None)
    classes = labels.astype(np.int64)
    return TaskData(
        train_inputs=pixels[train],
        train_targets=classes[train],
        test_inputs=pixels[test],
        test_targets=classes[test],
        num_classes=10,
        mean=scale,
        std=scale,
        strata=classes[train],
    )


def small_net() -> nn.Module:
    """Return a network of 400 parameters with batch normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 10),
        )


def small(
    sizes: Sequence[int],
    training: TrainingConfig,
    method: str = "gwpf",
    options: dict[str, Any] | None = None,
    **strategy: Any,
) -> Federation:
    """Build a federation of a small network with batch normalisation.

    Parameters
    ----------
    sizes : sequence of int
        Each client's number of examples.
    training : TrainingConfig
        How clients train.
    method : str, default "gwpf"
        The method's file.
    options : dict, optional
        Its hyper-parameters.
    **strategy : object
        More arguments of the strategy.
    """
    found, config = load_method({"module": method, **(options or {})})
    model, data = found.adapt(small_net(), config, 0), digits()
    flat, initial = FlatModel(copy.deepcopy(model)), parameters_to_vector(model)
    ends = np.cumsum([0, *sizes])

    def build(client: int, store: StateStore) -> SyncClient:
        rows = np.arange(ends[client], ends[client + 1])
        batches = Batches(data, rows, seed=0, client=client)
        return found.client(
            store,
            flat,
            initial,
            batches,
            training,
            config=config,
            quantization=strategy.get("quantization"),
        )

    strategy.setdefault("num_examples", sizes)
    server = found.strategy(model, config=config, num_clients=len(sizes), **strategy)
    return Federation(server, [Node(i, partial(build, i)) for i in range(len(sizes))])


Script = Callable[[int, int], np.ndarray]


class Scripted(SyncClient):
    """A client that takes given steps instead of training; mixed into a method's own.

    Attributes
    ----------
    script : callable
        From client and exchange to the steps, float32 ``(steps, d)``.
    starts : list of numpy.ndarray
        Where the client has started from.
    """

    script: Script
    starts: list[np.ndarray]

    def train(
        self,
        start: torch.Tensor,
        task: Task,
        state: ClientState,
        on_step: StepHook | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Walk along the script's steps."""
        self.starts.append(start.numpy().copy())
        steps = torch.from_numpy(self.script(self.batches.client, task.header.exchange))
        position = start.clone()
        for step in steps:
            position += step
            if on_step is not None:
                on_step(position)
        return position - start, 0.0


def scripted(
    method: str,
    script: Script,
    options: dict[str, Any] | None = None,
    num_clients: int = 4,
    **strategy: Any,
) -> Federation:
    """Build a federation of clients that follow a script.

    Parameters
    ----------
    method : str
        The method's file.
    script : callable
        From client and exchange to the steps, float32 ``(steps, 24)``.
    options : dict, optional
        The method's hyper-parameters.
    num_clients : int, default 4
        Number of clients.
    **strategy : object
        More arguments of the strategy; by `num_examples` each client has one.
    """
    found, config = load_method({"module": method, **(options or {})})
    model = nn.Linear(23, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    flat, initial = FlatModel(nn.Linear(23, 1)), parameters_to_vector(model)
    data = digits()
    bases: Any = (Scripted, found.client)
    played = type("ScriptedClient", bases, {})

    examples = strategy.setdefault("num_examples", [1] * num_clients)
    starts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]

    def build(client: int, store: StateStore) -> SyncClient:
        batches = Batches(data, np.arange(examples[client]), 0, client)
        built = played(
            store,
            flat,
            initial,
            batches,
            TrainingConfig(),
            config=config,
            quantization=strategy.get("quantization"),
        )
        built.script, built.starts = script, starts[client]
        return built

    strategy.setdefault("max_empty_rounds", 1000)
    server = found.strategy(model, config=config, num_clients=num_clients, **strategy)
    nodes = [Node(i, partial(build, i)) for i in range(num_clients)]
    for node, its in zip(nodes, starts, strict=True):
        node.starts = its
    return Federation(server, nodes)


def size(parameters: Parameters) -> int:
    """Return the bytes that a message costs."""
    return sum(len(tensor) for tensor in parameters.tensors)


def payload_of(parameters: Parameters, federation: Federation) -> Reader:
    """Open a message or an answer."""
    strategy = federation.strategy
    payload = from_parameters(parameters)
    return Reader(payload, strategy.name, strategy.dimension)


def with_payload(answer: FitRes, payload: bytes) -> FitRes:
    """Return an answer with another payload."""
    return replace(answer, parameters=to_parameters(payload))


def with_tensors(answer: FitRes, tensors: list[bytes]) -> FitRes:
    """Return an answer with other tensors."""
    kind = answer.parameters.tensor_type
    return replace(answer, parameters=Parameters(tensors, kind))


def lose(answer: FitRes) -> FitRes:
    """Lose an answer on its way."""
    raise TimeoutError("the answer got lost")
