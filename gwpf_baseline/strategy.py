"""What every method's Flower Strategy shares.

Sampling, versions, byte counting, the failure policy, evaluation and checkpoints stand
here. A method adds what it decides: which coordinates are exchanged, and what becomes
of the uploads.
"""

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import fit_clients
from flwr.server.strategy import Strategy
from torch import nn

from gwpf_baseline.exchange.network import Leg, Network
from gwpf_baseline.exchange.payload import (
    Header,
    Kind,
    Reader,
    WireError,
    Writer,
    as_tensor,
    parse_tensors,
    vector_checksum,
)
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.exchange.roster import ClientRecord, Roster
from gwpf_baseline.learning.flat_model import (
    buffers_to_vector,
    cache_blocks,
    layers,
    parameters_to_vector,
    to_ndarrays,
    values_per_layer,
)
from gwpf_baseline.learning.server_optimizer import (
    ServerOptimizer,
    ServerOptimizerConfig,
)
from gwpf_baseline.records.checkpoint import CheckpointFolder, as_arrays, as_tensors
from gwpf_baseline.records.history import RoundRecord, from_rows
from gwpf_baseline.utils import BoolVector, FloatVector

log = logging.getLogger(__name__)

Results = Sequence[tuple[ClientProxy, FitRes]]
Failures = Sequence[tuple[ClientProxy, FitRes] | BaseException]
Upload = TypeVar("Upload")

# (round, flat weights, flat buffers) -> (test loss, test accuracy), None to skip
EvaluateFn = Callable[[int, torch.Tensor, torch.Tensor], tuple[float, float] | None]


@dataclass
class _Round:
    """The round under way: what it cost so far, and the sums of its exchange."""

    asked: int = 0
    accepted: int = 0
    failures: int = 0
    uplink_bytes: int = 0
    downlink_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    compute_seconds: dict[int, float] = field(default_factory=dict)
    modelled_seconds: float = 0.0
    # Of the exchange under way:
    started: float = 0.0
    mask: BoolVector | None = None
    mask_checksum: int | None = None
    message_bytes: dict[int, int] = field(default_factory=dict)
    skipped: int = 0
    buffer_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


class _Ledger:
    """The records of all rounds.

    Parameters
    ----------
    dense_bytes : int
        Bytes of one dense model, as FedAvg would send it.
    dimension : int
        d.
    network : Network or None
        The network whose time is modelled.
    on_round : callable or None
        Gets each round's record.
    """

    def __init__(
        self,
        dense_bytes: int,
        dimension: int,
        network: Network | None,
        on_round: Callable[[RoundRecord], None] | None,
    ) -> None:
        self.dense_bytes = dense_bytes
        self.dimension = dimension
        self.network = network
        self.on_round = on_round
        self.records: list[RoundRecord] = []
        self.first_round = 1
        self._started = time.monotonic()

    def restore(self, records: list[RoundRecord]) -> None:
        """Go on after a resumed run's records."""
        self.records = records
        if records:
            self.first_round = records[-1].round + 1
            self._started = time.monotonic() - records[-1].seconds

    def absolute(self, server_round: int) -> int:
        """Return a round's number; Flower counts a resumed run's from 1 again."""
        return self.first_round + server_round - 1

    def close(
        self,
        number: int,
        this: _Round,
        measured: tuple[float, float] | None,
        metrics: dict[str, float],
    ) -> None:
        """Add the record of a round."""
        values, csr = this.asked * self.dimension, metrics.get("csr_bytes")
        last = self.records[-1] if self.records else None
        dense = 2 * this.asked * self.dense_bytes
        compute = list(this.compute_seconds.values())
        before = (last.modelled_seconds if last else None) or 0.0
        record = RoundRecord(
            round=number,
            seconds=time.monotonic() - self._started,
            test_accuracy=measured[1] if measured else None,
            test_loss=measured[0] if measured else None,
            train_loss=float(np.mean(this.losses)) if this.losses else None,
            uplink_bytes=this.uplink_bytes,
            downlink_bytes=this.downlink_bytes,
            cumulative_uplink_bytes=this.uplink_bytes
            + (last.cumulative_uplink_bytes if last else 0),
            cumulative_downlink_bytes=this.downlink_bytes
            + (last.cumulative_downlink_bytes if last else 0),
            dense_bytes=dense + (last.dense_bytes if last else 0),
            frozen_fraction=metrics.get("frozen_fraction"),
            sent_fraction=metrics.get("sent_fraction"),
            clients=this.accepted,
            failures=this.failures,
            compute_seconds=float(np.mean(compute)) if compute else None,
            modelled_seconds=before + this.modelled_seconds if self.network else None,
            uplink_bits_per_parameter=(
                8 * this.uplink_bytes / values if values else None
            ),
            downlink_bits_per_parameter=(
                8 * this.downlink_bytes / values if values else None
            ),
            csr_bytes=None if csr is None else int(csr),
            mean_accuracy=metrics.get("mean_accuracy"),
        )
        self.records.append(record)
        if self.on_round is not None:
            self.on_round(record)


