"""What clients cost that are only there: time before the first round, and memory.

A run of one round in which ten clients take part, among ten and among many: what the
many add to its wall time. Then runs in which all of them take part, so that each keeps
what its method has it keep: what each client beyond the first ten adds to the largest
memory of all processes together, against what that is by its arrays (Linux only).
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import REPOSITORY, add_data_option, announced, parser, show

FEW = 10
# The models of the second table, and what they are trained on; of a large one the last
# round's evaluation would take most of the time, but for few and small images.
MODELS = {"lenet5": "mnist", "resnet18": "digits"}


def main() -> None:
    """Measure both and print the tables."""
    arguments = parser(__doc__, lenet5=1000, resnet18=100, repeats=3, seed=0)
    add_data_option(arguments)
    options = arguments.parse_args()
    show(
        "One round of ten clients, LeNet-5 on MNIST, gwpf",
        ("among", "s", "s more", "goal <="),
        first_round(options),
        options,
    )
    asked = [model for model in MODELS if vars(options)[model] > FEW]
    rows = [memory(model, vars(options)[model], options) for model in announced(asked)]
    show(
        "Memory of a simulated client, gwpf",
        (
            "model",
            "clients",
            "peak MB",
            "MB a client",
            "its arrays",
            "ratio",
            "goal <=",
        ),
        rows,
        options,
    )


def first_round(options: Namespace) -> list[Sequence[Any]]:
    """Time a round of ten clients, among few and among many, in turn."""
    least = {FEW: float("inf"), options.lenet5: float("inf")}
    for clients in announced(options.repeats * list(least), "among {}".format):
        sampled = ["num_rounds=1", f"fraction_fit={FEW / clients}"]
        started = time.perf_counter()
        with running(sampled, clients, "lenet5", options) as (process, _):
            process.wait()
        least[clients] = min(least[clients], time.perf_counter() - started)
    few = least[FEW]
    return [(n, seconds, seconds - few, "5") for n, seconds in least.items()]


def memory(model: str, clients: int, options: Namespace) -> Sequence[Any]:
    """Return a row: how much memory the clients beyond the first ten take."""
    few, _ = peak(FEW, model, options)
    many, dimension = peak(clients, model, options)
    each = (many - few) / (clients - FEW)
    # The model and the residual in float32, and a bit a coordinate: what was sent.
    arrays = (2 * 4 + 1 / 8) * dimension / 1e6
    return model, clients, many, each, arrays, each / arrays, "1"


def peak(clients: int, model: str, options: Namespace) -> tuple[float, int]:
    """Return the most MB that a run took in which all take part, and its parameters."""
    # Few iterations of few examples: what is kept does not depend on them.
    short = ["num_rounds=2", "eval_every=2", "local_steps=1", "batch_size=2"]
    most = 0.0
    with running(short, clients, model, options) as (process, folder):
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.5)
        if process.returncode == 0:
            text = (folder / "summary.json").read_text(encoding="utf-8")
            dimension: int = json.loads(text)["parameters"]
    return most / 1e6, dimension


@contextmanager
def running(
    overrides: Sequence[str], clients: int, model: str, options: Namespace
) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Start an experiment, which must have come to its end at the end."""
    dataset = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "gwpf_baseline.main", f"num_clients={clients}"),
            *(f"model={model}", f"dataset={dataset}", f"seed={options.seed}"),
            *("partition=iid", f"hydra.run.dir={folder}", *overrides),
        ]
        if dataset != "digits":
            command.append(f"dataset.path={options.data / dataset}")
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        ) as process:
            yield process, Path(folder)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def memory_of(root: int) -> float:
    """Return the bytes that a process and all below it hold, shared ones once."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # After the name, which may hold anything, in brackets.
                rest = (entry / "stat").read_text().rpartition(")")[2]
                parents[int(entry.name)] = int(rest.split()[1])
            except OSError:
                continue  # It has ended.
    below, added = {root}, {root}
    while added:
        added = {child for child, parent in parents.items() if parent in added} - below
        below |= added
    total = 0
    for number in below:
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 1024.0 * total


if __name__ == "__main__":
    main()
