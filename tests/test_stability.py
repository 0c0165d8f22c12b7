"""Tests of the effective perturbation, against a slow and obvious reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from gwpf_baseline.coordinates import cache_blocks
from gwpf_baseline.methods.shared.stability import TIGHTEN_SHARE, Stability, is_stable

COARSE_VALUE = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])
COARSE = hnp.arrays(
    np.float32, st.integers(0, 40), elements=st.sampled_from([0.0, -0.0, 0.25, -0.5, 1])
)


@given(COARSE, st.data(), st.sampled_from([0.1, 0.25, 0.5, 1.0]))
def test_stable_is_a_small_effective_update(
    ema: np.ndarray, data: st.DataObject, threshold: float
) -> None:
    """Strictly below the threshold, or no update at all: 0 / 0 is stable."""
    ema_abs = data.draw(hnp.arrays(np.float32, ema.shape, elements=COARSE_VALUE))
    expected = [
        a == 0 or abs(e) / a < threshold for e, a in zip(ema, ema_abs, strict=True)
    ]
    stable = is_stable(ema, ema_abs, threshold)
    assert stable.dtype == np.bool_ and stable.tolist() == expected


def test_averages_move_where_they_are_told_to() -> None:
    """E and A of each coordinate, by their definition; the others stay."""
    rng = np.random.default_rng(0)
    stability = Stability(50, ema=0.75, threshold=0.3)
    ema, ema_abs = np.zeros(50), np.zeros(50)
    for _ in range(40):
        index = np.flatnonzero(rng.random(50) < 0.6)
        update = rng.normal(0.1, 1, index.size).astype(np.float32)
        stable = stability.observe(index, update)
        for j, value in zip(index, update, strict=True):
            ema[j] = 0.75 * ema[j] + 0.25 * value
            ema_abs[j] = 0.75 * ema_abs[j] + 0.25 * abs(value)
        assert_allclose(stability.ema, ema, rtol=1e-4, atol=1e-6)
        assert_allclose(stability.ema_abs, ema_abs, rtol=1e-5)
        clear = np.abs(np.abs(ema) / np.maximum(ema_abs, 1e-30) - 0.3) > 1e-3
        expected = np.abs(ema) / np.maximum(ema_abs, 1e-30) < 0.3
        assert_array_equal(stable[clear[index]], expected[index][clear[index]])


@given(st.lists(st.sampled_from([0.0, 0.5, TIGHTEN_SHARE, 0.81, 1.0]), max_size=30))
def test_the_threshold_is_halved_once_for_each_rise(shares: list[float]) -> None:
    """Staying above the mark does not halve again; the floor holds, and lifts none."""
    stability = Stability(1, 0.9, threshold=0.4, floor=0.06)
    low = Stability(1, 0.9, threshold=0.005, floor=0.06)
    expected, before = 0.4, 0.0
    for share in shares:
        stability.tighten(share)
        low.tighten(share)
        if before <= TIGHTEN_SHARE < share:
            expected = max(expected / 2, 0.06)
        assert stability.threshold == expected
        assert low.threshold == 0.005
        before = share


@pytest.mark.parametrize("size", [0, 1, 2**15 - 1, 2**15, 2**15 + 1, 100_000])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_blocks_are_the_coordinates_of_the_mask(size: int, density: float) -> None:
    """All of them, in order, with their places among all that are in it."""
    mask = np.random.default_rng(size).random(size) < density
    found = np.full(np.count_nonzero(mask), -1)
    for index, part in cache_blocks(mask):
        found[part] = index
    assert_array_equal(found, np.flatnonzero(mask))


def test_its_state_is_all_that_it_remembers() -> None:
    """A copy made from the state goes on alike to the bit."""
    rng = np.random.default_rng(1)
    first = Stability(20, 0.9, 0.5)
    everywhere = np.arange(20)
    first.observe(everywhere, rng.normal(size=20).astype(np.float32))
    first.tighten(0.9)
    second = Stability(20, 0.9, 0.5)
    second.load_state({name: value.copy() for name, value in first.state().items()})
    update = rng.normal(size=20).astype(np.float32)
    assert_array_equal(
        first.observe(everywhere, update), second.observe(everywhere, update)
    )
    first.tighten(0.9)
    second.tighten(0.9)
    assert first.threshold == second.threshold == 0.25
    assert_array_equal(first.ema, second.ema)