# Flower's hooks and the methods', and the state of both.
# pylint: disable-next=too-many-public-methods,too-many-instance-attributes
class SyncStrategy(Strategy, Generic[Upload]):
    """A Flower Strategy that exchanges only what a method decides to.

    An *exchange* is one message to each client and its answer; exchanges are numbered
    from 1, and the number of the last one is the model's version. For each coordinate
    the server keeps the exchange that last changed it, for each client the version it
    last confirmed. A client gets exactly what changed since, so one that missed many
    rounds catches up, and one without any state gets the whole model.

    Parameters
    ----------
    model : torch.nn.Module
        The model with its initial weights, which every client can derive as well.
    num_clients : int
        Clients to wait for before the first round.
    fraction_fit : float, default 1.0
        Share of the available clients that take part in a round, at least one.
    seed : int, default 0
        Seed of every choice of the server.
    weighting : {"uniform", "examples"}, default "uniform"
        Whether clients count alike, as in an all-reduce, or by their examples.
    server_optimizer : ServerOptimizerConfig, optional
        How the mean update moves the model; default: by itself, as in FedAvg.
    quantization : Quantization, optional
        How values travel; default: as they are.
    network : Network, optional
        Gives each record its ``modelled_seconds``.
    evaluate_fn : callable, optional
        Measures the global model after each round.
    on_round : callable, optional
        Gets each round's record.
    connect_timeout : float, default 60.0
        Seconds to wait for `num_clients` nodes.
    round_timeout : float, optional
        Seconds to wait for a client in a follow-up exchange; default: no limit.
    checkpoints : CheckpointFolder, optional
        Where to write the whole state.
    checkpoint_every : int, default 0
        Rounds between checkpoints, 0 for none.

    Attributes
    ----------
    weights : torch.Tensor
        float32 ``(d,)``, the global parameters.
    buffers : torch.Tensor
        float32 ``(b,)``, the global buffers.
    layers : list of Layer
        Where the model's tensors stand in `weights`.
    optimizer : ServerOptimizer
        The server's optimiser.
    exchange : int
        Number of the exchange under way, or of the last one.
    """

    #: Name on the wire; both halves of a method share it.
    name: str
    #: Whether clients get the whole model every time, which FedAvg is defined by.
    dense_downlink = False

    def __init__(  # pylint: disable=too-many-arguments
        self,
        model: nn.Module,
        *,
        num_clients: int,
        fraction_fit: float = 1.0,
        seed: int = 0,
        weighting: str = "uniform",
        server_optimizer: ServerOptimizerConfig | None = None,
        quantization: Quantization | None = None,
        network: Network | None = None,
        evaluate_fn: EvaluateFn | None = None,
        on_round: Callable[[RoundRecord], None] | None = None,
        connect_timeout: float = 60.0,
        round_timeout: float | None = None,
        checkpoints: CheckpointFolder | None = None,
        checkpoint_every: int = 0,
    ) -> None:
        self.model = model
        self.roster = Roster(
            num_clients, fraction_fit, seed, connect_timeout, round_timeout
        )
        self.seed = seed
        self.weighting = weighting
        self.quantization = quantization or Quantization()
        self.evaluate_fn = evaluate_fn
        self.checkpoints = checkpoints
        self.checkpoint_every = checkpoint_every

        self.weights = parameters_to_vector(model)
        self.buffers = buffers_to_vector(model)
        self.layers = layers(model)
        self.optimizer = ServerOptimizer(
            server_optimizer or ServerOptimizerConfig(), self.dimension
        )
        self.last_changed = torch.zeros(self.dimension, dtype=torch.int32)
        self.exchange = 0
        self.follow_up = False
        self._round = _Round()
        self._checksum = vector_checksum(self.weights.numpy())
        self._ledger = _Ledger(self._dense_bytes(), self.dimension, network, on_round)

    # ---- what a method adds -------------------------------------------------------

    @abstractmethod
    def begin_exchange(self) -> BoolVector | None:
        """Start the exchange's sums afresh.

        Returns
        -------
        numpy.ndarray or None
            bool ``(d,)``, the coordinates that clients are to upload; None if the
            method has no mask.
        """

    def sends_mask(self, client: int) -> bool:
        """Return whether the exchange's message to a client has the mask in it.

        Parameters
        ----------
        client : int
            The client's partition id.

        Returns
        -------
        bool
            By default True if there is a mask. A method whose mask follows from what
            clients hold anyway saves it, see :meth:`SyncClient.derive_mask`.
        """
        del client
        return self._round.mask is not None

    @abstractmethod
    def read_upload(self, reader: Reader) -> Upload:
        """Take one client's upload from a payload, without any effect.

        Parameters
        ----------
        reader : Reader
            The payload, its header checked.

        Returns
        -------
        object
            What :meth:`add_upload` gets once the whole payload has proved sound.

        Raises
        ------
        WireError
            The payload is not what this method's client sends.
        """

    @abstractmethod
    def add_upload(self, upload: Upload, weight: float) -> None:
        """Add one client's upload to the exchange's sums.

        Parameters
        ----------
        upload : object
            What :meth:`read_upload` returned.
        weight : float
            The client's weight in averages.
        """

    @abstractmethod
    def finish_exchange(self, total_weight: float) -> torch.Tensor | None:
        """Apply the exchange's sums to the global model and decide what follows.

        Parameters
        ----------
        total_weight : float
            Sum of the weights of the accepted clients, above 0.

        Returns
        -------
        torch.Tensor or None
            bool ``(d,)``, the coordinates that changed; None for all of them.
        """

    def wants_follow_up(self) -> bool:
        """Return whether this round's clients are to be asked a second time."""
        return False

    def write_values(self, writer: Writer, values: FloatVector) -> None:
        """Write values of the global model into a message.

        Parameters
        ----------
        writer : Writer
            The message.
        values : numpy.ndarray
            float32 ``(k,)``. By default they travel as they are, or as configured; a
            method whose values are of another kind knows a better way, and its client
            undoes it in :meth:`SyncClient.read_values`.
        """
        self.quantization.write_values(writer, values)

    def read_update(
        self, reader: Reader, mask: BoolVector | None = None
    ) -> FloatVector:
        """Take the values of an update, as :meth:`SyncClient.write_update` wrote them.

        Parameters
        ----------
        reader : Reader
            A client's payload.
        mask : numpy.ndarray, optional
            bool ``(d,)``, the coordinates that they belong to; default: all.

        Returns
        -------
        numpy.ndarray
            float32 ``(k,)``. It may be read-only.
        """
        counts = values_per_layer(self.layers, mask)
        return self.quantization.read_update(reader, counts)

    def move(self, update: FloatVector, mask: BoolVector | None = None) -> None:
        """Move the global model by the clients' mean update.

        Parameters
        ----------
        update : numpy.ndarray
            float32 ``(k,)``.
        mask : numpy.ndarray, optional
            bool ``(d,)``, the coordinates that it belongs to; default: all.
        """
        weights = self.weights.numpy()
        if mask is None:
            self.optimizer.step(weights, slice(None), update)
            return
        for index, part in cache_blocks(mask):
            self.optimizer.step(weights, index, update[part])

    def network(self) -> torch.Tensor:
        """Return the weights of the network that is measured and saved.

        Returns
        -------
        torch.Tensor
            float32 ``(d,)``; by default the global model.
        """
        return self.weights

    def mean_network(self) -> torch.Tensor | None:
        """Return the weights of a random network's mean, which is measured as well.

        Returns
        -------
        torch.Tensor or None
            float32 ``(d,)``; by default None, as the network is not random.
        """
        return None

    def export(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write what the method leaves behind beside the model, at a run's end.

        Parameters
        ----------
        folder : pathlib.Path
            The run's folder.
        origin : dict
            From what the model can be built again, as JSON holds it: ``model``, its
            name, ``input_shape``, ``num_classes`` and ``options``.
        """

    def metrics(self) -> dict[str, float]:
        """Return ``frozen_fraction``, ``sent_fraction`` and ``csr_bytes``, if any."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the method: tensors and values."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""

    # ---- Flower's hooks -----------------------------------------------------------

    @property
    def dimension(self) -> int:
        """Return d, the number of trainable parameters."""
        return self.weights.numel()

    @property
    def answers(self) -> int:
        """Return how many clients have answered the exchange soundly so far."""
        return self._round.accepted + self._round.skipped

    @property
    def clients(self) -> dict[int, ClientRecord]:
        """Return what each client holds, by its partition id."""
        return self.roster.records

    @property
    def records(self) -> list[RoundRecord]:
        """Return the records of all rounds."""
        return self._ledger.records

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the initial model in the shapes of its state dict."""
        return self.parameters()

    def parameters(self) -> Parameters:
        """Return the global model in the shapes of its state dict."""
        arrays = to_ndarrays(self.model, self.weights, self.buffers)
        return ndarrays_to_parameters(arrays)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Sample the round's clients and write to each what it lacks."""
        number = self._ledger.absolute(server_round)
        self._round = _Round()
        clients = self.roster.sample(number, client_manager)
        if not clients:
            log.warning("round %d: no client is available", number)
            return []
        self._round.asked = len(clients)
        return self._open_exchange(clients, number, follow_up=False)

    def aggregate_fit(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Use every sound upload, and ask again where the method wants to."""
        accepted = self._close_exchange(results, failures)
        self._round.accepted = len(accepted)
        if accepted and self.wants_follow_up():
            number = self._ledger.absolute(server_round)
            instructions = self._open_exchange(accepted, number, follow_up=True)
            timeout = self.roster.answer_timeout
            answers = fit_clients(
                instructions, len(instructions), timeout, server_round
            )
            self._close_exchange(*answers)
        return self.parameters(), {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Measure the global model and close the round's record."""
        if server_round == 0:
            return None
        number = self._ledger.absolute(server_round)
        measured = None
        if self.evaluate_fn is not None:
            measured = self.evaluate_fn(number, self.network(), self.buffers)
        metrics = self.metrics() if self.answers else {}
        metrics |= self._measure_mean(number)
        self._ledger.close(number, self._round, measured, metrics)
        if self.checkpoint_every and number % self.checkpoint_every == 0:
            assert self.checkpoints is not None
            self.roster.ask_to_save(number)
            self.checkpoints.commit(number, self.state())
        return None if measured is None else (measured[0], {"accuracy": measured[1]})

    def _measure_mean(self, number: int) -> dict[str, float]:
        # pylint: disable-next=assignment-from-none  # a method may have one
        mean = self.mean_network()
        if mean is None or self.evaluate_fn is None:
            return {}
        measured = self.evaluate_fn(number, mean, self.buffers)
        return {} if measured is None else {"mean_accuracy": measured[1]}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Return nothing: the global model is measured on the server."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return nothing: no client is asked to evaluate."""
        return None, {}

    # ---- exchanges ----------------------------------------------------------------

    def _open_exchange(
        self, clients: Sequence[int], number: int, follow_up: bool
    ) -> list[tuple[ClientProxy, FitIns]]:
        started = time.monotonic()
        self.exchange += 1
        self.follow_up = follow_up
        self._round.buffer_sum = torch.zeros_like(self.buffers)
        self._round.skipped = 0
        self._round.mask = self.begin_exchange()
        self._round.mask_checksum = None
        # Clients that hold the same version, mostly all of them, share one message.
        messages: dict[tuple[int, int, bool], Parameters] = {}
        instructions = []
        for client in clients:
            record, masked = self.clients[client], self.sends_mask(client)
            key = (record.version, record.accepted, masked)
            if key not in messages:
                messages[key] = self._message(record, masked)
            self._round.message_bytes[client] = _size(messages[key])
            ins = FitIns(messages[key], {"round": number})
            instructions.append((self.roster.proxy(client), ins))
        self._round.downlink_bytes += sum(self._round.message_bytes.values())
        self._round.started = time.monotonic()
        self._round.modelled_seconds += self._round.started - started
        return instructions

    def _message(self, record: ClientRecord, masked: bool) -> Parameters:
        if self.dense_downlink or record.version < 0:
            return self._dense_message(record, masked)
        last = self.exchange - 1
        # A client whose upload was used last time knows which coordinates changed:
        # those that it was asked for.
        knows = self._round.mask is not None and record.accepted == last > 0
        kind = Kind.MASKED if knows else Kind.CHANGES
        writer = Writer(self._header(kind, record, masked))
        changed = self.last_changed.numpy() > record.version
        if kind is Kind.CHANGES:
            writer.bitmap(changed)
        return self._complete(writer, self.weights.numpy()[changed], masked)

    def _dense_message(self, record: ClientRecord, masked: bool) -> Parameters:
        writer = Writer(self._header(Kind.MODEL, record, masked))
        return self._complete(writer, self.weights.numpy(), masked)

    def _header(self, kind: Kind, record: ClientRecord, masked: bool) -> Header:
        return Header(
            method=self.name,
            kind=kind,
            exchange=self.exchange,
            base=record.version,
            length=self.dimension,
            accepted=record.accepted,
            follow_up=self.follow_up,
            masked=masked,
            checksum=self._checksum if record.version == 0 else 0,
        )

    def _dense_bytes(self) -> int:
        """Return the bytes of the whole model as FedAvg sends it."""
        writer = Writer(self._header(Kind.MODEL, ClientRecord(version=-1), False))
        writer.vector(self.weights.numpy())
        writer.vector(self.buffers.numpy())
        return _size(ndarrays_to_parameters(writer.arrays()))

    def _complete(self, writer: Writer, values: np.ndarray, masked: bool) -> Parameters:
        if masked:
            assert self._round.mask is not None
            writer.bitmap(self._round.mask)
        self.write_values(writer, values)
        if not self.follow_up:
            writer.vector(self.buffers.numpy())
        return ndarrays_to_parameters(writer.arrays())

    def _close_exchange(self, results: Results, failures: Failures) -> list[int]:
        started = time.monotonic()
        waited = started - self._round.started
        known = [(self.roster.client(proxy), result) for proxy, result in results]
        asked = set(self._round.message_bytes)
        silent = asked.difference(client for client, _ in known)
        for failure in failures:
            self._fail(silent, failure)
        accepted: list[int] = []
        legs: list[Leg] = []
        total_weight = 0.0
        # Floating-point sums depend on their order: not the order of arrival.
        for client, result in sorted(known, key=lambda item: item[0]):
            size = _size(result.parameters)
            self._round.uplink_bytes += size
            try:
                weight = self._weight(result)
                content = self._read(client, result.parameters)
            except WireError as error:
                self._fail({client}, error)
                continue
            compute = self._measurements(client, result, waited)
            legs.append(Leg(self._round.message_bytes[client], compute, size))
            if content is None:
                self._round.skipped += 1
                self.clients[client].version = self.exchange - 1
                continue
            upload, buffers = content
            self.add_upload(upload, weight)
            if not self.follow_up:
                self._round.buffer_sum.add_(as_tensor(buffers), alpha=weight)
            self.clients[client] = ClientRecord(self.exchange - 1, self.exchange)
            accepted.append(client)
            total_weight += weight
        if accepted:
            changed = self.finish_exchange(total_weight)
            if changed is None:
                self.last_changed.fill_(self.exchange)
            else:
                self.last_changed.masked_fill_(changed, self.exchange)
            if not self.follow_up:
                torch.div(self._round.buffer_sum, total_weight, out=self.buffers)
        if self._ledger.network is not None:
            self._round.modelled_seconds += self._ledger.network.seconds(legs)
        self._round.modelled_seconds += time.monotonic() - started
        self._round.message_bytes = {}
        return accepted

    def _read(
        self, client: int, parameters: Parameters
    ) -> tuple[Upload, np.ndarray] | None:
        """Return a client's upload and buffers, None if it has skipped the exchange."""
        arrays = parse_tensors(parameters.tensors)
        reader = Reader(arrays, self.name, self.dimension)
        header = reader.header
        if header.exchange != self.exchange:
            raise WireError(
                f"an answer to exchange {header.exchange}, not to {self.exchange}"
            )
        if header.kind is Kind.LOST and header.base in (-1, 0):
            held = self.clients[client].version
            self.clients[client].version = header.base
            raise WireError(
                f"it no longer holds version {held}; "
                "next time it gets all that it lacks"
            )
        sound = header.kind in (Kind.UPDATE, Kind.SKIPPED)
        if not sound or header.base != self.exchange - 1:
            raise WireError(
                f"an answer of kind {header.kind.name} from version {header.base}, "
                f"not an update from version {self.exchange - 1}"
            )
        if header.kind is Kind.SKIPPED:
            reader.finish()
            return None
        if self._round.mask is not None and not self.sends_mask(client):
            if self._round.mask_checksum is None:
                self._round.mask_checksum = vector_checksum(self._round.mask)
            if header.checksum != self._round.mask_checksum:
                raise WireError("it derived another mask; next time it gets the mask")
        upload = self.read_upload(reader)
        size = 0 if self.follow_up else self.buffers.numel()
        buffers = reader.vector(size)
        reader.finish()
        return upload, buffers

    def _weight(self, result: FitRes) -> float:
        if self.weighting == "uniform":
            return 1.0
        if not 1 <= result.num_examples < 2**31:
            raise WireError(f"{result.num_examples} examples")
        return float(result.num_examples)

    def _fail(self, suspects: set[int], reason: object) -> None:
        self._round.failures += 1
        if isinstance(reason, tuple):
            proxy, result = reason
            suspects, reason = {self.roster.client(proxy)}, result.status.message
        # Flower does not say whose exception it is, only that somebody is silent.
        who = " or ".join(str(client) for client in sorted(suspects))
        log.warning("client %s left out of exchange %d: %s", who, self.exchange, reason)

    def _measurements(self, client: int, result: FitRes, waited: float) -> float:
        """Take note of what a client measured, and return its seconds."""
        loss = result.metrics.get("train_loss")
        if isinstance(loss, float) and np.isfinite(loss):
            self._round.losses.append(loss)
        seconds = result.metrics.get("compute_seconds")
        if not isinstance(seconds, float) or not 0 <= seconds < np.inf:
            return 0.0
        # Nobody computed for longer than the server has waited.
        seconds = min(seconds, waited)
        total = self._round.compute_seconds
        total[client] = total.get(client, 0.0) + seconds
        return seconds

    # ---- state --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the server's whole state: tensors and values that JSON holds."""
        return {
            **{f"method.{k}": v for k, v in self.method_state().items()},
            "weights": self.weights,
            "buffers": self.buffers,
            "last_changed": self.last_changed,
            "exchange": self.exchange,
            **{
                f"optimizer.{name}": moment
                for name, moment in as_tensors(self.optimizer.state()).items()
            },
            "clients": {str(c): asdict(r) for c, r in self.clients.items()},
            "records": [astuple(record) for record in self.records],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` returned.

        Parameters
        ----------
        state : dict of str to object
            The state; rounds go on after its last one.
        """
        self.weights.copy_(state["weights"])
        self.buffers.copy_(state["buffers"])
        self.last_changed.copy_(state["last_changed"])
        self.exchange = state["exchange"]
        self.roster.records = {
            int(client): ClientRecord(**record)
            for client, record in state["clients"].items()
        }
        self.load_method_state(_below("method.", state))
        self.optimizer.load_state(as_arrays(_below("optimizer.", state)))
        self._ledger.restore(from_rows(state["records"]))


def _size(parameters: Parameters) -> int:
    return sum(len(tensor) for tensor in parameters.tensors)


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
