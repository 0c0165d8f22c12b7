"""A network of fixed weights, of which a mask says whether they take part: FedPM's.

Isik, Pase, Gunduz, Weissman, Zorzi: Sparse Random Networks for Communication-Efficient
Federated Learning. ICLR 2023. ``docs/fedpm.md`` says what is read how.

Each weight has a score, whose sigmoid is the probability that it takes part. Where a
probability travels, it is one of a few levels, and its score that level's.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector, derive_seed

# How a probability travels, by its bits.
LEVELS = {8: np.uint8, 16: np.uint16}


# ---- levels and scores --------------------------------------------------------------


def to_levels(probabilities: np.ndarray, bits: int) -> np.ndarray:
    """Round probabilities to those that can be sent.

    Parameters
    ----------
    probabilities : numpy.ndarray
        Floats ``(k,)`` in ``[0, 1]``.
    bits : int
        8 or 16.

    Returns
    -------
    numpy.ndarray
        uint8 or uint16 ``(k,)``, from 1 to ``2**bits - 1``: multiples of ``2**-bits``.
    """
    levels = np.rint(probabilities * 2.0**bits)
    return np.clip(levels, 1, 2**bits - 1).astype(LEVELS[bits])


@functools.cache
def score_table(bits: int) -> FloatVector:
    """Return the score of every level.

    Parameters
    ----------
    bits : int
        8 or 16.

    Returns
    -------
    numpy.ndarray
        float32 ``(2**bits,)``, strictly rising: the logits of the levels'
        probabilities, -inf for level 0, which nothing is rounded to.
    """
    level = np.arange(2.0**bits)
    with np.errstate(divide="ignore"):
        return (np.log(level) - np.log(2.0**bits - level)).astype(np.float32)


def certain_scores(mask: BoolVector) -> torch.Tensor:
    """Return the scores that make a mask certain: inf where it is set, else -inf."""
    return torch.where(torch.from_numpy(mask), math.inf, -math.inf)


# ---- the layers ---------------------------------------------------------------------


class MaskedLinear(nn.Linear):
    """A linear layer of fixed weights, of which a random mask takes part.

    Attributes
    ----------
    weight : torch.nn.Parameter
        The scores, float32 in the weights' shape; a score's sigmoid is the probability
        that its weight takes part, exactly 0 and 1 for infinite ones.
    fixed : torch.Tensor
        The weights, float32: signs times the standard deviation of the layer's Kaiming
        initialisation. They follow from a seed and are no part of the state dict.
    """

    fixed: torch.Tensor

    # pylint: disable-next=arguments-renamed  # torch's name is a builtin's
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the weights that take part."""
        return functional.linear(inputs, _taking_part(self))


class MaskedConv2d(nn.Conv2d):
    """A convolution of fixed weights, of which a random mask takes part.

    Attributes
    ----------
    weight, fixed
        As of :class:`MaskedLinear`.
    """

    fixed: torch.Tensor

    # pylint: disable-next=arguments-renamed  # torch's name is a builtin's
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the weights that take part."""
        return self._conv_forward(inputs, _taking_part(self), None)


def _taking_part(layer: MaskedLinear | MaskedConv2d) -> torch.Tensor:
    """Return a sample of the masked weights, or in evaluation their mean."""
    probability = layer.weight.sigmoid()
    if not layer.training:
        return layer.fixed * probability
    mask = probability.detach().bernoulli()
    # The sample in value, the probability in gradient: straight through.
    return layer.fixed * (mask + (probability - probability.detach()))


def _fixed_weights(shape: torch.Size, probability: float, seed: int) -> torch.Tensor:
    size, fan_in = shape.numel(), shape[1:].numel()
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(-(-size // 8)), np.uint8)
    ones = torch.from_numpy(np.unpackbits(drawn, count=size)).view(shape)
    return (2.0 * ones - 1.0) * math.sqrt(1 / (fan_in * probability))


_MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # pylint: disable=protected-access
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def maskable(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of whose weights a mask says whether they take part.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which is not masked yet.

    Returns
    -------
    dict of str to torch.nn.Linear or torch.nn.Conv2d
        By their names in the model, in its order.

    Raises
    ------
    ConfigError
        Another kind of layer has parameters to train.
    """
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    layer: Any
    for name, layer in model.named_modules():
        if type(layer) in _MASKED:
            found[name] = layer
        elif isinstance(layer, _NORMALISATION):
            continue
        elif any(p.requires_grad for p in layer.parameters(recurse=False)):
            raise ConfigError(
                "model",
                f"one with {type(layer).__name__}",
                "made of convolutions, linear layers and normalisation for FedPM",
            )
    return found


def masked(model: nn.Module, level: int, bits: int, seed: int) -> nn.Module:
    """Turn a model into one whose only parameters are the scores of its mask.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it is changed in place. Convolutions and linear layers keep their
        shapes and lose their biases, normalisation loses its scales and shifts.
    level, bits : int
        How probable it is at first that a weight takes part: ``level / 2**bits``.
    seed : int
        The run's seed, from which the signs of the weights follow.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ConfigError
        Another kind of layer has parameters to train.
    """
    layer: Any
    for name, layer in maskable(model).items():
        # As torch's parametrizations do: the layer stays what it was otherwise.
        layer.__class__ = _MASKED[type(layer)]
        shape = layer.weight.shape
        signs = derive_seed(seed, "signs", name)
        fixed = _fixed_weights(shape, level / 2**bits, signs)
        layer.register_buffer("fixed", fixed, persistent=False)
        scores = torch.full(shape, float(score_table(bits)[level]))
        layer.weight, layer.bias = nn.Parameter(scores), None
    for layer in model.modules():
        if isinstance(layer, _NORMALISATION):
            layer.weight = layer.bias = None
    return model
