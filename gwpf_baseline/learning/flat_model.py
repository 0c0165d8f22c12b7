"""A model as one flat vector of trainable parameters, and its buffers as another."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from gwpf_baseline.utils import FloatVector

# On a GPU an LSTM's weights would have to stand in cuDNN's own order for it not to copy
# them, which takes next to nothing; it says so over and over.
warnings.filterwarnings("ignore", "RNN module weights are not part of single contig")


class FlatModel:
    """A model whose parameters and gradients are views into two flat vectors.

    The methods of this package reason about single coordinates. With the model laid
    out like this they read and write all of them as one vector, without a copy, and
    the optimiser's step is one vectorised update instead of one a layer.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it is moved to `device` and its parameters become views.
    device : torch.device or str, default CPU
        Where to compute.

    Attributes
    ----------
    module : torch.nn.Module
        The model itself.
    vector : torch.nn.Parameter
        Trainable parameters, float32 ``(d,)`` in ``named_parameters()`` order; its
        ``grad`` is the flat gradient.
    layers : list of Layer
        Where the model's tensors stand in it.
    buffers : list of torch.Tensor
        The buffers that are exchanged, as :func:`sent_buffers` gives them.
    """

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu") -> None:
        self.module = model.to(device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            flat = torch.cat([p.detach().float().reshape(-1) for p in parameters])
        self.vector = nn.Parameter(flat)
        self.vector.grad = torch.zeros_like(flat)
        offset = 0
        for parameter in parameters:
            end = offset + parameter.numel()
            parameter.data = flat[offset:end].view_as(parameter)
            parameter.grad = self.vector.grad[offset:end].view_as(parameter)
            offset = end
        self.layers = layers(self.module)
        # A model is asked for them in every round, and walks through itself each time.
        self.buffers = sent_buffers(self.module)
        # The vector must alias what the layers see: nn.Parameter keeps the storage.
        assert self.vector.data_ptr() == flat.data_ptr()

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.vector.device

    def zero_grad(self) -> None:
        """Clear the gradient in place, which keeps the layers' views of it."""
        assert self.vector.grad is not None
        self.vector.grad.zero_()

    def is_finite(self) -> bool:
        """Tell whether all parameters and buffers are finite."""
        tensors = [self.vector.detach(), *self.buffers]
        # A sum in float64 is finite exactly if every value is: no mask. One in float32,
        # which is 30 times faster, may be infinite where no value is.
        return all(
            math.isfinite(t.sum()) or math.isfinite(t.sum(dtype=torch.float64))
            for t in tensors
        )

    @torch.no_grad()
    def load(self, weights: torch.Tensor, buffers: torch.Tensor) -> None:
        """Copy a flat parameter vector and a flat buffer vector into the model.

        Parameters
        ----------
        weights : torch.Tensor
            float32 ``(d,)`` on any device.
        buffers : torch.Tensor
            float32 ``(b,)`` on any device, as :func:`buffers_to_vector` gives it.
        """
        self.vector.copy_(weights)
        _fill(self.buffers, buffers)

    def buffer_vector(self) -> torch.Tensor:
        """Return the buffers as :func:`buffers_to_vector` does."""
        return _joined(self.buffers)


class Layer(NamedTuple):
    """Where a parameter tensor stands in the flat vector.

    Parameters
    ----------
    span : slice
        Its coordinates.
    shape : tuple of int
        Its own shape.
    """

    span: slice
    shape: tuple[int, ...]


def layers(model: nn.Module) -> list[Layer]:
    """Return where each trainable tensor of a model stands in its flat vector.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    list of Layer
        In ``named_parameters()`` order; the spans follow each other without gaps.
    """
    found, start = [], 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            stop = start + parameter.numel()
            found.append(Layer(slice(start, stop), tuple(parameter.shape)))
            start = stop
    return found


def values_per_layer(
    spans: Sequence[Layer], mask: np.ndarray | None = None
) -> list[int]:
    """Count the values that each layer has in a mask.

    Parameters
    ----------
    spans : sequence of Layer
        The layers.
    mask : numpy.ndarray, optional
        bool ``(d,)``; default: all coordinates.

    Returns
    -------
    list of int
        One number a layer.
    """
    if mask is None:
        return [span.stop - span.start for span, _ in spans]
    return [int(np.count_nonzero(mask[span])) for span, _ in spans]


