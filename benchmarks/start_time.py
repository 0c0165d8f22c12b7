"""What a run takes beside its rounds, against what no run can do without.

That is a script that imports PyTorch and Flower, starts Ray with two actors, and stops
it. Cold is without any compiled bytecode, as after an installation that made none.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import REPOSITORY, announced, parser, show

from gwpf_baseline.records.history import read_history

ROUNDS = 4
REFERENCE = """
import flwr
import ray
import torch

class Actor:
    def ready(self):
        return True

ray.init(address="local", include_dashboard=False, logging_level="ERROR")
actors = [ray.remote(num_cpus=0)(Actor).remote() for _ in range(2)]
ray.get([actor.ready.remote() for actor in actors])
ray.shutdown()
"""


def seconds_of(arguments: list[str], bytecode: Path | None) -> float:
    """Run Python, and return how long it took.

    Parameters
    ----------
    arguments : list of str
        What follows the interpreter.
    bytecode : pathlib.Path, optional
        An empty folder to look for bytecode in; default: where it usually is.
    """
    environment = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if bytecode is not None:
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - started


def beside_rounds(bytecode: Path | None) -> float:
    """Run a few rounds of the default, and return what was not spent on them."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"num_rounds={ROUNDS}", f"hydra.run.dir={folder}"]
        whole = seconds_of(["-m", "gwpf_baseline.main", *overrides], bytecode)
        ends = [record.seconds for record in read_history(folder)]
    # The first round waits for the workers; the others tell what a round takes.
    return whole - ROUNDS * (ends[-1] - ends[0]) / (ROUNDS - 1)


def main() -> None:
    """Measure both and print the table."""
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--states", nargs="*", default=["warm", "cold"])
    options = arguments.parse_args()
    rows = []
    for state in options.states:
        needed: list[float] = []
        taken: list[float] = []
        for _ in announced(options.repeats * [state]):
            with tempfile.TemporaryDirectory() as folder:
                empty = Path(folder) if state == "cold" else None
                needed.append(seconds_of(["-c", REFERENCE], empty))
            with tempfile.TemporaryDirectory() as folder:
                empty = Path(folder) if state == "cold" else None
                taken.append(beside_rounds(empty))
        least, median = statistics.median(needed), statistics.median(taken)
        rows.append((state, least, median, median / least, "1.5"))
    columns = ("bytecode", "s needed", "s beside rounds", "ratio", "goal <=")
    show("A start and an end", columns, rows, options)


if __name__ == "__main__":
    main()
