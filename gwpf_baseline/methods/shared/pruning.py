"""Which values of a vector are worth sending: the largest, by threshold or by share.

The mechanism of gradient pruning, after Aji, Heafield: Sparse Communication for
Distributed Gradient Descent. EMNLP 2017. ZeroFL and STC choose by share, too.
"""

import math
from collections.abc import Iterable

import numpy as np

from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.utils import BoolVector, FloatVector

# Values in a sample of a long vector.
_SAMPLE = 2**15


def share(fraction: float, total: int) -> int:
    """Return a share, rounded up; 0.28 of 25 is 7, though as floats it is more."""
    return math.ceil(fraction * total * (1 - 1e-12))


def largest(magnitude: FloatVector, count: int) -> BoolVector:
    """Choose the largest values.

    Parameters
    ----------
    magnitude : numpy.ndarray
        float32 ``(m,)``.
    count : int
        How many, at most m.

    Returns
    -------
    numpy.ndarray
        bool ``(m,)`` with exactly `count` set; of equal values the first.
    """
    if count <= 0:
        return np.zeros(magnitude.size, np.bool_)
    least = _kth_largest(magnitude, count)
    chosen = magnitude > least
    tied = np.flatnonzero(magnitude == least)
    chosen[tied[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _kth_largest(values: FloatVector, count: int) -> np.float32:
    """Return the least of the `count` largest values.

    A sample gives a bound that slightly more than `count` are beyond, and only these
    are ordered. Where many are alike, as sums of a few votes are, the bound itself is
    mostly the answer; ordering all of them would take twenty times as long.
    """
    sample = values[:: values.size // _SAMPLE + 1]
    beyond = math.ceil(1.2 * count / values.size * sample.size) + 16
    if beyond < sample.size:
        bound = np.partition(sample, sample.size - beyond)[sample.size - beyond]
        above = values > bound
        if np.count_nonzero(above) >= count:
            values = values[above]
        elif np.count_nonzero(values >= bound) >= count:
            return bound
    place = values.size - count
    return np.partition(values, place)[place]


def above_threshold(
    values: FloatVector, layers: Iterable[Layer], threshold: float
) -> BoolVector:
    """Choose, in each layer, the values that are not small beside its largest one.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(d,)``.
    layers : iterable of Layer
        The layers.
    threshold : float
        The least magnitude, as a share of the layer's largest.

    Returns
    -------
    numpy.ndarray
        bool ``(d,)``. A value of 0 is never chosen.
    """
    magnitude = np.abs(values)
    chosen = magnitude > 0
    for span, _ in layers:
        part = magnitude[span]
        least = np.float32(threshold) * part.max(initial=0)
        chosen[span] &= part >= least
    return chosen


def largest_share(
    values: FloatVector, layers: Iterable[Layer], keep: float
) -> BoolVector:
    """Choose a share of each layer's values: the largest.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(d,)``.
    layers : iterable of Layer
        The layers.
    keep : float
        The share, in ``[0, 1]``; rounded up.

    Returns
    -------
    numpy.ndarray
        bool ``(d,)``. A value of 0 is never chosen.
    """
    magnitude = np.abs(values)
    chosen = magnitude > 0
    for span, _ in layers:
        part = magnitude[span]
        chosen[span] &= largest(part, share(keep, part.size))
    return chosen
