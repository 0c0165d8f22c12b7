"""Tests of what a client keeps: its own, and copied no more often than it changes."""

import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors.torch import save_file

from gwpf_baseline.learning.state import ClientState, InMemory, OnDisk, StateStore
from gwpf_baseline.records.checkpoint import save_state
from gwpf_baseline.utils import ConfigError

DIMENSION = 6
COUNTERS = {"version": 0, "uploaded": 0, "cursor": 0, "client": 3}


def on_disk(folder: Path, client: int = 3) -> OnDisk:
    """Return where a client keeps its state."""
    return OnDisk(folder, client, DIMENSION)


@pytest.fixture(name="store", params=["in memory", "on disk", "moved"])
def _store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    """Return each place that a client's state can be in."""
    if request.param == "on disk":
        return on_disk(tmp_path)
    return Moved() if request.param == "moved" else InMemory()


class Moved(InMemory):
    """What goes to another worker after each message."""

    def save(self, state: ClientState) -> None:
        """Keep what arrives there."""
        super().save(pickle.loads(pickle.dumps(state)))


def loaded(store: StateStore) -> ClientState:
    """Read what is kept."""
    state = store.load()
    assert state is not None
    return state


def test_what_is_saved_is_loaded(store: StateStore) -> None:
    """Arrays of any type and shape, and the counters."""
    arrays: dict[str, np.ndarray] = {
        "residual": np.arange(6, dtype=np.float32),
        "sent": np.packbits(np.arange(6) % 2 == 0),
        "moment.step": np.array(7.0, np.float32),
        "schedule.period": np.ones((2, 3), np.uint16),
        # What a method of somebody else's keeps.
        "velocity": np.ones((5, 3)),
    }
    assert store.load() is None
    store.save(ClientState(3, 2, 50, arrays))
    state = loaded(store)
    assert (state.version, state.uploaded, state.cursor) == (3, 2, 50)
    assert state.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert state.arrays[name].dtype == array.dtype
        assert_array_equal(state.arrays[name], array)


def test_what_is_loaded_is_kept_until_another_is_saved(store: StateStore) -> None:
    """Whatever becomes of it: a message may be followed half the way."""
    arrays = {name: np.zeros(6, np.float32) for name in ("weights", "residual")}
    store.save(ClientState(arrays=arrays))
    state = loaded(store)
    state.version = 4
    state.own("residual")[1] = 5
    assert state.own("residual") is state.arrays["residual"]
    state.arrays["left_out"] = np.full(2, 9, np.float32)
    del state.arrays["weights"]
    before = loaded(store)
    assert before.version == 0 and before.arrays.keys() == arrays.keys()
    assert_array_equal(before.arrays["residual"], np.zeros(6))

    store.save(state)
    again = loaded(store)
    assert again.version == 4
    assert again.arrays.keys() == {"residual", "left_out"}
    assert_array_equal(again.arrays["residual"], [0, 5, 0, 0, 0, 0])


def test_in_memory_only_what_changes_is_copied() -> None:
    """And nobody can change what is kept unseen."""
    store = InMemory()
    weights, residual = np.ones(4, np.float32), np.zeros(4, np.float32)
    store.save(ClientState(arrays={"weights": weights, "residual": residual}))
    state = loaded(store)
    with pytest.raises(ValueError, match="read-only"):
        state.arrays["weights"] += 1
    assert state.own("residual") is not residual
    store.save(state)
    assert loaded(store).arrays["weights"] is weights


def test_a_process_that_starts_again_finds_the_state(tmp_path: Path) -> None:
    """As each message to a SuperNode starts one; nothing else is left behind."""
    on_disk(tmp_path).save(ClientState(version=7))
    on_disk(tmp_path).save(ClientState(version=8))
    assert loaded(on_disk(tmp_path)).version == 8
    assert len(list(tmp_path.glob("**/*.*"))) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: file.write_bytes(file.read_bytes().replace(b" 3}", b" 2}")),
        lambda file: save_file({"weights": torch.zeros(6)}, file),
        lambda file: save_state(file, {"weights": torch.zeros(1), **COUNTERS}),
    ],
    ids=["empty", "cut", "a folder", "another client's", "no state", "a small model's"],
)
def test_a_damaged_state_is_lost_and_named(
    spoil: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a power cut: the client begins anew."""
    store = on_disk(tmp_path)
    store.save(ClientState(arrays={"weights": np.zeros(6, np.float32)}))
    spoil(store.file)
    assert store.load() is None
    assert f"{store.file} is lost: " in caplog.text


def test_a_disk_that_is_full_is_named_and_what_is_there_stays(tmp_path: Path) -> None:
    """As a file that may not grow."""
    store = on_disk(tmp_path)
    store.save(ClientState(version=7))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="GWPF_OUTPUTS=.* must be a folder"):
            store.save(ClientState(arrays={"weights": np.zeros(6000, np.float32)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert loaded(store).version == 7
    # Nor does a try leave anything that would fill it.
    assert [file.name for file in store.file.parent.iterdir()] == [store.file.name]


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """With the variable by which to choose another."""
    (tmp_path / "state").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"GWPF_OUTPUTS={tmp_path}/state: must be a"):
        on_disk(tmp_path).save(ClientState())
