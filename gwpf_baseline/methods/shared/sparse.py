"""What methods share whose clients choose what they send: a mask and its values."""

from typing import Any, NamedTuple

import numpy as np
import torch

from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.learning.client import ClientState, SyncClient, Task
from gwpf_baseline.learning.flat_model import Layer, cache_blocks, values_per_layer
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


def csr_bytes(mask: BoolVector, layers: list[Layer]) -> int:
    """Return what the values in a mask take as compressed sparse rows.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(d,)``.
    layers : list of Layer
        The layers; the first dimension of a tensor counts its rows.

    Returns
    -------
    int
        Four bytes a value, four for its column, and four for each row of a tensor and
        its end. What is whole travels as it is, as every tensor of one dimension does.
    """
    total = 0
    for (_, shape), count in zip(layers, values_per_layer(layers, mask), strict=True):
        dense = 4 * int(np.prod(shape))
        whole = len(shape) < 2 or 4 * count == dense
        total += dense if whole else 8 * count + 4 * (shape[0] + 1)
    return total


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
        self.sent: list[int] = []
        self.csr = 0

    def begin_exchange(self) -> None:
        """Start the sum afresh; each client chooses its own mask."""
        self.update_sum = np.zeros(self.dimension, np.float32)
        self.changed = np.zeros(self.dimension, np.bool_)
        self.sent = []
        self.csr = 0

    def read_upload(self, reader: Reader) -> SparseUpload:
        """Take one client's mask and values."""
        mask = reader.bitmap(self.dimension)
        return SparseUpload(mask, self.read_update(reader, mask))

    def add_upload(self, upload: SparseUpload, weight: float) -> None:
        """Add one client's updates."""
        self.update_sum[upload.mask] += np.float32(weight) * upload.values
        self.changed |= upload.mask
        self.sent.append(upload.values.size)
        self.csr += csr_bytes(upload.mask, self.layers)

    def finish_exchange(self, total_weight: float) -> torch.Tensor:
        """Move the model by the mean over all clients, unsent updates being 0."""
        weights = self.weights.numpy()
        for index, _ in cache_blocks(self.changed):
            update = self.update_sum[index]
            update /= np.float32(total_weight)
            self.optimizer.step(weights, index, update)
        return torch.from_numpy(self.changed)

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that a client sent, and all of it as CSR."""
        share = float(np.mean(self.sent)) / self.dimension
        return {"sent_fraction": share, "csr_bytes": self.csr}


class SparseClient(SyncClient):  # pylint: disable=abstract-method  # as it is
    """A client that chooses what it sends."""

    def send(
        self,
        writer: Writer,
        task: Task,
        state: ClientState,
        update: FloatVector,
        mask: BoolVector,
    ) -> None:
        """Write the chosen part of an update.

        Parameters
        ----------
        writer : Writer
            The answer's payload.
        task : Task
            What the server asked for.
        state : ClientState
            Remembers the mask.
        update : numpy.ndarray
            float32 ``(d,)``.
        mask : numpy.ndarray
            bool ``(d,)``, what is sent of it.
        """
        writer.bitmap(mask)
        self.write_update(writer, task, update[mask], mask)
        state.arrays["mask"] = mask
