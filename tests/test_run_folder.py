"""What a run finds in its folder, and what it leaves there."""

import fcntl
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.server import Server, ServerConfig
from rich.console import Console

from gwpf_baseline.config import checked, compose_config, resumed
from gwpf_baseline.main import run_experiment
from gwpf_baseline.records.checkpoint import CheckpointFolder, checkpoint_name
from gwpf_baseline.records.history import read_history
from gwpf_baseline.records.layers import read_layers
from gwpf_baseline.server_app import run_server
from gwpf_baseline.utils import ConfigError

BRIEF = ["backend=local", "num_clients=3", "local_steps=1", "batch_size=10"]


def played(folder: Path, *overrides: str) -> None:
    """Play a run in this process."""
    cfg = checked(compose_config([*BRIEF, *overrides]))
    run_experiment(cfg, folder, Console(file=io.StringIO()))


def contents(folder: Path) -> dict[Path, bytes]:
    """Return the bytes of all files."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_is_taken_over_whole(tmp_path: Path) -> None:
    """Nothing that another run has left is taken for this one's; the rest stays."""
    every = ("layers_every=1", "checkpoint_every=1")
    played(tmp_path, "num_rounds=2", "method=fedpm", *every)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert (tmp_path / "network.mask").is_file() and read_layers(
        tmp_path / "layers.csv"
    )
    played(tmp_path, "num_rounds=1")
    for gone in ("network.mask", "layers.csv"):
        assert not (tmp_path / gone).exists()
    assert CheckpointFolder(tmp_path).rounds() == []
    assert len(read_history(tmp_path)) == 1
    assert (tmp_path / "notes.txt").is_file()


def test_a_run_that_is_stopped_in_its_first_round_leaves_no_other_ones_rounds(
    tmp_path: Path,
) -> None:
    """They would stand beside its configuration."""
    played(tmp_path, "num_rounds=1")

    def stopped(server: Server, config: ServerConfig) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cfg = checked(compose_config([*BRIEF, "num_rounds=2"]))
        run_server(cfg, stopped, tmp_path, Console(file=io.StringIO()))
    assert read_history(tmp_path) == []
    assert not (tmp_path / "summary.json").exists()


def test_a_run_that_cannot_begin_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """Also if only the method finds what is wrong; a new folder is then no run's."""
    played(tmp_path / "done", "num_rounds=1")
    before = contents(tmp_path)
    for folder in ("done", "new"):
        with pytest.raises(ConfigError, match="weighting"):
            played(tmp_path / folder, "method=fedpm", "weighting=examples")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("end", [["num_rounds=3"], ["num_rounds=6", "stop_at=0.03"]])
def test_a_run_that_was_killed_at_its_end_can_be_finished(
    tmp_path: Path, end: list[str]
) -> None:
    """After the last checkpoint, before the last file; no round is played again."""
    played(tmp_path, "checkpoint_every=1", *end)
    rounds = read_history(tmp_path)
    assert len(rounds) < 6
    model, summary = tmp_path / "model.safetensors", tmp_path / "summary.json"
    before = model.read_bytes(), summary.read_bytes()
    model.unlink()
    summary.unlink()
    played(tmp_path, "checkpoint_every=1", *end, f"resume={tmp_path}")
    assert read_history(tmp_path) == rounds
    assert (model.read_bytes(), summary.read_bytes()) == before


def test_two_runs_at_once_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """The second one is refused, and may have the folder once the first has ended."""
    played(tmp_path, "num_rounds=1")
    before = contents(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="one that no other run writes to"):
        played(tmp_path, "num_rounds=2")
    assert contents(tmp_path) == before
    os.close(descriptor)
    played(tmp_path, "num_rounds=2")
    assert len(read_history(tmp_path)) == 2


def test_a_run_that_has_reached_its_target_has_nothing_to_resume(
    tmp_path: Path,
) -> None:
    """Unless that is another one."""
    played(tmp_path, "checkpoint_every=1", "num_rounds=6", "stop_at=0.03")
    done = len(read_history(tmp_path))
    with pytest.raises(ConfigError, match="stop_at=0.03: must be null, or a target"):
        played(tmp_path, "num_rounds=6", "stop_at=0.03", f"resume={tmp_path}")
    played(tmp_path, f"num_rounds={done + 1}", f"resume={tmp_path}")
    assert len(read_history(tmp_path)) == done + 1


def test_a_run_that_is_whole_has_nothing_to_resume(tmp_path: Path) -> None:
    """Unless it is to be longer."""
    played(tmp_path, "checkpoint_every=1", "num_rounds=2")
    with pytest.raises(ConfigError, match="more than the 2 rounds done"):
        played(tmp_path, "num_rounds=2", f"resume={tmp_path}")
    played(tmp_path, "num_rounds=3", f"resume={tmp_path}")
    assert len(read_history(tmp_path)) == 3


def test_what_is_no_checkpoint_is_let_alone(tmp_path: Path) -> None:
    """As a copy of one that somebody has put beside it."""
    played(tmp_path, "checkpoint_every=1", "num_rounds=1")
    folder = CheckpointFolder(tmp_path)
    checkpoint = folder.path / folder.latest()
    copy = checkpoint.with_name(f"{checkpoint.name}.bak")
    shutil.copytree(checkpoint, copy)
    played(tmp_path, "checkpoint_every=1", "num_rounds=2", f"resume={tmp_path}")
    assert folder.rounds() == [2] and copy.is_dir()


def test_a_checkpoint_that_never_was_whole_is_none_and_goes_with_the_next(
    tmp_path: Path,
) -> None:
    """Its parts are of another try at its round."""
    played(tmp_path, "checkpoint_every=2", "num_rounds=2")
    folder = CheckpointFolder(tmp_path)
    stale = checkpoint_name(4, np.zeros(1, np.float32))
    shutil.copytree(folder.path / folder.latest(), folder.path / stale)
    (folder.path / stale / "server.safetensors").unlink()
    played(tmp_path, "checkpoint_every=2", "num_rounds=4", f"resume={tmp_path}")
    assert folder.rounds() == [4] and folder.latest() != stale
    assert not (folder.path / stale).exists()


def test_another_experiment_is_no_run_to_resume(tmp_path: Path) -> None:
    """The same one may be repeated, as any override may."""
    experiment = "experiment=fedpm_mnist-small"
    played(tmp_path, "checkpoint_every=1", "num_rounds=1")
    cfg = compose_config([experiment, f"resume={tmp_path}"])
    with pytest.raises(ConfigError, match="as in the run to resume"):
        resumed(cfg, [experiment, f"resume={tmp_path}"])
    again = compose_config([*BRIEF, f"resume={tmp_path}", "num_rounds=2"])
    assert resumed(again, [*BRIEF, "num_rounds=2"]).num_rounds == 2
