"""The client's half of a method: its data, its model, and what it decides to send.

This is the contract that a method's client fills in. ``gwpf_baseline.methods`` shows a
whole method, ``gwpf_baseline.learning.client`` tells when each of these is called.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gwpf_baseline.coordinates import gather, scatter
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import Reader, Writer, is_finite
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import (
    FlatModel,
    Layer,
    values_per_layer,
)
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.learning.training import Batches, StepHook, TrainingConfig, train
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


class DivergedError(Exception):
    """A round's training did not stay finite."""


class MethodClient(ABC):
    """A client's model and data, and a method's decisions about what it sends.

    Parameters
    ----------
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

    Attributes
    ----------
    server_round : int
        The round under way, which the learning rate follows.
    """

    #: Name on the wire; both halves of a method share it.
    name: str
    #: Whether the server sends the whole model every time.
    dense_downlink = False

    def __init__(
        self,
        model: FlatModel,
        initial: torch.Tensor,
        batches: Batches,
        training: TrainingConfig,
        *,
        config: Any = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.model = model
        self.initial = initial
        self.batches = batches
        self.training = training
        self.config = config
        self.quantization = quantization or Quantization()
        self.server_round = 1

    # ---- what a method decides ----------------------------------------------------

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
            changed = self.sent(state)
        else:
            raise LostState(-1)
        values = self.read_values(reader, int(np.count_nonzero(changed)))
        scatter(values, changed, weights)

    def read_model(self, reader: Reader, state: ClientState) -> FloatVector:
        """Take the whole global model; undoes :meth:`SyncStrategy.write_model`.

        Parameters
        ----------
        reader : Reader
            The server's payload.
        state : ClientState
            The state; what came besides the model is kept in it.

        Returns
        -------
        numpy.ndarray
            float32 ``(d,)``. It may be read-only.
        """
        del state
        return self.read_values(reader, self.initial.numel())

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

    def settle(self, state: ClientState) -> None:
        """Take out of the residual what the server has used: what it has decoded.

        Called once after each upload that was used, with the next message. What was not
        used stays in the residual, and so does what rounding left out (error feedback).

        Parameters
        ----------
        state : ClientState
            Holds the residual, and the note of the upload.
        """
        if "residual" in state.arrays:
            sent = self.sent(state) if "sent" in state.arrays else slice(None)
            state.own("residual")[sent] = state.arrays.get("left_out", 0.0)

    # ---- what a method can call ---------------------------------------------------

    @property
    def layers(self) -> list[Layer]:
        """Return where the model's tensors stand in the flat vector."""
        return self.model.layers

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

        Raises
        ------
        DivergedError
            The weights, the buffers or the optimiser's moments did not stay finite. The
            cursor has moved on, all else in the state is as before.
        """
        assert task.buffers is not None
        self.model.load(start, task.buffers)
        cursor, config = state.cursor, self.training
        # Also if nothing comes of it: the next round is to draw other samples.
        state.cursor += config.steps(len(self.batches)) * config.batch_size
        try:
            loss, moments = train(
                self.model,
                self.batches,
                config,
                cursor,
                state.moments,
                server_round=self.server_round,
                on_step=on_step,
            )
        # A masked network, for one, draws by its scores, and cannot by NaN.
        except RuntimeError as error:
            if self.model.is_finite():
                raise
            raise DivergedError from error
        # Beyond float32, squares of gradients stop all steps, and weights stay finite.
        if not self.model.is_finite() or not all(map(is_finite, moments.values())):
            raise DivergedError
        for name, value in moments.items():
            state.arrays[f"moment.{name}"] = value
        # By NumPy, which takes large pages of memory for a large result.
        delta = self.model.vector.detach().cpu().numpy() - start.numpy()
        return torch.from_numpy(delta), loss

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
        return state.own("residual")

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
        if not self.quantization.feedback:
            return update
        due: FloatVector = update + self.residual(state)
        return due

    def write_update(
        self,
        writer: Writer,
        state: ClientState,
        update: FloatVector,
        mask: BoolVector | None = None,
    ) -> None:
        """Write an update's values, in as few bits as configured.

        Parameters
        ----------
        writer : Writer
            The answer's payload.
        state : ClientState
            Notes what is sent, see :meth:`note_sent`.
        update : numpy.ndarray
            float32 ``(d,)``.
        mask : numpy.ndarray, optional
            bool ``(d,)``, the coordinates to send; default: all.
        """
        values = update if mask is None else gather(update, mask)
        counts = values_per_layer(self.layers, mask)
        batches = self.batches
        # A round may have two exchanges; this one leads to the next version.
        exchange = state.version + 1
        seed = derive_seed(batches.seed, "rounding", batches.client, exchange)
        received = self.quantization.write_update(writer, values, counts, seed)
        left_out = values - received if self.quantization.feedback else None
        self.note_sent(state, mask, left_out)

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
        packed = None if mask is None else np.packbits(mask)
        for name, value in (("sent", packed), ("left_out", left_out)):
            state.arrays.pop(name, None)
            if value is not None:
                state.arrays[name] = value

    def sent(self, state: ClientState) -> BoolVector:
        """Return the coordinates that :meth:`note_sent` has noted, bool ``(d,)``."""
        bits = np.unpackbits(state.arrays["sent"], count=self.initial.numel())
        return bits.view(np.bool_)
