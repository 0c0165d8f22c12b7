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
# Above all counts.
_ABOVE = MOST + 2
#: How many classes there are.
CLASSES = _BOUNDS.size + 1


class _Tables(NamedTuple):
    """Where a model's tensors stand as matrices, and their counts.

    Counts are in one vector: tensor by tensor those of its rows and then those of its
    columns. The shorter side of each tensor cuts it into lines, the longer one is along
    these.

    Parameters
    ----------
    dimension : int
        d.
    counts : int
        m, how many counts there are.
    rows : numpy.ndarray
        int64 ``(r,)``, where each row begins in the flat vector.
    row_counts, column_counts : numpy.ndarray
        int64 ``(r,)``, where the count of each row is, and where those of its columns
        begin.
    sides : numpy.ndarray
        int64 ``(2 t,)``, where the counts of each side of each tensor begin.
    lines, along : numpy.ndarray
        int64 ``(l,)`` and ``(n,)``, where the counts of lines are, and of what is along
        them.
    line_tensors, along_tensors : numpy.ndarray
        int64 ``(l,)`` and ``(n,)``, the numbers of the tensors that these are of.
    starts, steps : numpy.ndarray
        int64 ``(l,)`` and ``(n,)``, where each line begins in the flat vector, and how
        far from there what is along it.
    firsts : numpy.ndarray
        int64 ``(t + 1,)``, where each tensor's part of `along` begins, and the end.
    """

    dimension: int
    counts: int
    rows: np.ndarray
    row_counts: np.ndarray
    column_counts: np.ndarray
    sides: np.ndarray
    lines: np.ndarray
    along: np.ndarray
    line_tensors: np.ndarray
    along_tensors: np.ndarray
    starts: np.ndarray
    steps: np.ndarray
    firsts: np.ndarray

    def counted(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
        size = _tables(self._shapes).counts
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
        here, columns = tables.counted(positions)
        counts = np.bincount(columns, minlength=self.counts.size)
        counts[tables.row_counts] = here
        counts += self.counts
        self.counts = np.minimum(counts, MOST).astype(np.int32)


class _Division(NamedTuple):
    """The coordinates of a model, divided into classes; see :class:`Classes`.

    Along each line, coordinates stand in the order in which the other side has moved:
    there, what a line has of a class is one span. There are s of these.

    Parameters
    ----------
    tables : _Tables
        Where the tensors stand.
    sizes : list of int
        How many coordinates each class has.
    lined : numpy.ndarray
        int32 ``(m,)``, what each row and column adds to where a coordinate stands when
        one line follows the other.
    by_line, to_class : numpy.ndarray
        int32 ``(s,)``, where each span begins then, and how much further it does when
        one class follows the other.
    by_class, to_step : numpy.ndarray
        int32 ``(s,)``, where each begins when one class follows the other, and how much
        further it does in `steps`.
    starts : numpy.ndarray
        int32 ``(s,)``, where the lines of the same spans begin in the flat vector.
    steps : numpy.ndarray
        int32 ``(n,)``, how far from there what is along them is, in its order.
    """

    tables: _Tables
    sizes: list[int]
    lined: np.ndarray
    by_line: np.ndarray
    to_class: np.ndarray
    by_class: np.ndarray
    to_step: np.ndarray
    starts: np.ndarray
    steps: np.ndarray

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """Return where places stand when one class follows the other."""
        here, columns = self.tables.counted(places)
        ranks = self.lined[columns]
        ranks += self.lined[self.tables.row_counts].repeat(here)
        ranks.sort()
        ranks += self.to_class.repeat(_count_within(self.by_line, ranks))
        ranks.sort()
        return ranks

    def places(self, ranks: np.ndarray) -> np.ndarray:
        """Undo :meth:`ranks`."""
        here = _count_within(self.by_class, ranks)
        places = self.steps[ranks + self.to_step.repeat(here)]
        places += self.starts.repeat(here)
        places.sort()
        return places.astype(np.int64)


# Those before a step and after it: all clients of a process use both in turn, and one
# that is alone answers by what its next message is coded by.
@lru_cache(maxsize=2)
def _divided(shapes: tuple[tuple[int, ...], ...], counts: bytes) -> _Division:
    """Return the classes by the counts of int32 that these bytes are."""
    tables = _tables(shapes)
    # Each row and column has moved once before the first time: so nothing is ruled
    # out, and coordinates of small tensors, which do move more, come first.
    moved = np.frombuffer(counts, np.int32).astype(np.int64) + 1
    sums = np.add.reduceat(moved, tables.sides)
    # The mean of all expected counts: a table's add up to its columns' counts.
    mean = sums[1::2].sum() / tables.dimension
    # How often what is along a line has to have moved, for each class but the first.
    rates = (sums[::2] * mean)[tables.line_tensors] / moved[tables.lines]
    least = np.ceil(_BOUNDS * rates[:, np.newaxis]).clip(max=_ABOVE).astype(np.int64)
    # All tensors are put in order, and sought in, at once.
    keys = _ABOVE * tables.along_tensors + moved[tables.along]
    order = keys.argsort(kind="stable")
    sought = least + _ABOVE * tables.line_tensors[:, np.newaxis]
    begins, ends = tables.firsts[:-1], tables.firsts[1:]
    in_order = np.column_stack(
        [begins[tables.line_tensors], keys[order].searchsorted(sought)]
    )
    lengths = np.diff(in_order, append=ends[tables.line_tensors, np.newaxis])
    by_line, by_class = _begins(lengths), _begins(lengths.T).T
    lined = np.empty(tables.counts, np.int32)
    lined[tables.lines] = by_line[:, 0]
    lined[tables.along[order]] = np.arange(order.size) - begins[tables.along_tensors]
    starts = np.broadcast_to(tables.starts[:, np.newaxis], lengths.shape)
    # Not all lines have something of all classes.
    some = lengths > 0
    spans = (
        by_line[some],
        (by_class - by_line)[some],
        by_class.T[some.T],
        (in_order - by_class).T[some.T],
        starts.T[some.T],
        tables.steps[order],
    )
    return _Division(
        tables,
        lengths.sum(axis=0).tolist(),
        lined,
        *(array.astype(np.int32) for array in spans),
    )


@lru_cache(maxsize=2)
def _tables(shapes: tuple[tuple[int, ...], ...]) -> _Tables:
    heights = np.array([shape[0] if shape else 1 for shape in shapes])
    widths = np.array([math.prod(shape[1:]) for shape in shapes])
    begins = _begins(heights * widths)
    # Of each tensor its rows and its columns: how many, how far apart, counted where.
    lengths = np.stack([heights, widths], axis=1)
    apart = np.stack([widths, np.ones_like(widths)], axis=1)
    sides = _begins(lengths)
    tensors = np.arange(heights.size)

    def laid_out(side: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tensors of what is on a side, its counts, and how far it is."""
        each = lengths[tensors, side]
        of = tensors.repeat(each)
        number = np.arange(of.size) - _begins(each)[of]
        return of, sides[of, side[of]] + number, apart[of, side[of]] * number

    # Columns where they are fewer than rows.
    shorter = (widths < heights).astype(np.intp)
    row_tensors, row_counts, row_steps = laid_out(np.zeros_like(shorter))
    line_tensors, lines, line_steps = laid_out(shorter)
    along_tensors, along, steps = laid_out(1 - shorter)
    return _Tables(
        int((heights * widths).sum()),
        int(lengths.sum()),
        begins[row_tensors] + row_steps,
        row_counts,
        sides[row_tensors, 1],
        sides.ravel(),
        lines,
        along,
        line_tensors,
        along_tensors,
        begins[line_tensors] + line_steps,
        steps,
        along_tensors.searchsorted(np.arange(tensors.size + 1)),
    )


def _begins(lengths: np.ndarray) -> np.ndarray:
    """Return where spans of some lengths begin, one after the other."""
    return (lengths.cumsum() - lengths.ravel()).reshape(lengths.shape)


def _count_within(firsts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Count how many places, which rise, are in each of the spans that begin there."""
    bounds = np.empty(firsts.size + 1, np.intp)
    bounds[:-1] = places.searchsorted(firsts)
    bounds[-1] = places.size
    return bounds[1:] - bounds[:-1]
