"""Tests of what a client keeps: its own, and copied no more often than it changes."""

import numpy as np
import pytest
from flwr.common import Context, RecordDict
from numpy.testing import assert_array_equal

from gwpf_baseline.learning.state import ClientState


def kept(**arrays: np.ndarray) -> Context:
    """Return a context in which a state is kept."""
    context = Context(0, 0, {}, RecordDict(), {})
    ClientState(version=3, uploaded=2, cursor=50, arrays=arrays).save(context)
    return context


def loaded(context: Context) -> ClientState:
    """Read it again."""
    state = ClientState.load(context)
    assert state is not None
    return state


def memory(context: Context, name: str) -> object:
    """Return the very bytes of an array that a context holds."""
    return context.state.array_records["gwpf_baseline.arrays"][name].data


def test_what_is_saved_is_loaded() -> None:
    """Arrays of any type and shape, and the counters."""
    arrays: dict[str, np.ndarray] = {
        "residual": np.arange(6, dtype=np.float32),
        "sent": np.packbits(np.arange(6) % 2 == 0),
        "moment.step": np.array(7.0),
        "square": np.ones((2, 3), np.uint16),
    }
    state = loaded(kept(**arrays))
    assert (state.version, state.uploaded, state.cursor) == (3, 2, 50)
    assert state.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert state.arrays[name].dtype == array.dtype
        assert_array_equal(state.arrays[name], array)


def test_only_what_changed_is_written_again() -> None:
    """The rest stays the same bytes, and nobody can change these unseen."""
    context = kept(weights=np.ones(4), residual=np.zeros(4), old=np.ones(2))
    before = {name: memory(context, name) for name in ("weights", "residual")}
    state = loaded(context)
    with pytest.raises(ValueError, match="read-only"):
        state.arrays["weights"] += 1
    state.own("residual")[1] = 5
    assert state.own("residual") is state.arrays["residual"]
    state.arrays["new"] = np.full(2, 9.0)
    del state.arrays["old"]
    assert_array_equal(loaded(context).arrays["residual"], np.zeros(4))

    state.save(context)
    assert memory(context, "weights") is before["weights"]
    assert memory(context, "residual") is not before["residual"]
    again = loaded(context).arrays
    assert again.keys() == {"weights", "residual", "new"}
    assert_array_equal(again["residual"], [0, 5, 0, 0])
    assert_array_equal(again["new"], [9, 9])
