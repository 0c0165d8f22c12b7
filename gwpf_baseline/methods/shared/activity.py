"""Where coordinates will move next, as far as both sides can tell from where they have.

What moves is not scattered over a model: some filters, neurons and words learn while
others rest, and so do some of their inputs. So of each tensor, as a matrix of rows (its
first dimension) and columns (all others), it is counted how often each row and each
column has moved. If the two had nothing to do with each other, a coordinate would move
as often as the product says, as in a table of contingency: by these expected counts
coordinates are divided into classes, and in each of them positions are coded by the
share that it turns out to have.

Along a row the product rises with the column's count alone: where columns stand in the
order of theirs, what a row has of a class is one span. So spans are all that is
computed, and nothing for a single coordinate but for those that are coded.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gwpf_baseline.exchange.coding import MOST, Classes, WireError
from gwpf_baseline.learning.flat_model import Layer

# Where all classes but the first begin, in means of the expected counts.
_BOUNDS = 2.0 ** np.arange(-4, 4)
#: How many classes there are.
CLASSES = _BOUNDS.size + 1


class _Tables(NamedTuple):
    """Where a model's tensors stand as matrices, and their counts.

    Parameters
    ----------
    coordinates : numpy.ndarray
        int64 ``(t + 1,)``, where each begins in the flat vector, and the end.
    counts : numpy.ndarray
        int64 ``(2 t + 1,)``, where the counts of the first one's rows begin, those of
        its columns, those of the second one's rows, and so on, and the end.
    rows : numpy.ndarray
        int64 ``(r,)``, where each row begins in the flat vector.
    row_counts : numpy.ndarray
        int64 ``(r,)``, where each row's count is.
    column_counts : numpy.ndarray
        int64 ``(r,)``, where the counts of its tensor's columns begin.
    """

    coordinates: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    row_counts: np.ndarray
    column_counts: np.ndarray

    def sides(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's share of coordinates, and where their columns' counts are.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(k,)``, the coordinates, rising.

        Returns
        -------
        here : numpy.ndarray
            int64 ``(r,)``, how many of them are in it.
        columns : numpy.ndarray
            int64 ``(k,)``.
        """
        here = _count_within(self.rows, positions)
        return here, positions - (self.rows - self.column_counts).repeat(here)


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
        return _divided(self._shapes, self.counts.tobytes())

    def note(self, positions: np.ndarray) -> None:
        """Count what has moved.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(k,)``, the coordinates, rising.
        """
        tables = _tables(self._shapes)
        here, columns = tables.sides(positions)
        counts = np.bincount(columns, minlength=self.counts.size)
        counts[tables.row_counts] = here
        counts += self.counts
        self.counts = np.minimum(counts, MOST).astype(np.int32)


class _Division(NamedTuple):
    """The coordinates of a model, divided into classes; see :class:`Classes`.

    Each tensor's shorter side cuts it into lines, and along them coordinates stand in
    the order in which the longer side has moved: there, a line is one span of each
    class. Spans begin at three places: line by line, class by class, and in `along`.

    Parameters
    ----------
    tables : _Tables
        Where the tensors stand.
    sizes : list of int
        How many coordinates each class has.
    lined : numpy.ndarray
        int32 ``(m,)``, what each row and column adds to a coordinate's place line by
        line.
    by_line, by_class, in_along : numpy.ndarray
        int32 ``(l, c)``, where each line's span of each class begins.
    lines : numpy.ndarray
        int32 ``(l,)``, the first coordinate of each line in the tensor's own order.
    along : numpy.ndarray
        int32 ``(n,)``, tensor by tensor how far from that a line's coordinates are, in
        the order in which they stand.
    """

    tables: _Tables
    sizes: list[int]
    lined: np.ndarray
    by_line: np.ndarray
    by_class: np.ndarray
    in_along: np.ndarray
    lines: np.ndarray
    along: np.ndarray

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """Return where places stand when one class follows the other."""
        here, columns = self.tables.sides(places)
        ranks = self.lined[columns]
        ranks += self.lined[self.tables.row_counts].repeat(here)
        ranks.sort()
        here = _count_within(self.by_line.ravel(), ranks)
        ranks += (self.by_class - self.by_line).ravel().repeat(here)
        ranks.sort()
        return ranks

    def places(self, ranks: np.ndarray) -> np.ndarray:
        """Undo :meth:`ranks`."""
        here = _count_within(self.by_class.T.ravel(), ranks)
        index = ranks + (self.in_along - self.by_class).T.ravel().repeat(here)
        places = self.along[index]
        places += np.tile(self.lines, CLASSES).repeat(here)
        places.sort()
        return places.astype(np.int64)


