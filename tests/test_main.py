"""The command line: what it says where nothing, or Ray, cannot start."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from flwr.common import FitIns, FitRes
from flwr.server import Server, ServerConfig, SimpleClientManager

from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import checked, compose_config, workbench
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.state import InMemory
from gwpf_baseline.local import LocalNode, among
from gwpf_baseline.records.checkpoint import CheckpointFolder
from gwpf_baseline.server_app import make_strategy

REPOSITORY = Path(__file__).resolve().parents[1]
FULL = Path("/dev/full")  # Linux's disk without room


def only_line(
    folder: Path, code: int, variables: dict[str, str], *overrides: str
) -> str:
    """Run a command line, which must fail by a code, and return all that it says."""
    process = subprocess.run(
        [sys.executable, "-m", "gwpf_baseline.main", *overrides],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == code
    assert process.stdout == ""
    [line] = process.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=null", "method=null: must be one of apf, "),
        ("~seed", "seed=nothing: must be given"),
        ("connect_timeout=nan", "connect_timeout=nan: must be a number >= 0"),
        ("lr=" + "[" * 2000, "overrides="),
        ("hydra.run.dir=file/run", "output folder="),
        ("hydra.run.dir=used", "output folder="),
        ("hydra.run.dir=", "hydra.run.dir=: must be a folder of the run's own"),
        ("--config-name=foo", "overrides=Cannot find primary config 'foo'"),
        ("method=[gwpf,fedavg]", "method.vote_fraction=0.04: must be left out"),
        ("dataset.test_fraction=0.99999", "dataset.test_fraction=0.99999: must be"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_code_2(
    tmp_path: Path, override: str, message: str
) -> None:
    """Whoever finds it: Hydra, the check, or who loads the data; Ray never starts."""
    (tmp_path / "file").touch()
    (tmp_path / "used" / "main.log").mkdir(parents=True)
    no_ray = {"RAY_TMPDIR": str(tmp_path / "file")}
    line = only_line(tmp_path, 2, no_ray, override)
    assert line.startswith(f"error: {message}")
    assert line.isprintable()


@pytest.mark.skipif(not FULL.exists(), reason=f"there is no {FULL} here")
@pytest.mark.parametrize("file", [".hydra/config.yaml", "history.csv"])
def test_a_full_disk_is_one_line_and_names_the_folder(
    tmp_path: Path, file: str
) -> None:
    """Whether Hydra is the first to find no room, or a round's record."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).symlink_to(FULL)
    run = ["backend=local", "num_rounds=1", f"hydra.run.dir={tmp_path}"]
    line = only_line(REPOSITORY, 2, {}, *run)
    assert line == (
        f"error: output folder={tmp_path}: must be one to write to "
        "(No space left on device), by hydra.run.dir=..."
    )


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file/folder", "Not a directory"), ("long" * 25, "path length cannot exceed")],
)
def test_a_ray_that_cannot_start_is_one_line_and_code_1(
    tmp_path: Path, folder: str, reason: str
) -> None:
    """The process ends, by itself and soon: it asks no other Ray to stand in."""
    (tmp_path / "file").touch()
    somewhere = {"RAY_TMPDIR": str(tmp_path / folder), "RAY_ADDRESS": "127.0.0.1:1"}
    folder_of_run = f"hydra.run.dir={tmp_path / 'run'}"
    line = only_line(REPOSITORY, 1, somewhere, "num_rounds=1", folder_of_run)
    assert line.startswith("error: Ray could not start: ")
    assert reason in line and "RAY_TMPDIR" in line


def test_a_sweep_goes_on_after_a_job_that_cannot_be_meant(tmp_path: Path) -> None:
    """The others are run; in the end, the code tells that not all were."""
    process = subprocess.run(
        [sys.executable, "-m", "gwpf_baseline.main", "--multirun", "backend=local"]
        + ["num_rounds=1", "num_clients=2,5000,3", f"hydra.sweep.dir={tmp_path}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    [line] = process.stderr.splitlines()
    assert line.startswith("error: num_clients=5000: must be")
    whole = {file.parent.name for file in tmp_path.glob("*/summary.json")}
    assert whole == {"0", "2"}


class Interrupted(LocalNode):
    """A node whose message the user is tired of."""

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Press Ctrl-C, unless somebody has."""
        if not self.stopped:
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not self.stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        return super().fit(ins, timeout, group_id)


def test_ctrl_c_ends_a_round_whose_messages_still_wait() -> None:
    """Flower alone would have all of them answered first."""
    cfg = checked(compose_config(["num_clients=5"]))
    bench = workbench(cfg)
    built = []

    def build(partition: int, store: InMemory) -> SyncClient:
        built.append(partition)
        return make_client(cfg, partition, "", store, bench=bench)

    nodes = [Interrupted(k, partial(build, k)) for k in range(5)]
    strategy = make_strategy(cfg, bench, [])
    server = Server(client_manager=SimpleClientManager(), strategy=strategy)
    with pytest.raises(KeyboardInterrupt):
        among(nodes, 1)(server, ServerConfig(1))
    # Who they are they had been asked before.
    assert sorted(built) == [0, 1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_stops_a_run_is_told_how_it_goes_on(tmp_path: Path) -> None:
    """In one line, with the code of an interrupted process."""
    command = ["backend=local", "checkpoint_every=1", "num_rounds=10000"]
    with subprocess.Popen(
        [sys.executable, "-m", "gwpf_baseline.main", *command]
        + [f"hydra.run.dir={tmp_path}"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not CheckpointFolder(tmp_path).rounds() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()  # or this would wait for all its rounds
    assert process.returncode == 130
    [line] = told.splitlines()
    assert line.startswith(f"stopped; resume={tmp_path} goes on after round ")
