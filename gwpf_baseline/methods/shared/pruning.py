"""Which values of a vector are worth sending: the largest, by threshold or by share.

The mechanism of gradient pruning, after Aji, Heafield: Sparse Communication for
Distributed Gradient Descent. EMNLP 2017. ZeroFL and STC choose by share, too.
"""

import math
from collections.abc import Iterable

import numpy as np

from gwpf_baseline.coordinates import beyond
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.utils import BoolVector, FloatVector

# Values in a sample of a long vector.
_SAMPLE = 2**15
# The least magnitude that is not 0.
_LEAST = np.nextafter(np.float32(0), np.float32(1))


def share(fraction: float, total: int) -> int:
    """Return a share, rounded up; 0.28 of 25 is 7, though as floats it is more."""
    return math.ceil(fraction * total * (1 - 1e-12))


def largest(values: FloatVector, count: int) -> np.ndarray:
    """Choose the values of largest magnitude.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(m,)``.
    count : int
        How many.

    Returns
    -------
    numpy.ndarray
        int64, the places of `count` of them in rising order, of equal ones the first;
        or of all that are not 0, if these are fewer.
    """
    if count <= 0:
        return np.zeros(0, np.int64)
    bound = _bound(values, count)
    chosen = beyond(values, bound)
    if chosen.size < count and bound > _LEAST:
        bound, chosen = _LEAST, beyond(values, _LEAST)
    excess = chosen.size - count
    if excess <= 0:
        return chosen
    magnitude = np.abs(values.take(chosen))
    # Where many are alike, as sums of a few votes are, the bound itself is mostly the
    # least of them; ordering all of them would take twenty times as long.
    above = magnitude[magnitude > bound]
    if above.size > count:
        place = above.size - count
        bound = np.partition(above, place)[place]
    keep = magnitude > bound
    tied = np.flatnonzero(magnitude == bound)
    keep[tied[: count - np.count_nonzero(keep)]] = True
    return chosen[keep]


def _bound(values: FloatVector, count: int) -> np.float32:
    """Return a magnitude, above 0, that slightly more than `count` values mostly reach.

    It comes from a sample, so that only those beyond it have to be ordered.
    """
    sample = np.abs(values[:: values.size // _SAMPLE + 1])
    reach = math.ceil(1.2 * count / values.size * sample.size) + 16
    # Among many that are equal, as the zeros are of what is due to coordinates that
    # nobody voted for, finding a place takes fifteen times as long.
    sample = sample[sample > 0]
    if reach >= sample.size:
        return _LEAST
    place = sample.size - reach
    return np.maximum(np.partition(sample, place)[place], _LEAST)


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
    chosen = np.zeros(values.size, np.bool_)
    for span, _ in layers:
        part = values[span]
        chosen[span][largest(part, share(keep, part.size))] = True
    return chosen
