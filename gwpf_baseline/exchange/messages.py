"""Who holds which version of the model, and what each client is therefore written.

An *exchange* is one message to each client and its answer; exchanges are numbered from
1, and the number of the last one is the model's version; version 0 are the initial
weights, which follow from the seed. For each coordinate it is known which exchange last
changed it, for each client the version that it last confirmed. So a client that missed
many rounds is told exactly what it lacks, and one without any state the whole model.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from flwr.common import Parameters

from gwpf_baseline.coordinates import cache_blocks
from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Sizes,
    Writer,
    from_parameters,
    to_parameters,
    vector_checksum,
)
from gwpf_baseline.utils import BoolVector, is_whole

#: The coordinates that changed, where all of them did.
EVERYTHING = slice(None)


class ClientLost(WireError):
    """A client says that it no longer holds what its message builds on."""


@dataclass
class ClientRecord:
    """What the server knows of one client.

    Parameters
    ----------
    version : int
        The model version that the client confirmed to hold: an exchange's number, 0
        for the initial weights, -1 for none.
    used : int, default 0
        The last exchange whose upload was used.
    """

    version: int
    used: int = 0

    def check(self, last: int) -> None:
        """Check numbers that were read from a file.

        Parameters
        ----------
        last : int
            The last exchange.

        Raises
        ------
        ValueError
            They are no whole numbers up to that.
        """
        for number, least in ((self.version, -1), (self.used, 0)):
            if not is_whole(number, least) or number > last:
                raise ValueError(f"an exchange {number!r} of {last}")


class GlobalModel(Protocol):
    """What messages have to know of the model and its method.

    :class:`~gwpf_baseline.learning.method_server.MethodServer` documents each of these.
    """

    name: str
    dense_downlink: bool
    skips: bool
    weights: torch.Tensor
    buffers: torch.Tensor

    def write_change(self, writer: Writer, held: ClientRecord) -> bool:
        """Write how the model has changed since a version."""

    def write_model(self, writer: Writer) -> None:
        """Write the whole model."""


@dataclass(frozen=True)
class Message:
    """What one client is sent.

    Parameters
    ----------
    parameters : Parameters
        The payload.
    size : int
        Its bytes, as they are counted.
    sizes : Counter of Part
        What they are spent on.
    """

    parameters: Parameters
    size: int
    sizes: Sizes


class Messages:
    """The versions of a model, and the messages of the exchange under way.

    Parameters
    ----------
    model : GlobalModel
        The model.

    Attributes
    ----------
    exchange : int
        Number of the exchange under way, or of the last one.
    follow_up : bool
        Whether it is a round's second one, in which clients do not train.
    mask : numpy.ndarray or None
        bool ``(d,)``, the coordinates that it asks for; None if there is no mask.
    last_changed : numpy.ndarray
        int32 ``(d,)``, the exchange that last changed each coordinate.
    records : dict of int to ClientRecord
        What each client that was ever asked holds.
    """

    def __init__(self, model: GlobalModel) -> None:
        self.exchange = 0
        self.follow_up = False
        self.mask: BoolVector | None = None
        self.last_changed = np.zeros(model.weights.numel(), np.int32)
        self.records: dict[int, ClientRecord] = {}
        self._model = model
        self._initial_checksum = vector_checksum(model.weights.numpy())
        self._mask_checksum: int | None = None
        self._written: dict[tuple[int, int, bool], Message] = {}

    def open(self, follow_up: bool) -> None:
        """Begin an exchange."""
        self.exchange += 1
        self.follow_up = follow_up
        self._written = {}

    def ask_for(self, mask: BoolVector | None) -> None:
        """Set the coordinates that the exchange asks for."""
        self.mask = mask
        self._mask_checksum = None

    def close(self, changed: np.ndarray | slice) -> None:
        """Note what the exchange has changed.

        Parameters
        ----------
        changed : numpy.ndarray or slice
            The coordinates: bool ``(d,)``, int64 ``(k,)`` or a slice.
        """
        if not isinstance(changed, slice) and changed.dtype == np.bool_:
            for index, _ in cache_blocks(changed):
                self.last_changed[index] = self.exchange
        else:
            self.last_changed[changed] = self.exchange
        self._written = {}

    def write(self, client: int, with_mask: bool) -> Message:
        """Write to a client what it lacks.

        Parameters
        ----------
        client : int
            Its partition id.
        with_mask : bool
            Whether it is told what to upload.

        Returns
        -------
        Message
            Clients that hold the same, all of them unless some are drawn, share one.
        """
        held = self.records[client]
        key = (held.version, held.used, with_mask)
        if key not in self._written:
            self._written[key] = self._write(held, with_mask)
        return self._written[key]

    def _write(self, held: ClientRecord, with_mask: bool) -> Message:
        writer = Writer(self._header(Kind.CHANGES, held, with_mask))
        whole = self._model.dense_downlink or held.version < 0
        if whole or not self._model.write_change(writer, held):
            writer = Writer(self._header(Kind.MODEL, held, with_mask))
            self._model.write_model(writer)
        if with_mask:
            assert self.mask is not None
            writer.bitmap(self.mask)
        if not self.follow_up:
            writer.vector(self._model.buffers.numpy(), Part.BUFFERS)
        parameters = to_parameters(writer.payload())
        return Message(parameters, size_of(parameters), writer.sizes)

    def _header(self, kind: Kind, held: ClientRecord, with_mask: bool) -> Header:
        return Header(
            method=self._model.name,
            kind=kind,
            exchange=self.exchange,
            base=held.version,
            length=self._model.weights.numel(),
            used=held.used,
            follow_up=self.follow_up,
            with_mask=with_mask,
            checksum=self._initial_checksum if held.version == 0 else 0,
        )

    def open_answer(
        self, client: int, parameters: Parameters, with_mask: bool
    ) -> Reader:
        """Take a client's answer as far as its header.

        Parameters
        ----------
        client : int
            Its partition id.
        parameters : Parameters
            Its answer.
        with_mask : bool
            Whether it was told what to upload, or has derived it.

        Returns
        -------
        Reader
            An update or, complete and without content, a skipped one.

        Raises
        ------
        WireError
            It is no sound answer to this exchange.
        """
        payload = from_parameters(parameters)
        reader = Reader(payload, self._model.name, self._model.weights.numel())
        header = reader.header
        if header.exchange != self.exchange:
            raise WireError(
                f"an answer to exchange {header.exchange}, not to {self.exchange}"
            )
        if header.kind is Kind.LOST and header.base in (-1, 0):
            held = self.records[client].version
            # It has heard which of its uploads was used last: all that start again get
            # one and the same message.
            self.records[client] = ClientRecord(header.base)
            raise ClientLost(
                f"it no longer holds version {held}; "
                "next time it gets all that it lacks"
            )
        sound = header.kind in (Kind.UPDATE, Kind.SKIPPED, Kind.DIVERGED)
        if not sound or header.base != self.exchange - 1:
            raise WireError(
                f"an answer of kind {header.kind.name} from version {header.base}, "
                f"not an update from version {self.exchange - 1}"
            )
        if header.kind is Kind.DIVERGED:
            self.confirm(client, used=False)
            raise WireError("its training did not stay finite; it drops this round")
        if header.kind is Kind.SKIPPED:
            if not self._model.skips:
                raise WireError(
                    f"an exchange skipped, which {header.method} never does"
                )
            reader.finish()
        elif self.mask is not None and not with_mask:
            if self._mask_checksum is None:
                self._mask_checksum = vector_checksum(self.mask)
            if header.checksum != self._mask_checksum:
                raise WireError("it derived another mask; next time it gets the mask")
        return reader

    def confirm(self, client: int, used: bool) -> None:
        """Note that a client holds the model that it was sent.

        Parameters
        ----------
        client : int
            Its partition id.
        used : bool
            Whether its upload was used, too.
        """
        record = self.records[client]
        record.version = self.exchange - 1
        if used:
            record.used = self.exchange


def size_of(parameters: Parameters) -> int:
    """Return the bytes that a message costs, as they are counted."""
    return sum(len(tensor) for tensor in parameters.tensors)
