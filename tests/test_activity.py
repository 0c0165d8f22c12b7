"""Tests of what is known of where a model moves: against a slow, obvious reference."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gwpf_baseline.exchange.coding import MOST, Classes, WireError, encode_positions
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.methods.shared.activity import CLASSES, Activity


def layers_of(*shapes: tuple[int, ...]) -> list[Layer]:
    """Lay tensors out one after the other."""
    found, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        found.append(Layer(slice(start, stop), shape))
        start = stop
    return found


SHAPES: list[tuple[int, ...]] = [(3, 2, 2, 2), (3,), (), (5, 7), (9, 4), (1, 4), (6, 1)]
LAYERS = layers_of(*SHAPES)
DIMENSION = LAYERS[-1].span.stop


def slow_kinds(moved: list[list[int]]) -> list[set[int]]:
    """Class coordinates by their expected counts, one by one.

    What is a power of two of the mean but for rounding may be on either side of it.
    """
    expected = []
    for span, shape in LAYERS:
        rows = shape[0] if shape else 1
        width = (span.stop - span.start) // rows
        by_row = [1] * rows
        by_column = [1] * width
        for step in moved:
            for place in step:
                if span.start <= place < span.stop:
                    by_row[(place - span.start) // width] += 1
                    by_column[(place - span.start) % width] += 1
        expected += [r * c / sum(by_row) for r in by_row for c in by_column]
    mean = sum(expected) / len(expected)
    return [
        {min(max(math.frexp(e / mean * k)[1], -4), 4) + 4 for k in (1 - 1e-6, 1 + 1e-6)}
        for e in expected
    ]


def kinds_of(classes: Classes) -> np.ndarray:
    """Return the class of each coordinate."""
    kinds = np.full(sum(classes.sizes), -1)
    ends = np.cumsum(classes.sizes)
    for kind, ranks in enumerate(np.split(np.arange(kinds.size), ends[:-1])):
        kinds[classes.places(ranks)] = kind
    return kinds


@given(st.lists(st.sets(st.integers(0, DIMENSION - 1)), max_size=12))
def test_classes_are_powers_of_two_of_expected_counts(moved: list[set[int]]) -> None:
    """Of a convolution, a bias, a single number, matrices, a row and a column."""
    activity = Activity(LAYERS)
    steps = [sorted(step) for step in moved]
    for step in steps:
        activity.note(np.array(step, np.int64))
    kinds = kinds_of(activity.classes)
    reference = slow_kinds(steps)
    assert len(kinds) == len(reference)
    assert all(kind in allowed for kind, allowed in zip(kinds, reference, strict=True))
    assert len(activity.classes.sizes) == CLASSES
    again = Activity(LAYERS, activity.counts)
    assert_array_equal(kinds_of(again.classes), kinds)


@given(
    st.lists(st.sets(st.integers(0, DIMENSION - 1)), max_size=12),
    st.sets(st.integers(0, DIMENSION - 1)),
)
def test_each_coordinate_has_a_rank_of_its_own(
    moved: list[set[int]], some: set[int]
) -> None:
    """Those of one class follow those of the one before, and ranks lead back."""
    activity = Activity(LAYERS)
    for step in moved:
        activity.note(np.array(sorted(step), np.int64))
    classes = activity.classes
    everywhere = np.arange(DIMENSION)
    assert_array_equal(classes.ranks(everywhere), everywhere)
    assert_array_equal(classes.places(everywhere), everywhere)
    positions = np.array(sorted(some), np.int64)
    ranks = classes.ranks(positions)
    one_by_one = [classes.ranks(positions[i : i + 1]) for i in range(positions.size)]
    assert_array_equal(ranks, np.sort(np.concatenate([*one_by_one, ranks[:0]])))
    assert ranks.dtype == np.int32
    back = classes.places(ranks)
    assert_array_equal(back, positions)
    assert back.dtype == np.int64


def test_every_row_and_column_is_counted() -> None:
    """Tensor by tensor, first the rows and then the columns."""
    activity = Activity(layers_of((2, 3), (2,)))
    before = activity.counts
    activity.note(np.array([0, 2, 5, 7]))
    activity.note(np.array([2]))
    assert activity.counts.tolist() == [3, 1, 1, 0, 3, 0, 1, 1]
    assert before.tolist() == [0] * 8


def test_where_rows_and_columns_move_is_cheaper_to_tell() -> None:
    """Half of the bytes, if it is mostly a tenth of both."""
    rows, columns = 120, 400
    rng = np.random.default_rng(0)
    common = np.outer(np.arange(rows) < rows / 10, np.arange(columns) < columns / 10)
    shares = 0.001 + 0.5 * common.ravel()
    activity = Activity(layers_of((rows, columns)))
    for _ in range(20):
        step = np.flatnonzero(rng.random(shares.size) < shares)
        size = len(encode_positions(step, shares.size, activity.classes))
        plain = len(encode_positions(step, shares.size))
        activity.note(step)
    assert size < 0.55 * plain


def test_counts_end_where_numbers_do() -> None:
    """They stay there, on both sides."""
    activity = Activity(layers_of((1, 2)), np.array([MOST, MOST - 1, 0], np.int32))
    activity.note(np.array([0, 1]))
    assert activity.counts.tolist() == [MOST, MOST, 1]


@pytest.mark.parametrize("counts", [[1, 2], [1, 2, 3, 4], [1, -1, 2], [[1, 2, 3]]])
def test_counts_of_another_model_are_refused(counts: list[int]) -> None:
    """Or such as cannot be."""
    with pytest.raises(WireError, match="no 3 counts"):
        Activity(layers_of((1, 2)), np.array(counts, np.int32))
