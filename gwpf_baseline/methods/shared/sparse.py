"""Both halves of methods whose clients choose what they send: a mask and its values.

Gaia's exchange, by which gradient pruning and ZeroFL send, too.
"""

from typing import Any, NamedTuple

import numpy as np

from gwpf_baseline.coordinates import cache_blocks, gather
from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.flat_model import values_per_layer
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import BoolVector, FloatVector


class SparseUpload(NamedTuple):
    """What one client sends.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(d,)``, the coordinates that it has chosen.
    values : numpy.ndarray
        float32, their updates.
    """

    mask: BoolVector
    values: FloatVector


class SparseStrategy(SyncStrategy[SparseUpload]):
    """A server that averages what each client chose to send.

    Parameters
    ----------
    *args : object
        See :class:`SyncStrategy`.
    **kwargs : object
        See :class:`SyncStrategy`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.update_sum = np.zeros(0, np.float32)
        self.changed = np.zeros(0, np.bool_)
        self.sent = 0

    def reset_sums(self) -> None:
        """Start the sum afresh; each client chooses its own mask."""
        self.update_sum = np.zeros(self.dimension, np.float32)
        self.changed = np.zeros(self.dimension, np.bool_)
        self.sent = 0

    def most_sent(self) -> list[int]:
        """Return how many values of each layer a client may send; by default all."""
        return values_per_layer(self.layers)

    def read_upload(self, reader: Reader) -> SparseUpload:
        """Take one client's mask and values.

        Raises
        ------
        WireError
            More values than it may send: all clients would be sent these coordinates.
        """
        mask = reader.bitmap(self.dimension)
        counts, most = values_per_layer(self.layers, mask), self.most_sent()
        if any(count > limit for count, limit in zip(counts, most, strict=True)):
            raise WireError(
                f"{counts} values of the layers, at most {most} are allowed"
            )
        return SparseUpload(mask, self.read_update(reader, mask))

    def add_upload(self, upload: SparseUpload, weight: float) -> None:
        """Add one client's updates."""
        for index, part in cache_blocks(upload.mask):
            self.update_sum[index] += np.float32(weight) * upload.values[part]
        self.changed |= upload.mask
        self.sent += upload.values.size

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Move the model by the mean over all clients, unsent updates being 0."""
        update = gather(self.update_sum, self.changed)
        update /= np.float32(total_weight)
        self.move(update, self.changed)
        return self.changed

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that a client sent."""
        return {"sent_fraction": self.sent / (self.answers * self.dimension)}


class SparseClient(SyncClient):  # pylint: disable=abstract-method  # as it is
    """A client that chooses what it sends."""

    def send(
        self,
        writer: Writer,
        state: ClientState,
        update: FloatVector,
        mask: BoolVector,
    ) -> None:
        """Write the chosen part of an update.

        Parameters
        ----------
        writer : Writer
            The answer's payload.
        state : ClientState
            Remembers the mask.
        update : numpy.ndarray
            float32 ``(d,)``.
        mask : numpy.ndarray
            bool ``(d,)``, what is sent of it.
        """
        writer.bitmap(mask)
        self.write_update(writer, state, update, mask)
