"""A federation in one process: real strategies, real clients, real bytes between.

What Flower's simulation does with Ray, without processes: for trials, for tests, and to
step through a method with a debugger. Histories are the same to the bit.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from flwr.client import Client
from flwr.common import (
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    ReconnectIns,
)
from flwr.server import Server, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from omegaconf import DictConfig

from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import Workbench, workbench
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.state import InMemory
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.server_app import Play, limit_messages, make_strategy
from gwpf_baseline.strategy import Callback, SyncStrategy
from gwpf_baseline.utils import RunError, keep_freed_memory

_ONE_AT_A_TIME = threading.Lock()


# pylint: disable-next=abstract-method  # which its kinds fill in
class SimulatedNode(ClientProxy):
    """A node whose client's state is kept by who simulates it.

    As in Flower, the client is built anew for each message and only its state lives on.

    Parameters
    ----------
    partition : int
        The partition that the node serves.
    cid : str, optional
        Flower's id of the node; default: from the partition.

    Attributes
    ----------
    stopped : bool
        Whether it is to play its client no more.
    """

    def __init__(self, partition: int, cid: str | None = None) -> None:
        super().__init__(cid or f"node-{partition}")
        self.partition = partition
        self.stopped = False
        self.forget()

    def forget(self) -> None:
        """Lose all state, as a node does that is set up again."""
        self.store = InMemory()

    def check(self) -> None:
        """Raise a `RunError` if the run was stopped."""
        if self.stopped:
            raise RunError("the run was stopped")

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        """Refuse: no method asks for this."""
        raise RuntimeError("no method asks for this")

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        """Refuse: no method asks for this."""
        raise RuntimeError("no method asks for this")

    def reconnect(
        self, ins: ReconnectIns, timeout: float | None, group_id: int | None
    ) -> DisconnectRes:
        """Refuse: no method asks for this."""
        raise RuntimeError("no method asks for this")


class LocalNode(SimulatedNode):
    """A node whose client runs here.

    The strategy sees what a network would bring: serialised ``Parameters``.

    Parameters
    ----------
    partition, cid : object
        As of :class:`SimulatedNode`.
    build : callable
        Builds the client from what it keeps.
    """

    def __init__(
        self,
        partition: int,
        build: Callable[[InMemory], SyncClient],
        cid: str | None = None,
    ) -> None:
        super().__init__(partition, cid)
        self.build = build

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client answer a message."""
        with self._client() as client:
            return client.fit(ins)

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Ask the client who it is."""
        with self._client() as client:
            return client.get_properties(ins)

    @contextmanager
    def _client(self) -> Iterator[Client]:
        """Build the client, for one message."""
        # Clients share a process's model, and Python 3.11 parses source, as libraries
        # do, in one thread at a time only. Their number of threads is not the server's,
        # whose evaluation would come to other bits with it.
        with _ONE_AT_A_TIME:
            self.check()
            threads = torch.get_num_threads()
            try:
                yield self.build(self.store).to_client()
            finally:
                torch.set_num_threads(threads)


class LocalFederation:
    """Flower's server with a strategy, and nodes that are asked one after the other.

    Parameters
    ----------
    strategy : SyncStrategy
        The strategy.
    nodes : sequence of LocalNode
        The nodes.
    """

    def __init__(self, strategy: SyncStrategy, nodes: Sequence[LocalNode]) -> None:
        self.strategy = strategy
        self.nodes = list(nodes)
        self.server = Server(client_manager=SimpleClientManager(), strategy=strategy)
        limit_messages(self.server, 1)
        for node in nodes:
            self.server.client_manager().register(node)
        self.rounds = 0

    def play(self, rounds: int = 1) -> RoundRecord:
        """Play some rounds and return the last one's record."""
        for _ in range(rounds):
            self.rounds += 1
            self.server.fit_round(self.rounds, timeout=None)
            # It has the model itself.
            self.strategy.evaluate(self.rounds, self.server.parameters)
        return self.strategy.records[-1]


def federation(
    cfg: DictConfig,
    bench: Workbench | None = None,
    callbacks: Sequence[Callback] = (),
    folder: Path | str = "",
) -> LocalFederation:
    """Build the federation that a configuration describes.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration. Nothing is written: checkpoints, the evaluation and
        records are callbacks.
    bench : Workbench, optional
        The data, the model and the method; default: what is configured.
    callbacks : sequence of Callback, default none
        What happens around each round.
    folder : pathlib.Path or str, optional
        The run's, for the clients' parts of checkpoints; default: they keep none.

    Returns
    -------
    LocalFederation
        The configured method's strategy, and a node for each client.
    """
    bench = bench or workbench(cfg)
    nodes = _nodes(cfg, str(folder), bench)
    return LocalFederation(make_strategy(cfg, bench, callbacks), nodes)


def in_process(cfg: DictConfig, folder: Path) -> Play:
    """Return what plays the rounds of a configuration in this process.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    folder : pathlib.Path
        The run's folder, for the clients' parts of checkpoints.

    Returns
    -------
    callable
        For :func:`~gwpf_baseline.server_app.run_server`.
    """
    keep_freed_memory()
    return among(_nodes(cfg, str(folder), workbench(cfg)), 1)


def among(nodes: Sequence[SimulatedNode], at_once: int) -> Play:
    """Return what plays the rounds with nodes that are there from the beginning.

    Parameters
    ----------
    nodes : sequence of SimulatedNode
        The nodes.
    at_once : int
        How many messages are on their way at a time.

    Returns
    -------
    callable
        For :func:`~gwpf_baseline.server_app.run_server`.
    """

    def play(server: Server, config: ServerConfig) -> None:
        for node in nodes:
            server.client_manager().register(node)
        limit_messages(server, at_once)
        with _stopped_by_ctrl_c(nodes):
            server.fit(config.num_rounds, config.round_timeout)

    return play


@contextmanager
def _stopped_by_ctrl_c(nodes: Sequence[SimulatedNode]) -> Iterator[None]:
    """Let Ctrl-C end a round: Flower would have all that is asked in it done before."""

    def stop(*_: object) -> None:
        for node in nodes:
            node.stopped = True
        raise KeyboardInterrupt

    # Whoever ignores it, as `nohup` does, or has a way of its own with it, keeps it.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _nodes(cfg: DictConfig, folder: str, bench: Workbench) -> list[LocalNode]:
    return [
        LocalNode(client, partial(make_client, cfg, client, folder, bench=bench))
        for client in range(cfg.num_clients)
    ]
