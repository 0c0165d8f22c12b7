"""Tests of saved states: whole or absent, and the newest complete one counts."""

from pathlib import Path

import pytest
import torch

from gwpf_baseline.records.checkpoint import CheckpointFolder, load_state, save_state
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
        save_state(folder.client_file(number, 0), {"cursor": number})
        if number > 8:
            # Until the server has written, the one before counts.
            assert folder.latest() == number - 1
        folder.commit(number, {"exchange": number})
        assert folder.latest() == number
        assert folder.server_state() == {"exchange": number}
        assert folder.client_state(number, 0) == {"cursor": number}
        assert len(list(folder.path.iterdir())) == 1
    assert folder.client_state(10, 1) is None


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    """A kill may leave clients' files and parts of files behind."""
    folder = CheckpointFolder(tmp_path)
    save_state(folder.client_file(2, 0), {"cursor": 2})
    folder.commit(2, {"exchange": 2})
    save_state(folder.client_file(4, 0), {"cursor": 4})
    newer = folder.client_file(4, 0).parent
    (newer / "server.123.part").write_bytes(b"half")
    (newer / "client-1.123.part").write_bytes(b"half")
    assert folder.latest() == 2
    assert folder.server_state() == {"exchange": 2}
    assert folder.client_state(2, 0) == {"cursor": 2}
    # Going on from 2, the run writes 4 again and is done with the remains.
    folder.commit(4, {"exchange": 4})
    assert folder.latest() == 4
    assert not folder.client_file(2, 0).exists()


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
