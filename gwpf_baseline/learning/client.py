"""What every method's Flower client shares: following the model, training, answering.

A method adds what it sends of what was learned; the model's changes, what was not sent,
what got lost on its way, and the rounding of what was sent are looked after here.
"""

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    Config,
    Context,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    NDArrays,
    Scalar,
    Status,
)

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Writer,
    from_parameters,
    to_parameters,
    vector_checksum,
)
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import (
    FlatModel,
    Layer,
    buffers_to_vector,
    layers,
    sent_buffers,
    values_per_layer,
)
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.learning.training import Batches, StepHook, TrainingConfig, train
from gwpf_baseline.records.checkpoint import (
    CheckpointFolder,
    as_arrays,
    as_tensors,
    save_state,
)
from gwpf_baseline.utils import BoolVector, FloatVector, derive_seed


@dataclass(frozen=True)
class Task:
    """What the server asks for in one exchange.

    Parameters
    ----------
    header : Header
        The payload's header.
    weights : torch.Tensor
        float32 ``(d,)``, the global model, on the CPU.
    buffers : torch.Tensor or None
        float32 ``(b,)``, the global buffers; None in a follow-up.
    mask : numpy.ndarray or None
        bool ``(d,)``, the coordinates to upload, if the method has a mask.
    """

    header: Header
    weights: torch.Tensor
    buffers: torch.Tensor | None
    mask: BoolVector | None


def drifted(task: Task, residual: FloatVector) -> torch.Tensor:
    """Return the global model with a client's own values on frozen coordinates.

    Parameters
    ----------
    task : Task
        What the server asks for; its mask says what is not frozen.
    residual : numpy.ndarray
        float32 ``(d,)``, what the client learned and has not sent.

    Returns
    -------
    torch.Tensor
        float32 ``(d,)`` on the CPU.
    """
    assert task.mask is not None
    own = np.where(task.mask, np.float32(0), residual)
    return task.weights + torch.from_numpy(own)


class LostState(Exception):
    """The payload builds on a version that this client does not hold.

    Parameters
    ----------
    version : int
        The one that it can start from: 0, the initial weights, or -1, none.
    """

    def __init__(self, version: int) -> None:
        super().__init__(version)
        self.version = version


