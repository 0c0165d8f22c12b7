"""Layers that compute and learn sparsely: SWAT.

Raihan, Aamodt: Sparse Weight Activation Training. NeurIPS 2020. ZeroFL's clients train
by it.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gwpf_baseline.methods.shared.pruning import share


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


def sparsify(model: nn.Module, sparsity: float, dense_ends: bool) -> nn.Module:
    """Make the convolutions and linear layers of a model sparse, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Any model. Its parameters, their values and their names stay as they are.
    sparsity : float
        The share of weights and inputs that are not active.
    dense_ends : bool
        Whether the first and the last of these layers stay dense.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    # Not of a subclass, whose weights may be used in another way: attention's
    # projections are.
    found = [module for module in model.modules() if type(module) in _SPARSE]
    for module in found[1:-1] if dense_ends else found:
        module.__class__ = _SPARSE[type(module)]
        module.sparsity = sparsity
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Or its shortcut for inference would pass by its layers' forward.
            module.activation_relu_or_gelu = 0
    return model
