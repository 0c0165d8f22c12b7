"""Where coordinates will move next, as far as both sides can tell from where they have.

What moves is not scattered over a model: some filters, neurons and words learn while
others rest, and so do some of their inputs. So of each tensor, as a matrix of rows (its
first dimension) and columns (all others), it is counted how often each row and each
column has moved. If the two had nothing to do with each other, a coordinate would move
as often as the product says, as in a table of contingency: by these expected counts
coordinates are divided into classes, and in each of them positions are coded by the
share that it turns out to have.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gwpf_baseline.exchange.coding import MOST, Classes, WireError
from gwpf_baseline.learning.flat_model import Layer

# Expected counts are classed by powers of two, from up to a sixteenth of the mean to
# eight times and more.
_LOWEST, _HIGHEST = -4, 4
#: How many classes there are.
CLASSES = _HIGHEST - _LOWEST + 1


# Coordinates that are classed at a time.
_BLOCK = 2**15


class _Tables(NamedTuple):
    """Where a model's tensors stand as matrices, and their counts.

    Parameters
    ----------
    coordinates : numpy.ndarray
        int64 ``(t + 1,)``, where each begins in the flat vector, and the end.
    columns : numpy.ndarray
        int64 ``(t,)``, how many each has.
    counts : numpy.ndarray
        int64 ``(2 t + 1,)``, where the counts of the first one's rows begin, those of
        its columns, those of the second one's rows, and so on, and the end.
    """

    coordinates: np.ndarray
    columns: np.ndarray
    counts: np.ndarray


class Activity:
    """How often each row and each column of a model's tensors has moved.

    All of it is computed in whole numbers, or by single products and quotients of them,
    so that every machine comes to the same classes.

    Parameters
    ----------
    layers : list of Layer
        Where the model's tensors stand in the flat vector.
    counts : numpy.ndarray, optional
        int32 ``(m,)``, what :attr:`counts` was; default: nothing has moved.

    Attributes
    ----------
    counts : numpy.ndarray
        int32 ``(m,)``, tensor by tensor how often its rows and then its columns have
        moved, up to `MOST`. It is never changed in place.

    Raises
    ------
    WireError
        The counts are not of this model, or below 0.
    """

    def __init__(self, layers: list[Layer], counts: np.ndarray | None = None) -> None:
        self._shapes = tuple(shape for _, shape in layers)
        size = int(_tables(self._shapes).counts[-1])
        self.counts = np.zeros(size, np.int32) if counts is None else counts
        if self.counts.shape != (size,) or self.counts.min() < 0:
            raise WireError(f"no {size} counts of what has moved")

    @property
    def classes(self) -> Classes:
        """Return the classes of coordinates that are expected to move alike."""
        return _classes(self._shapes, self.counts.tobytes())

    def note(self, positions: np.ndarray) -> None:
        """Count what has moved.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(k,)``, the coordinates, rising.
        """
        tables = _tables(self._shapes)
        moved = np.diff(positions.searchsorted(tables.coordinates))
        rows, columns = np.divmod(
            positions - tables.coordinates[:-1].repeat(moved),
            tables.columns.repeat(moved),
        )
        rows += tables.counts[:-1:2].repeat(moved)
        columns += tables.counts[1::2].repeat(moved)
        counts = self.counts.astype(np.int64)
        for places in (rows, columns):
            counts += np.bincount(places, minlength=counts.size)
        self.counts = np.minimum(counts, MOST).astype(np.int32)


# Those before a step and after it: all clients of a process use both in turn, and one
# that is alone answers by what its next message is coded by.
@lru_cache(maxsize=2)
def _classes(shapes: tuple[tuple[int, ...], ...], counts: bytes) -> Classes:
    """Return the classes by the counts of int32 that these bytes are."""
    kinds = _kinds(_tables(shapes), np.frombuffer(counts, np.int32))
    return Classes.of(kinds, CLASSES)


def _kinds(tables: _Tables, moved: np.ndarray) -> np.ndarray:
    # Each row and column has moved once before the first time: so nothing is ruled
    # out, and coordinates of small tensors, which do move more, come first.
    counts = moved.astype(np.float64) + 1
    parts = np.split(counts, tables.counts[1:-1])
    # The mean of all expected counts: a table's add up to its columns' counts.
    total = sum(columns.sum() for columns in parts[1::2])
    kinds = np.empty(tables.coordinates[-1], np.uint8)
    mean = total / kinds.size
    spans = np.split(kinds, tables.coordinates[1:-1])
    for rows, columns, span in zip(parts[::2], parts[1::2], spans, strict=True):
        rates = (rows / (rows.sum() * mean)).astype(np.float32)
        columns = columns.astype(np.float32)
        matrix = span.reshape(rows.size, columns.size)
        # Some rows at a time, which fit the cache.
        height = _BLOCK // columns.size + 1
        for first in range(0, rows.size, height):
            block = slice(first, first + height)
            expected = np.outer(rates[block], columns)
            powers = np.frexp(expected)[1]
            matrix[block] = powers.clip(_LOWEST, _HIGHEST) - _LOWEST
    return kinds


@lru_cache(maxsize=2)
def _tables(shapes: tuple[tuple[int, ...], ...]) -> _Tables:
    sizes = [math.prod(shape) for shape in shapes]
    rows = np.array([shape[0] if shape else 1 for shape in shapes])
    columns = sizes // rows
    counts = np.stack([rows, columns], axis=1).ravel()
    return _Tables(np.cumsum([0, *sizes]), columns, np.cumsum([0, *counts]))
