"""ZeroFL: sparse training on the devices, and sparse uploads from them.

Qiu, Fernandez-Marques, Gusmao, Gao, Parcollet, Lane: ZeroFL: Efficient On-Device
Training for Federated Learning with Local Sparsity. ICLR 2022, algorithm 1. Clients
train by SWAT: Raihan, Aamodt: Sparse Weight Activation Training. NeurIPS 2020.

A layer computes with its largest weights only, and learns from its largest inputs only;
all of its weights go on learning. A client then sends some more weights than those it
computes with, and forgets the rest of what it learned.
"""

from dataclasses import dataclass

import numpy as np
from torch import nn

from gwpf_baseline.coordinates import scatter
from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.learning.flat_model import Layer, values_per_layer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.pruning import largest_share, share
from gwpf_baseline.methods.shared.sparse import (
    SparseClient,
    SparseStrategy,
    SparseUpload,
)
from gwpf_baseline.methods.shared.swat import sparsify
from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector, is_number

UPLOADS = ("top_k_weights", "diff_on_top_k", "top_k_diff")


@dataclass(frozen=True)
class ZeroFLConfig:
    """Hyper-parameters of ZeroFL.

    Parameters
    ----------
    sparsity : float, default 0.9
        sp, the share of a layer's weights that it does not compute with, and of its
        inputs that it does not learn from; in ``[0, 1)``.
    mask_ratio : float, default 0.2
        r_mask, the share of weights that a client sends beyond the ``1 - sparsity`` it
        computes with; in ``[0, sparsity]``. At `sparsity`, everything is sent.
    upload : {"top_k_weights", "diff_on_top_k", "top_k_diff"}
        The largest weights themselves, the default; their updates; or the largest
        updates.
    dense_ends : bool, default True
        Whether the first and the last convolution or linear layer stay dense, as in
        the paper's ResNet-18.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    sparsity: float = 0.9
    mask_ratio: float = 0.2
    upload: str = "top_k_weights"
    dense_ends: bool = True

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.sparsity) or not 0 <= self.sparsity < 1:
            raise ConfigError("method.sparsity", self.sparsity, "in [0, 1)")
        if not is_number(self.mask_ratio) or not 0 <= self.mask_ratio <= self.sparsity:
            raise ConfigError("method.mask_ratio", self.mask_ratio, "in [0, sparsity]")
        if self.upload not in UPLOADS:
            raise ConfigError(
                "method.upload", self.upload, f"one of {', '.join(UPLOADS)}"
            )
        if not isinstance(self.dense_ends, bool):
            raise ConfigError("method.dense_ends", self.dense_ends, "true or false")

    @property
    def kept(self) -> float:
        """Return the share of a layer that is sent."""
        return 1 - self.sparsity + self.mask_ratio


def adapt(model: nn.Module, config: ZeroFLConfig, seed: int) -> nn.Module:
    """Make a model's layers sparse, see :func:`sparsify`."""
    del seed
    return sparsify(model, config.sparsity, config.dense_ends)


# ---- sparse uploads -----------------------------------------------------------------


def sent(
    update: FloatVector,
    weights: FloatVector,
    spans: list[Layer],
    config: ZeroFLConfig,
) -> BoolVector:
    """Choose what a client sends.

    Parameters
    ----------
    update : numpy.ndarray
        float32 ``(d,)``, what it learned.
    weights : numpy.ndarray
        float32 ``(d,)``, what it came to by that.
    spans : list of Layer
        The model's layers.
    config : ZeroFLConfig
        The hyper-parameters.

    Returns
    -------
    numpy.ndarray
        bool ``(d,)``: of each layer the ``1 - sparsity + mask_ratio`` with the largest
        weights, or updates; of biases and of normalisation, everything.
    """
    measure = update if config.upload == "top_k_diff" else weights
    mask = largest_share(measure, spans, config.kept)
    for span, shape in spans:
        if len(shape) < 2:
            mask[span] = True
    return mask


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


class ZeroFLStrategy(SparseStrategy):
    """The server's half of ZeroFL.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`ZeroFLConfig`.
    """

    name = "zerofl"
    config: ZeroFLConfig

    csr = 0

    def reset_sums(self) -> None:
        """Start the sums afresh."""
        super().reset_sums()
        self.csr = 0

    def most_sent(self) -> list[int]:
        """Return each layer's share; of biases and of normalisation, everything."""
        return [
            count if len(shape) < 2 else share(self.config.kept, count)
            for count, (_, shape) in zip(super().most_sent(), self.layers, strict=True)
        ]

    def read_upload(self, reader: Reader) -> SparseUpload:
        """Take one client's mask, and its weights or updates."""
        upload = super().read_upload(reader)
        if self.config.upload != "top_k_weights":
            return upload
        # What was not sent counts as 0, and moves the model by that.
        weights = np.zeros(self.dimension, np.float32)
        scatter(upload.values, upload.mask, weights)
        self.measure(weights, self.weights.numpy())
        return upload

    def add_upload(self, upload: SparseUpload, weight: float) -> None:
        """Add one client's upload."""
        super().add_upload(upload, weight)
        self.csr += csr_bytes(upload.mask, self.layers)

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that a client sent, and all of it as CSR."""
        return {**super().metrics(), "csr_bytes": self.csr}

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Average the clients' weights or updates, what was not sent being 0."""
        if self.config.upload != "top_k_weights":
            return super().finish_exchange(total_weight)
        weights = self.weights.numpy()
        # In this order a weight that nobody sent becomes 0 to the bit.
        self.update_sum = self.update_sum / np.float32(total_weight) - weights
        self.changed |= weights != 0
        return super().finish_exchange(1.0)


class ZeroFLClient(SparseClient):
    """The client's half of ZeroFL.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`ZeroFLConfig`.
    """

    name = "zerofl"
    config: ZeroFLConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train sparsely, send the largest part and forget the rest."""
        delta, loss = self.train(task.weights, task, state)
        update, weights = delta.numpy(), (task.weights + delta).numpy()
        mask = sent(update, weights, self.layers, self.config)
        values = weights if self.config.upload == "top_k_weights" else update
        self.send(writer, state, self.with_left_out(state, values), mask)
        return loss


METHOD = Method(ZeroFLConfig, ZeroFLStrategy, ZeroFLClient, adapt)