def _named_sent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    buffers = list(model.named_buffers())
    names = model.state_dict().keys() if buffers else ()
    return [(name, buffer) for name, buffer in buffers if name in names]


def sent_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Return the buffers that are exchanged: those of the state dict.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    list of torch.Tensor
        In ``named_buffers()`` order. What is registered as not persistent can be
        rebuilt, and need not travel.
    """
    return [buffer for _, buffer in _named_sent_buffers(model)]


def buffer_limits(model: nn.Module) -> tuple[FloatVector, FloatVector]:
    """Return the least and the most that each of a model's buffers can be.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    least : numpy.ndarray
        float32 ``(b,)`` in the order of :func:`sent_buffers`: 0 for variances, which
        normalisation takes the root of, and for counters; else minus infinity.
    most : numpy.ndarray
        The same: 2**31 for counters, and infinity for all others.
    """
    least, most = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for name, buffer in _named_sent_buffers(model):
        counter = not buffer.is_floating_point()
        never_below = 0.0 if counter or name.endswith("running_var") else -np.inf
        least.append(np.full(buffer.numel(), never_below, np.float32))
        most.append(np.full(buffer.numel(), 2.0**31 if counter else np.inf, np.float32))
    return np.concatenate(least), np.concatenate(most)


def buffers_to_vector(model: nn.Module) -> torch.Tensor:
    """Collect a model's buffers, such as BatchNorm statistics.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    torch.Tensor
        float32 ``(b,)`` on the CPU in the order of :func:`sent_buffers`, empty if
        there are none. Counters are exact up to 2**24.
    """
    return _joined(sent_buffers(model))


def _joined(buffers: list[torch.Tensor]) -> torch.Tensor:
    parts = [b.detach().to("cpu", torch.float32).reshape(-1) for b in buffers]
    return torch.cat(parts) if parts else torch.zeros(0)


def vector_to_buffers(model: nn.Module, vector: torch.Tensor) -> None:
    """Write a vector of :func:`buffers_to_vector` back, rounding integer buffers.

    Parameters
    ----------
    model : torch.nn.Module
        The model to write into.
    vector : torch.Tensor
        float32 ``(b,)``.
    """
    _fill(sent_buffers(model), vector)


@torch.no_grad()
def _fill(buffers: list[torch.Tensor], vector: torch.Tensor) -> None:
    offset = 0
    for buffer in buffers:
        part = vector[offset : offset + buffer.numel()].view_as(buffer)
        buffer.copy_(part if buffer.is_floating_point() else part.round())
        offset += buffer.numel()


def parameters_to_vector(model: nn.Module) -> torch.Tensor:
    """Copy a model's trainable parameters into one vector.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.

    Returns
    -------
    torch.Tensor
        float32 ``(d,)`` on the CPU in ``named_parameters()`` order.
    """
    parts = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.detach().to("cpu", torch.float32).reshape(-1) for p in parts])


def to_ndarrays(
    model: nn.Module, weights: torch.Tensor, buffers: torch.Tensor
) -> list[np.ndarray]:
    """Cut the flat vectors into arrays of the model's own shapes.

    This is the list that Flower's examples exchange, so that whatever a user built
    for Flower (an evaluation function, a model saver) understands it.

    Parameters
    ----------
    model : torch.nn.Module
        The model that gives the shapes; it is not changed.
    weights : torch.Tensor
        float32 ``(d,)``.
    buffers : torch.Tensor
        float32 ``(b,)``.

    Returns
    -------
    list of numpy.ndarray
        One array an entry of ``model.state_dict()``, in its order; a mean of counters
        is rounded.
    """
    # By identity, so that a shared parameter has its value under each of its names.
    pieces: dict[int, np.ndarray] = {}
    for tensors, vector in (
        ([p for p in model.parameters() if p.requires_grad], weights.numpy()),
        (sent_buffers(model), buffers.numpy()),
    ):
        offset = 0
        for tensor in tensors:
            end = offset + math.prod(tensor.shape)
            dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
            piece = vector[offset:end]
            if not tensor.is_floating_point():
                piece = np.rint(piece)
            shaped = piece.reshape(tuple(tensor.shape))
            pieces[id(tensor)] = shaped.astype(dtype, copy=False)
            offset = end
    state = model.state_dict(keep_vars=True).values()
    for tensor in state:
        if id(tensor) not in pieces:
            pieces[id(tensor)] = tensor.detach().cpu().numpy()
    return [pieces[id(tensor)] for tensor in state]
