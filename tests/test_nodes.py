"""Real SuperLink and SuperNode processes, with TLS and keys: what happens to a run."""

import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import own_ports

from gwpf_baseline.records.checkpoint import CheckpointFolder

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "dev"))
# pylint: disable-next=wrong-import-position,import-error
from deployment import Deployment  # noqa: E402

CONFIG = {
    "num_clients": 3,
    "num_rounds": 2,
    "local_steps": 2,
    "batch_size": 20,
    "checkpoint_every": 1,
    "seed": 5,
}
# Seconds: a message to a node starts a process that imports PyTorch.
_PATIENCE = 600


def rows(folder: Path) -> list[dict[str, str]]:
    """Return a history but for the times in it."""
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in found]


class Run:
    """A run that was submitted to real nodes."""

    def __init__(self, nodes: Deployment, **config: object) -> None:
        self.nodes = nodes
        self.number = nodes.submit({**CONFIG, **config})
        self.folder = nodes.results(self.number)

    def rounds(self) -> int:
        """Return how many rounds have ended."""
        history = self.folder / "history.csv"
        return len(rows(self.folder)) if history.exists() else 0

    def has_checkpoint(self) -> bool:
        """Tell whether there is a whole one."""
        return bool(CheckpointFolder(self.folder).rounds())

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            late = time.monotonic() > deadline
            assert not late, f"{what} took too long\n{self.report()}"
            time.sleep(0.3)

    def play_until(self, rounds: int) -> None:
        """Wait until so many rounds have ended."""
        self.until(lambda: self.rounds() >= rounds, f"round {rounds}")

    def status(self) -> str:
        """Return what the SuperLink says of it."""
        listed = self.nodes.flwr("ls", f"--run-id={self.number}", "--format=json")
        return json.loads(listed.stdout)["runs"][0]["status"]

    def report(self) -> str:
        """Return what is known of it, for whoever asks why."""
        log = self.nodes.flwr("log", self.number, "--show").stdout
        logs = {"the server's part": log} | {
            path.stem: path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(self.nodes.folder.glob("*.log"))
        }
        ends = [f"{name}:\n{text[-4000:]}" for name, text in logs.items()]
        return "\n".join([f"{self.status()}, {self.rounds()} rounds", *ends])

    def wait(self) -> str:
        """Wait for the end and return the status."""
        status = ""

        def ended() -> bool:
            nonlocal status
            # To ask takes a core for seconds, which the nodes need.
            time.sleep(5)
            status = self.status()
            return status.startswith("finished")

        self.until(ended, "the run's end")
        return status


@pytest.fixture(name="nodes", scope="module")
def _nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Start three SuperNodes with disks of their own, and stop all at the end."""
    folder = tmp_path_factory.mktemp("nodes")
    with Deployment(folder, own_ports(), database=True) as nodes:
        nodes.start_superlink()
        for number in range(3):
            nodes.start_supernode(number, number)
        yield nodes


def test_a_run_that_lost_its_server_goes_on_to_the_same_history(
    nodes: Deployment, tmp_path: Path
) -> None:
    """The SuperLink is killed, and comes back; the run's ending is the simulation's.

    Each node has its part of the checkpoint on its own disk.
    """
    reference = tmp_path / "reference"
    command = [sys.executable, "-m", "gwpf_baseline.main", "backend=local"]
    command += [f"{key}={value}" for key, value in CONFIG.items()]
    command += [f"hydra.run.dir={reference}"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)

    first = Run(nodes)
    first.until(first.has_checkpoint, "a checkpoint")
    nodes.kill("superlink")
    nodes.start_superlink()
    # Each message starts a process on each node; another checkpoint would show nothing.
    resumed = Run(nodes, resume=str(first.folder), checkpoint_every=0)
    assert resumed.wait() == "finished:completed", resumed.report()
    assert rows(resumed.folder) == rows(reference)
    model = (resumed.folder / "model.safetensors").read_bytes()
    assert model == (reference / "model.safetensors").read_bytes()
    for number in range(3):
        checkpoints = nodes.folder / f"supernode-{number}" / "outputs"
        kept = sorted(checkpoints.glob("*/checkpoints/*/*"))
        assert {file.name for file in kept} == {f"client-{number}.safetensors"}


def test_a_run_outlives_its_nodes_and_strangers(nodes: Deployment) -> None:
    """Two are killed in mid-run: another takes over from one, one comes back.

    That has kept on its disk what its client needs. A fifth node has no partition at
    all.
    """
    nodes.start_supernode(3, 1, "rival")
    nodes.start_supernode(4, 7, "stranger")
    run = Run(nodes, num_rounds=100, round_timeout=60, checkpoint_every=0)
    run.play_until(1)
    nodes.kill("supernode-1")
    nodes.kill("supernode-2")
    # The next may be under way, and have their answers.
    begun = run.rounds() + 1

    def back() -> bool:
        # Until the SuperLink has noticed, it refuses the same key, and the node ends.
        if "supernode-2" not in nodes.processes or nodes.ended("supernode-2"):
            nodes.start_supernode(2, 2)
            time.sleep(5)
        return "3" in [row["clients"] for row in rows(run.folder)[begun:]]

    run.until(back, "the node's return")
    # The rival serves partition 1 now, and the stranger none.
    assert max(int(row["clients"]) for row in rows(run.folder)) == 3
    disk = nodes.results(run.number).relative_to(nodes.folder)
    kept = nodes.folder / "supernode-2" / disk / "state" / "client-2.safetensors"
    assert kept.exists()
    log = " ".join(nodes.flwr("log", run.number, "--show").stdout.split())
    lost = re.findall(r"client (\d) left out of exchange \d+: it no longer holds", log)
    assert "2" not in lost, log
    stopped = nodes.flwr("stop", run.number, "federation")
    assert stopped.returncode == 0, stopped.stderr


def test_a_run_without_clients_fails(nodes: Deployment) -> None:
    """Nodes are there, but none has a partition of this run."""
    for name in [name for name in nodes.processes if name.startswith("supernode")]:
        nodes.kill(name)
    run = Run(nodes, num_clients=1, connect_timeout=3)
    assert run.wait() == "finished:failed"
    assert run.rounds() == 0