class SyncClient(NumPyClient):
    """A Flower client that follows a sparsely sent model and trains on it.

    Parameters
    ----------
    context : Context
        Flower's context; its ``state`` is all that outlives a call.
    model : FlatModel
        The model to train in; what it holds before or after a call does not matter.
    initial : torch.Tensor
        float32 ``(d,)``, the initial weights, as the seed gives them.
    batches : Batches
        This client's data.
    training : TrainingConfig
        How to train.
    config : object, optional
        The method's hyper-parameters.
    quantization : Quantization, optional
        How values travel; default: as they are.
    saved : CheckpointFolder, optional
        Where to write its state when the server makes a checkpoint.
    resume : CheckpointFolder, optional
        Where to find its state if the context holds none.
    """

    #: Name on the wire; both halves of a method share it.
    name: str
    #: Whether the server sends the whole model every time.
    dense_downlink = False

    def __init__(
        self,
        context: Context,
        model: FlatModel,
        initial: torch.Tensor,
        batches: Batches,
        training: TrainingConfig,
        *,
        config: Any = None,
        quantization: Quantization | None = None,
        saved: CheckpointFolder | None = None,
        resume: CheckpointFolder | None = None,
    ) -> None:
        self.context = context
        self.model = model
        self.initial = initial
        self.batches = batches
        self.training = training
        self.config = config
        self.quantization = quantization or Quantization()
        self.saved = saved
        self.resume = resume
        self.server_round = 1

    @property
    def layers(self) -> list[Layer]:
        """Return where the model's tensors stand in the flat vector."""
        return layers(self.model.module)

    @abstractmethod
    def upload(self, task: Task, state: ClientState, writer: Writer) -> float | None:
        """Do what the server asks and write the method's part of the answer.

        Or, by :meth:`Writer.skip`, say that there is nothing worth sending.

        Parameters
        ----------
        task : Task
            What the server asks.
        state : ClientState
            The client's state, to be changed in place.
        writer : Writer
            Takes the method's bitmaps and vectors.

        Returns
        -------
        float or None
            The mean training loss, None in a follow-up.
        """

    def train(
        self,
        start: torch.Tensor,
        task: Task,
        state: ClientState,
        on_step: StepHook | None = None,
    ) -> tuple[torch.Tensor, float]:
        """Run the round's local iterations.

        Parameters
        ----------
        start : torch.Tensor
            float32 ``(d,)``, where to start from, on the CPU.
        task : Task
            What the server asks; its buffers are loaded too.
        state : ClientState
            The cursor and the optimiser's moments move on in it.
        on_step : callable, optional
            Called with the parameter vector, on the device, after every iteration.

        Returns
        -------
        delta : torch.Tensor
            float32 ``(d,)`` on the CPU, the weights' change.
        loss : float
            Mean training loss.
        """
        assert task.buffers is not None
        self.model.load(start, task.buffers)
        loss, state.cursor, moments = train(
            self.model,
            self.batches,
            self.training,
            state.cursor,
            state.moments,
            server_round=self.server_round,
            on_step=on_step,
        )
        for name, value in moments.items():
            state.arrays[f"moment.{name}"] = value
        return self.model.vector.detach().cpu() - start, loss

    def to_client(self) -> Client:
        """Return the client that Flower calls."""
        return _PayloadClient(self)

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Follow the model, train, and answer with what the method sends.

        Parameters
        ----------
        parameters : list of numpy.ndarray
            The server's payload: one array, uint8 ``(n,)``.
        config : dict
            ``round``, the round's number, which the learning rate follows.

        Returns
        -------
        parameters : list of numpy.ndarray
            The answer's payload: one array, uint8 ``(n,)``.
        num_examples : int
            The client's examples.
        metrics : dict
            ``train_loss``, the mean over the local iterations, and
            ``compute_seconds``, the wall time of this call.

        Raises
        ------
        WireError
            The payload is not of this method, model or release.
        """
        started = time.perf_counter()
        self.server_round = _round_number(config)
        state = self.load_state()
        reader = Reader(parameters[0].data, self.name, self.initial.numel())
        try:
            task = self.follow(reader, state)
        except LostState as lost:
            header = self._header(reader.header, Kind.LOST, lost.version)
            return _arrays(Writer(header)), len(self.batches), {}
        writer = Writer(self._header(task.header, Kind.UPDATE, state.version, task))
        loss = self.upload(task, state, writer)
        metrics: dict[str, Scalar] = {}
        if loss is not None:
            metrics["train_loss"] = loss
        if writer.kind is Kind.UPDATE:
            state.uploaded = task.header.exchange
            if loss is not None:
                buffers = buffers_to_vector(self.model.module)
                writer.vector(buffers.numpy(), Part.BUFFERS)
        state.save(self.context)
        metrics["compute_seconds"] = time.perf_counter() - started
        return _arrays(writer), len(self.batches), metrics

    def follow(self, reader: Reader, state: ClientState) -> Task:
        """Bring the client's copy of the model up to date.

        Parameters
        ----------
        reader : Reader
            The server's payload.
        state : ClientState
            The state; its weights and version move on.

        Returns
        -------
        Task
            What the server asks for.

        Raises
        ------
        LostState
            The payload builds on what this client does not hold; the argument is the
            version it can start from.
        WireError
            The payload is damaged.
        """
        header = reader.header
        size = self.initial.numel()
        if header.kind is Kind.MODEL:
            weights = torch.from_numpy(self.read_values(reader, size).copy())
        elif header.kind in (Kind.CHANGES, Kind.VALUES):
            weights = self._known_weights(header, state)
            self.read_change(reader, weights.numpy(), state)
        else:
            raise WireError(f"a server does not send {header.kind.name}")
        mask = reader.bitmap(size) if header.with_mask else None
        buffers = None
        if not header.follow_up:
            numel = sum(b.numel() for b in sent_buffers(self.model.module))
            buffers = torch.from_numpy(reader.vector(numel, part=Part.BUFFERS).copy())
        reader.finish()
        if not header.with_mask:
            # pylint: disable-next=assignment-from-none  # a method may have none
            mask = self.derive_mask(header, weights, state)
        # What has been settled must not be again, after an exchange without an upload.
        if header.used == state.uploaded == state.version + 1:
            self.settle(state)
        state.version = header.exchange - 1
        if not self.dense_downlink:
            state.arrays["weights"] = weights.numpy()
        return Task(header, weights, buffers, mask)

    def read_change(
        self, reader: Reader, weights: FloatVector, state: ClientState
    ) -> None:
        """Bring the model that this client holds to today's.

        Undoes :meth:`SyncStrategy.write_change`.

        Parameters
        ----------
        reader : Reader
            The server's payload, which leads from version ``reader.header.base`` to
            ``reader.header.exchange - 1``.
        weights : numpy.ndarray
            float32 ``(d,)``, the model of version ``state.version``, to be changed in
            place. It may be newer than the payload's base: an answer of this client
            that got lost moved it on, but not what the server knows of it.
        state : ClientState
            The state; what a method keeps of the model's history moves on in it.

        Raises
        ------
        LostState
            This client does not hold what the change is told by.
        """
        header = reader.header
        if header.kind is Kind.CHANGES:
            changed = reader.bitmap(weights.size)
        elif state.uploaded == header.used and "sent" in state.arrays:
            changed = state.arrays["sent"]
        else:
            raise LostState(-1)
        weights[changed] = self.read_values(reader, int(np.count_nonzero(changed)))

    def read_values(self, reader: Reader, length: int) -> FloatVector:
        """Take values of the global model; undoes :meth:`SyncStrategy.write_values`.

        Parameters
        ----------
        reader : Reader
            The server's payload.
        length : int
            How many.

        Returns
        -------
        numpy.ndarray
            float32 ``(length,)``. It may be read-only.
        """
        return self.quantization.read_values(reader, length)

    def write_update(
        self,
        writer: Writer,
        task: Task,
        state: ClientState,
        update: FloatVector,
        mask: BoolVector | None = None,
    ) -> None:
        """Write an update's values, in as few bits as configured.

        Parameters
        ----------
        writer : Writer
            The answer's payload.
        task : Task
            What the server asked for.
        state : ClientState
            Notes what is sent, see :meth:`note_sent`.
        update : numpy.ndarray
            float32 ``(d,)``.
        mask : numpy.ndarray, optional
            bool ``(d,)``, the coordinates to send; default: all.
        """
        seed = derive_seed(
            self.batches.seed, "rounding", self.batches.client, task.header.exchange
        )
        values = update if mask is None else update[mask]
        if self.quantization.exact_updates:
            self.quantization.write_update(writer, values, [values.size], seed)
            self.note_sent(state, mask)
            return
        counts = values_per_layer(self.layers, mask)
        received = self.quantization.write_update(writer, values, counts, seed)
        self.note_sent(state, mask, values - received)

    def note_sent(
        self,
        state: ClientState,
        mask: BoolVector | None,
        left_out: FloatVector | None = None,
    ) -> None:
        """Note what an upload sends, for :meth:`settle`.

        Parameters
        ----------
        state : ClientState
            Takes the note.
        mask : numpy.ndarray or None
            bool ``(d,)``, the coordinates; None for all.
        left_out : numpy.ndarray, optional
            float32 ``(k,)``, how much less of them the server gets than was due, since
            they are rounded; default: they are not.
        """
        for name, value in (("sent", mask), ("left_out", left_out)):
            state.arrays.pop(name, None)
            if value is not None:
                state.arrays[name] = value

    def settle(self, state: ClientState) -> None:
        """Take out of the residual what the server has used: what it has decoded.

        Called once after each upload that was used, with the next message. What was not
        used stays in the residual, and so does what rounding left out (error feedback).

        Parameters
        ----------
        state : ClientState
            Holds the residual, and the note of the upload.
        """
        residual = state.arrays.get("residual")
        if residual is not None:
            sent = state.arrays.get("sent", slice(None))
            residual[sent] = state.arrays.get("left_out", 0.0)

    def with_left_out(self, state: ClientState, update: FloatVector) -> FloatVector:
        """Return an update with what rounding left out of those before it.

        For a method that otherwise keeps nothing of what it learned.

        Parameters
        ----------
        state : ClientState
            Keeps what was left out, where values are rounded.
        update : numpy.ndarray
            float32 ``(d,)``.

        Returns
        -------
        numpy.ndarray
            float32 ``(d,)``.
        """
        if self.quantization.exact_updates:
            return update
        due: FloatVector = update + self.residual(state)
        return due

    def derive_mask(  # pylint: disable=useless-return  # which mypy wants
        self, header: Header, weights: torch.Tensor, state: ClientState
    ) -> BoolVector | None:
        """Return the mask of a message that holds none.

        Parameters
        ----------
        header : Header
            The message's header.
        weights : torch.Tensor
            float32 ``(d,)``, the global model that came with it.
        state : ClientState
            The state before the message; what the mask follows from moves on in it.

        Returns
        -------
        numpy.ndarray or None
            bool ``(d,)``; by default None, for a method without a mask.

        Raises
        ------
        LostState
            The client does not hold what the mask follows from.
        """
        del header, weights, state
        return None

    def residual(self, state: ClientState) -> FloatVector:
        """Return what the client learned and the server has not used, to be added to.

        Parameters
        ----------
        state : ClientState
            Keeps it; what was uploaded from it is forgotten once the server says that
            it has used it.

        Returns
        -------
        numpy.ndarray
            float32 ``(d,)``.
        """
        if "residual" not in state.arrays:
            state.arrays["residual"] = np.zeros(self.initial.numel(), np.float32)
        return state.arrays["residual"]

    def get_properties(self, config: Config) -> dict[str, Scalar]:
        """Say which partition this is, and write the state if a checkpoint is made.

        Parameters
        ----------
        config : dict
            ``checkpoint``: the round to write the state for. Where to, only this
            client's own configuration says.

        Returns
        -------
        dict
            ``partition-id``.
        """
        if "checkpoint" in config and self.saved is not None:
            state = self.load_state()
            number = int(config["checkpoint"])
            file = self.saved.client_file(number, self.batches.client)
            save_state(file, {**as_tensors(state.arrays), **state.values()})
        return {"partition-id": self.batches.client}

    def load_state(self) -> ClientState:
        """Return the state: the context's, else the resumed run's, else a new one."""
        state = ClientState.load(self.context)
        if state is None and self.resume is not None:
            saved = self.resume.client_state(self.batches.client)
            if saved is not None:
                tensors = {k: v for k, v in saved.items() if torch.is_tensor(v)}
                values = {k: v for k, v in saved.items() if k not in tensors}
                state = ClientState(**values, arrays=as_arrays(tensors))
        return state or ClientState()

    def _known_weights(self, header: Header, state: ClientState) -> torch.Tensor:
        held = state.version
        if "weights" in state.arrays and held >= header.base:
            # What the server sends are values, not differences: holding more than it
            # knows of (its client's answer got lost) does no harm.
            return torch.from_numpy(state.arrays["weights"])
        if header.base > 0:
            raise LostState(0)
        if header.checksum != vector_checksum(self.initial.numpy()):
            # Another release of torch draws other weights from the same seed.
            raise LostState(-1)
        return self.initial.clone()

    def _header(
        self, asked: Header, kind: Kind, base: int, task: Task | None = None
    ) -> Header:
        checksum = 0
        if task is not None and task.mask is not None and not asked.with_mask:
            checksum = vector_checksum(task.mask)
        return Header(
            self.name, kind, asked.exchange, base, asked.length, checksum=checksum
        )


def _round_number(config: dict[str, Scalar]) -> int:
    number = config.get("round", 1)
    if not isinstance(number, int) or number < 1:
        raise WireError(f"round {number!r}: rounds are counted from 1")
    return number


def _arrays(writer: Writer) -> NDArrays:
    return [np.frombuffer(writer.payload(), np.uint8)]


class _PayloadClient(Client):
    """What Flower calls: takes payloads out of its messages and puts them in.

    Flower's own wrapper of a ``NumPyClient`` would parse arrays with ``numpy.load`` and
    pad them to 64 bytes.
    """

    def __init__(self, client: SyncClient) -> None:
        self.client = client

    def fit(self, ins: FitIns) -> FitRes:
        """Let the client answer a message."""
        message = np.frombuffer(from_parameters(ins.parameters), np.uint8)
        (answer,), num_examples, metrics = self.client.fit([message], ins.config)
        parameters = to_parameters(answer.data)
        return FitRes(Status(Code.OK, ""), parameters, num_examples, metrics)

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """Ask the client who it is."""
        properties = self.client.get_properties(ins.config)
        return GetPropertiesRes(Status(Code.OK, ""), properties)
