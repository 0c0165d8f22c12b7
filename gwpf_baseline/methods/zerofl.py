"""ZeroFL: sparse training on the devices, and sparse uploads from them.

Qiu, Fernandez-Marques, Gusmao, Gao, Parcollet, Lane: ZeroFL: Efficient On-Device
Training for Federated Learning with Local Sparsity. ICLR 2022, algorithm 1. Clients
train by SWAT: Raihan, Aamodt: Sparse Weight Activation Training. NeurIPS 2020.

A layer computes with its largest weights only, and learns from its largest inputs only;
all of its weights go on learning. A client then sends some more weights than those it
computes with, and forgets the rest of what it learned.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning.client import ClientState, Task
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.pruning import largest_share, share
from gwpf_baseline.methods.shared.sparse import SparseClient, SparseStrategy
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


# ---- sparse training ----------------------------------------------------------------


def active(values: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Keep the largest values of a tensor.

    Parameters
    ----------
    values : torch.Tensor
        Floating point, of any shape.
    sparsity : float
        The share to drop.

    Returns
    -------
    torch.Tensor
        Like `values`, with 0 in place of all but the ``1 - sparsity`` (rounded up) of
        the largest magnitude. Among equal ones it is PyTorch that chooses.
    """
    flat = values.flatten()
    count = share(1 - sparsity, flat.numel())
    if count == flat.numel():
        return values
    kept = flat.abs().topk(count, sorted=False).indices
    return torch.zeros_like(flat).scatter_(0, kept, flat[kept]).view_as(values)


# All that torch wants of a Function are these two methods, with any arguments.
# pylint: disable=abstract-method,arguments-differ


class _Convolution(torch.autograd.Function):
    """SWAT's convolution, equations 1 and 2 of ZeroFL."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sparsity: float,
        *geometry: Any,
    ) -> torch.Tensor:
        """Convolve with the active weights."""
        weight = active(weight, sparsity)
        ctx.save_for_backward(inputs, weight)
        ctx.sparsity, ctx.geometry = sparsity, geometry
        return torch.conv2d(inputs, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Derive by the active weights and inputs, but for all weights."""
        (gradient,) = gradients
        # Autocast may have made another type of the output.
        inputs, weight = (tensor.to(gradient) for tensor in ctx.saved_tensors)
        stride, padding, dilation, groups = ctx.geometry
        derived = torch.ops.aten.convolution_backward(
            gradient,
            active(inputs, ctx.sparsity),
            weight,
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            ctx.needs_input_grad[:3],
        )
        return *derived, None, None, None, None, None


class _Linear(torch.autograd.Function):
    """The same of a linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        sparsity: float,
    ) -> torch.Tensor:
        """Multiply by the active weights."""
        weight = active(weight, sparsity)
        ctx.save_for_backward(inputs, weight)
        ctx.sparsity = sparsity
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Derive by the active weights and inputs, but for all weights."""
        (gradient,) = gradients
        inputs, weight = (tensor.to(gradient) for tensor in ctx.saved_tensors)
        inputs = active(inputs, ctx.sparsity).reshape(-1, weight.shape[1])
        rows = gradient.reshape(-1, weight.shape[0])
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ weight, rows.T @ inputs, bias, None


# pylint: enable=abstract-method,arguments-differ


class SparseConv2d(nn.Conv2d):
    """A convolution, padded by zeros, that computes with its active weights.

    Attributes
    ----------
    sparsity : float
        The share of weights and inputs that are not active.
    """

    sparsity: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, H, W)`` as :class:`torch.nn.Conv2d` does."""
        assert self.padding_mode == "zeros" and not isinstance(self.padding, str)
        geometry = self.stride, self.padding, self.dilation, self.groups
        output: torch.Tensor = _Convolution.apply(
            input, self.weight, self.bias, self.sparsity, *geometry
        )
        return output


class SparseLinear(nn.Linear):
    """A linear layer that computes with its active weights.

    Attributes
    ----------
    sparsity : float
        The share of weights and inputs that are not active.
    """

    sparsity: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in_features)`` as :class:`torch.nn.Linear` does."""
        output: torch.Tensor = _Linear.apply(
            input, self.weight, self.bias, self.sparsity
        )
        return output


_SPARSE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
}


def adapt(model: nn.Module, config: ZeroFLConfig, seed: int) -> nn.Module:
    """Make the convolutions and linear layers of a model sparse, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its parameters, their values and their names stay as they are.
    config : ZeroFLConfig
        Says which and how sparse.
    seed : int
        The run's seed; nothing is drawn from it.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    del seed
    # Not of a subclass, whose weights may be used in another way: attention's
    # projections are.
    found = [module for module in model.modules() if type(module) in _SPARSE]
    for module in found[1:-1] if config.dense_ends else found:
        module.__class__ = _SPARSE[type(module)]
        module.sparsity = config.sparsity
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Or its shortcut for inference would pass by its layers' forward.
            module.activation_relu_or_gelu = 0
    return model


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
    mask = largest_share(measure, spans, 1 - config.sparsity + config.mask_ratio)
    for span, shape in spans:
        if len(shape) < 2:
            mask[span] = True
    return mask


class ZeroFLStrategy(SparseStrategy):
    """The server's half of ZeroFL.

    Parameters
    ----------
    *args : object
        See :class:`SyncStrategy`.
    config : ZeroFLConfig
        The hyper-parameters.
    **kwargs : object
        See :class:`SyncStrategy`.
    """

    name = "zerofl"

    def __init__(self, *args: Any, config: ZeroFLConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def finish_exchange(self, total_weight: float) -> torch.Tensor:
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
    *args : object
        See :class:`SyncClient`.
    config : ZeroFLConfig
        The hyper-parameters.
    **kwargs : object
        See :class:`SyncClient`.
    """

    name = "zerofl"

    def __init__(self, *args: Any, config: ZeroFLConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train sparsely, send the largest part and forget the rest."""
        delta, loss = self.train(task.weights, task, state)
        update, weights = delta.numpy(), (task.weights + delta).numpy()
        mask = sent(update, weights, self.layers, self.config)
        values = weights if self.config.upload == "top_k_weights" else update
        self.send(writer, task, state, values, mask)
        return loss


METHOD = Method(ZeroFLConfig, ZeroFLStrategy, ZeroFLClient, adapt)
