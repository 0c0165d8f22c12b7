"""Tests of saved states: whole or absent, and the newest complete one counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gwpf_baseline.records.checkpoint import (
    CheckpointFolder,
    checkpoint_name,
    is_checkpoint_name,
    load_state,
    round_of,
    save_state,
)
from gwpf_baseline.utils import ConfigError

STATE = {
    "weights": torch.arange(5.0),
    "empty": torch.zeros(0),
    "step": torch.tensor(3.0),
    "mask": torch.tensor([True, False]),
    "exchange": 7,
    "threshold": 0.1,
    "above": False,
    "clients": {"0": {"version": -1}},
    "records": [{"test_loss": None}],
}


def name_of(server_round: int, weight: float = 0.0) -> str:
    """Return the name of a checkpoint of a small model."""
    return checkpoint_name(server_round, np.full(3, weight, np.float32))


def test_a_checkpoint_is_named_by_its_round_and_its_model() -> None:
    """Whoever has a part of it can tell that it is of no other."""
    weights = np.arange(3, dtype=np.float32)
    assert checkpoint_name(20, weights) == "round-000020-30c8bc70"
    assert name_of(20) != name_of(20, 1e-30) != name_of(21, 1e-30)
    for number in (1, 20, 10**6, 10**9):
        assert is_checkpoint_name(name_of(number))
        assert round_of(name_of(number)) == number


@pytest.mark.parametrize(
    "name",
    ["round-000020", "round-000020-0000000g", "round-20-00000000", "", 20, None]
    + ["../round-000020-00000000", "round-000020-00000000/..", b"round-000020-00000000"]
    + [
        "round-000020-00000000\n",
        "round-٠٠٠٠٢٠-00000000",
        f"round-{'1' * 300}-00000000",
    ],
)
def test_no_other_name_is_a_checkpoints(name: object) -> None:
    """It comes with a message, and becomes part of a path."""
    assert not is_checkpoint_name(name)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Tensors of any type and shape, and plain values."""
    file = tmp_path / "folder" / "state.safetensors"
    save_state(file, STATE)
    state = load_state(file)
    assert state.keys() == STATE.keys()
    for key, value in STATE.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[key], value) and state[key].dtype == value.dtype
        else:
            assert state[key] == value
    assert [other.name for other in file.parent.iterdir()] == [file.name]


def test_only_the_newest_complete_checkpoint_is_kept(tmp_path: Path) -> None:
    """Clients write first; the server's file completes a checkpoint."""
    folder = CheckpointFolder(tmp_path)
    for number in (8, 9, 10):
        name = name_of(number)
        save_state(folder.client_file(name, 0), {"cursor": number})
        if number > 8:
            # Until the server has written, the one before counts.
            assert folder.latest() == name_of(number - 1)
        folder.commit(name, {"exchange": number})
        assert folder.latest() == name and folder.rounds() == [number]
        assert folder.server_state() == {"exchange": number}
        assert folder.client_state(name, 0) == {"cursor": number}
        assert len(list(folder.path.iterdir())) == 1
    assert folder.client_state(name, 1) is None
    # Of the same round in another run, or in another try.
    assert folder.client_state(name_of(10, 1.0), 0) is None


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    """A kill may leave clients' files and parts of files behind."""
    folder = CheckpointFolder(tmp_path)
    older, name = name_of(2), name_of(4)
    save_state(folder.client_file(older, 0), {"cursor": 2})
    folder.commit(older, {"exchange": 2})
    save_state(folder.client_file(name, 0), {"cursor": 4})
    newer = folder.client_file(name, 0).parent
    (newer / "server.123.part").write_bytes(b"half")
    (newer / "client-1.123.part").write_bytes(b"half")
    assert folder.latest() == older
    assert folder.server_state() == {"exchange": 2}
    assert folder.client_state(older, 0) == {"cursor": 2}
    # Going on from 2, the run comes to another model, and is done with the remains.
    again = name_of(4, 1.0)
    folder.commit(again, {"exchange": 4})
    assert folder.latest() == again
    assert [path.name for path in folder.path.iterdir()] == [again]


@pytest.mark.parametrize("damage", [b"", b"half", bytes(1000)])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    """One line for the user, not an exception of the file format."""
    file = tmp_path / "state.safetensors"
    file.write_bytes(damage)
    with pytest.raises(ConfigError, match="^resume=.*state.*a readable checkpoint"):
        load_state(file)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """At whatever byte."""
    file = tmp_path / "state.safetensors"
    save_state(file, STATE)
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="a readable checkpoint"):
            load_state(file)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    """Also one that does not exist."""
    for run in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="resume=.*checkpoint_every=N"):
            CheckpointFolder(run).latest()