# Those before a step and after it: all clients of a process use both in turn, and one
# that is alone answers by what its next message is coded by.
@lru_cache(maxsize=2)
def _divided(shapes: tuple[tuple[int, ...], ...], counts: bytes) -> _Division:
    """Return the classes by the counts of int32 that these bytes are."""
    return _divide(_tables(shapes), np.frombuffer(counts, np.int32))


def _divide(tables: _Tables, moved: np.ndarray) -> _Division:
    # Each row and column has moved once before the first time: so nothing is ruled
    # out, and coordinates of small tensors, which do move more, come first.
    counts = np.split(moved.astype(np.float64) + 1, tables.counts[1:-1])
    # The mean of all expected counts: a table's add up to its columns' counts.
    mean = sum(columns.sum() for columns in counts[1::2]) / tables.coordinates[-1]
    lined, by_line, lengths, in_along, lines, along = [], [], [], [], [], []
    passed = 0
    for first, rows, columns in zip(
        tables.coordinates[:-1], counts[::2], counts[1::2], strict=True
    ):
        rows_cut = rows.size <= columns.size
        cut, other = (rows, columns) if rows_cut else (columns, rows)
        step, other_step = (columns.size, 1) if rows_cut else (1, columns.size)
        order = np.argsort(other, kind="stable")
        # What the other side must have moved for each class, line by line: a product of
        # counts over the rows' sum is what is expected.
        bounds = _BOUNDS * (rows.sum() * mean) / cut[:, np.newaxis]
        begins = np.zeros((cut.size, CLASSES), np.int64)
        begins[:, 1:] = other[order].searchsorted(bounds)
        firsts = first + order.size * np.arange(cut.size)
        places = np.argsort(order)
        lined += [firsts, places] if rows_cut else [places, firsts]
        by_line.append(firsts[:, np.newaxis] + begins)
        lengths.append(np.diff(begins, append=order.size))
        in_along.append(passed + begins)
        lines.append(first + step * np.arange(cut.size))
        along.append(other_step * order)
        passed += order.size
    sizes = np.concatenate(lengths).T
    by_class = (sizes.cumsum() - sizes.ravel()).reshape(sizes.shape).T
    return _Division(
        tables,
        sizes.sum(axis=1).tolist(),
        np.concatenate(lined, dtype=np.int32),
        np.concatenate(by_line, dtype=np.int32),
        by_class.astype(np.int32),
        np.concatenate(in_along, dtype=np.int32),
        np.concatenate(lines, dtype=np.int32),
        np.concatenate(along, dtype=np.int32),
    )


@lru_cache(maxsize=2)
def _tables(shapes: tuple[tuple[int, ...], ...]) -> _Tables:
    heights = np.array([shape[0] if shape else 1 for shape in shapes])
    widths = np.array([math.prod(shape[1:]) for shape in shapes])
    coordinates = np.cumsum([0, *heights * widths])
    counts = np.cumsum([0, *np.stack([heights, widths], axis=1).ravel()])
    # Rows are numbered through the model; its tensors' first ones among all are these.
    firsts = heights.cumsum() - heights
    within = np.arange(heights.sum()) - firsts.repeat(heights)
    return _Tables(
        coordinates,
        counts,
        coordinates[:-1].repeat(heights) + widths.repeat(heights) * within,
        counts[:-1:2].repeat(heights) + within,
        counts[1::2].repeat(heights),
    )


def _count_within(firsts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Count how many places, which rise, are in each of the spans that begin there."""
    return np.diff(places.searchsorted(firsts), append=places.size)
