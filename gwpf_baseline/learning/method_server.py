"""The server's half of a method: the global model, and what is decided about it.

This is the contract that a method's strategy fills in. ``gwpf_baseline.methods`` shows
a whole method, ``gwpf_baseline.strategy`` tells when each of these is called.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from gwpf_baseline.coordinates import cache_blocks, gather
from gwpf_baseline.exchange.header import Kind
from gwpf_baseline.exchange.messages import ClientRecord, Messages
from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import (
    buffers_to_vector,
    layers,
    parameters_to_vector,
    values_per_layer,
)
from gwpf_baseline.learning.norm_bound import NormBound, check_multiple
from gwpf_baseline.learning.server_optimizer import (
    ServerOptimizer,
    ServerOptimizerConfig,
)
from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector

Upload = TypeVar("Upload")

WEIGHTINGS = ("uniform", "examples")


def check_weighting(weighting: object) -> None:
    """Raise ConfigError unless it is one of `WEIGHTINGS`."""
    if weighting not in WEIGHTINGS:
        raise ConfigError("weighting", weighting, f"one of {', '.join(WEIGHTINGS)}")


# What a method can decide, and what it can call.
# pylint: disable-next=too-many-public-methods
class MethodServer(ABC, Generic[Upload]):
    """A global model, and a method's decisions about its exchanges.

    Parameters
    ----------
    model : torch.nn.Module
        The model with its initial weights, which every client can derive as well.
    config : object, optional
        The method's hyper-parameters.
    seed : int, default 0
        Seed of every choice of the server.
    weighting : {"uniform", "examples"}, default "uniform"
        Whether clients count alike, as in an all-reduce, or by their examples.
    server_optimizer : ServerOptimizerConfig, optional
        How the mean update moves the model; default: by itself, as in FedAvg.
    quantization : Quantization, optional
        How values travel; default: as they are.
    norm_bound : float or None, default 20.0
        How many times longer than the exchange's median update one client's may be, to
        be used. None: any.

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
    update_bound, buffer_bound : NormBound
        How far one client's upload may move the model and the buffers.
    messages : Messages
        Which version of the model each client holds.
    answers : int
        How many clients have answered the round soundly so far.
    """

    #: Name on the wire; both halves of a method share it.
    name: str
    #: Whether clients get the whole model every time, which FedAvg is defined by.
    dense_downlink = False
    #: Whether a client may find that what it has learned is not worth sending.
    skips = False

    def __init__(
        self,
        model: nn.Module,
        *,
        config: Any = None,
        seed: int = 0,
        weighting: str = "uniform",
        server_optimizer: ServerOptimizerConfig | None = None,
        quantization: Quantization | None = None,
        norm_bound: float | None = 20.0,
    ) -> None:
        check_weighting(weighting)
        check_multiple(norm_bound)
        self.model = model
        self.config = config
        self.seed = seed
        self.weighting = weighting
        self.quantization = quantization or Quantization()
        self.weights = parameters_to_vector(model)
        self.buffers = buffers_to_vector(model)
        self.layers = layers(model)
        self.optimizer = ServerOptimizer(
            server_optimizer or ServerOptimizerConfig(), self.dimension
        )
        self.update_bound = NormBound(norm_bound)
        self.buffer_bound = NormBound(norm_bound)
        self.messages = Messages(self)
        self.answers = 0

    # ---- what a method decides ----------------------------------------------------

    def begin_exchange(self) -> None:
        """Decide what the exchange is to be; by default there is nothing to decide."""

    @abstractmethod
    def reset_sums(self) -> None:
        """Start the exchange's sums afresh.

        Called after :meth:`begin_exchange`, and once more if an upload turns out to be
        too long, so that the others are added again.
        """

    def request(self) -> BoolVector | None:
        """Return what clients are to upload in the exchange that has just begun.

        Returns
        -------
        numpy.ndarray or None
            bool ``(d,)``, the mask of coordinates; by default None, as each client
            chooses itself, or sends something else.
        """
        return None

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
        return self.messages.mask is not None

    @abstractmethod
    def read_upload(self, reader: Reader) -> Upload:
        """Take one client's upload from a payload, without any effect.

        A vector by which one client could move the model as far as it likes has to
        be measured, see :meth:`measure`; :meth:`read_update` does it.

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
    def finish_exchange(self, total_weight: float) -> np.ndarray | slice:
        """Apply the exchange's sums to the global model and decide what follows.

        Parameters
        ----------
        total_weight : float
            Sum of the weights of the clients whose upload was used, above 0.

        Returns
        -------
        numpy.ndarray or slice
            The coordinates that changed: bool ``(d,)``, int64 ``(k,)``, or
            ``EVERYTHING``.
        """

    def abandon_exchange(self) -> None:
        """End an exchange in which nobody's upload was used: the model stays as it is.

        A method that keeps a history of its own by exchange notes here that nothing
        happened in this one. By default there is nothing to note.
        """

    def wants_follow_up(self) -> bool:
        """Return whether this round's clients are to be asked a second time."""
        return False

    def write_change(self, writer: Writer, held: ClientRecord) -> bool:
        """Write how the global model has changed since the version a client holds.

        Parameters
        ----------
        writer : Writer
            The message; its header has the version as ``base`` and today's as
            ``exchange - 1``.
        held : ClientRecord
            The version that the client holds, and the last exchange whose upload by it
            was used. A method that codes the change relative to old values, or as the
            steps between, keeps them itself.

        Returns
        -------
        bool
            False if the client is too far back, or the change too large: what was
            written is dropped, and the client gets the whole model. By default a bitmap
            of the coordinates that changed, and their values; where there is a mask,
            without the bitmap for a client whose upload was used in the last exchange,
            and who so knows them.
            :meth:`SyncClient.read_change` undoes it.
        """
        changed = self.changed_since(held.version)
        last = self.exchange - 1
        if self.messages.mask is not None and held.used == last > 0:
            writer.kind = Kind.VALUES
        else:
            writer.bitmap(changed)
        self.write_values(writer, gather(self.weights.numpy(), changed))
        return True

    def write_model(self, writer: Writer) -> None:
        """Write the whole global model, for a client that follows it from here on.

        Parameters
        ----------
        writer : Writer
            The message. A method whose clients must hold something besides the model
            to read what follows writes that, too; :meth:`SyncClient.read_model` undoes
            it.
        """
        self.write_values(writer, self.weights.numpy())

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

    def measured_weights(self) -> torch.Tensor:
        """Return the weights of the network that is measured and saved.

        Returns
        -------
        torch.Tensor
            float32 ``(d,)``; by default the global model.
        """
        return self.weights

    def mean_weights(self) -> torch.Tensor | None:
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
        """Return ``frozen_fraction``, ``sent_fraction`` and the like, if any."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the method: tensors and values."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""

    # ---- what a method can call ---------------------------------------------------

    @property
    def dimension(self) -> int:
        """Return d, the number of trainable parameters."""
        return self.weights.numel()

    @property
    def exchange(self) -> int:
        """Return the number of the exchange under way, or of the last one."""
        return self.messages.exchange

    @property
    def follow_up(self) -> bool:
        """Return whether it is a round's second one, in which clients do not train."""
        return self.messages.follow_up

    @property
    def clients(self) -> dict[int, ClientRecord]:
        """Return what each client holds, by its partition id."""
        return self.messages.records

    def changed_since(self, version: int) -> BoolVector:
        """Return the coordinates that have changed since a version, bool ``(d,)``."""
        changed: BoolVector = self.messages.last_changed > version
        return changed

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

        Raises
        ------
        WireError
            They are not there, or beyond all reason.
        """
        counts = values_per_layer(self.layers, mask)
        values = self.quantization.read_update(reader, counts)
        self.measure(values)
        return values

    def measure(self, values: FloatVector, origin: FloatVector | None = None) -> None:
        """Measure how far an upload would move the model.

        An upload that is much longer than the median one of its exchange is left out.

        Parameters
        ----------
        values : numpy.ndarray
            float32 ``(k,)``, all that it would move the model by.
        origin : numpy.ndarray, optional
            float32 ``(k,)``, the values that would not move it; default: zeros.

        Raises
        ------
        WireError
            Further than any update.
        """
        self.update_bound.measure(values, origin)

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

    def refuse(self, why: str, *options: str) -> None:
        """Refuse options that mean nothing to the method, unless they are left alone.

        Parameters
        ----------
        why : str
            What the method does instead, to end the sentence "X for this method, ...".
        *options : {"weighting", "server_optimizer", "quantization"}
            The options, or groups of them.

        Raises
        ------
        ConfigError
            One of them is set to something else than its default.
        """
        given: dict[str, dict[str, tuple[object, object]]] = {
            "weighting": {"weighting": (self.weighting, "uniform")},
            "server_optimizer": {
                "server_optimizer": (self.optimizer.config.name, "fedavg"),
                "server_optimizer.lr": (self.optimizer.config.lr, 1.0),
            },
            "quantization": {
                "quantization.bits": (self.quantization.bits, 32),
                "quantization.rounding": (self.quantization.rounding, "nearest"),
                "quantization.fp16": (self.quantization.fp16, False),
            },
        }
        for option in options:
            for key, (value, default) in given[option].items():
                if value != default:
                    raise ConfigError(
                        key, value, f"{default} for {self.name}, which {why}"
                    )
