"""The command line as a user starts it, and what a run leaves behind."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gwpf_baseline.records.history import read_history

REPOSITORY = Path(__file__).resolve().parents[1]
# Small, and yet every mechanism takes part: sampled clients that miss rounds, momentum
# that outlives them, evaluation only now and then.
SMALL = [
    "num_rounds=12",
    "num_clients=5",
    "fraction_fit=0.6",
    "eval_every=5",
    "momentum=0.9",
    "persist_optimizer=true",
    "lr=0.01",
    "seed=7",
]
TIMES = (
    *("seconds", "compute_seconds", "modelled_seconds"),
    *("slowest_client_seconds", "median_client_seconds"),
)


def own_ports() -> int:
    """Return the first of ten ports that other processes of tests do not have.

    Below those that Linux gives to whoever asks for any.
    """
    return 20_000 + 10 * (os.getpid() % 1000)


_started: "list[subprocess.Popen[str]]" = []


def start(*overrides: str) -> "subprocess.Popen[str]":
    """Start the command line in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gwpf_baseline.main", *overrides],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def end_what_still_runs() -> None:
    """End what was started, so that no test that failed slows those after it down."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def run(*overrides: str) -> str:
    """Run the command line to its end and return what it printed."""
    process = start(*overrides)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    return output


def rows_without_seconds(folder: Path) -> list[list[str]]:
    """Return the text of history.csv but for the columns that are measured times."""
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    kept = [k for k, name in enumerate(rows[0]) if name not in TIMES]
    assert len(kept) == len(rows[0]) - len(TIMES)
    return [[row[k] for k in kept] for row in rows]


def model_bytes(folder: Path) -> bytes:
    """Return the final model's file."""
    return (folder / "model.safetensors").read_bytes()


def rounds_done(folder: Path) -> int:
    """Return how many rounds a run has recorded."""
    try:
        return len(read_history(folder))
    except (OSError, ValueError):
        return 0


def until_round(process: "subprocess.Popen[str]", folder: Path, number: int) -> None:
    """Wait until a run has ended so many rounds."""
    deadline = time.monotonic() + 200
    while rounds_done(folder) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
