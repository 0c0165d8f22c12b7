"""Run all experiments behind a page of results, and report them.

What has been run already is skipped, so a set that was stopped goes on where it was. A
run that fails is named at the end and does not stop the others.

python benchmarks/experiments.py apf --jobs 2
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from _common import REPOSITORY, add_data_option
from rich.console import Console

# The -small sizes pass some hundred stability checks instead of thousands. After K
# checks, a coordinate that only trembles has |E| / A of about 1 / sqrt(K), so that the
# paper's threshold of 0.05 would hardly ever be met; see docs/apf.md.
APF = ("method.check_every=1", "method.threshold=0.1")


class Runs(NamedTuple):
    """One method in one experiment, over some seeds.

    Parameters
    ----------
    experiment : str
        The experiment's name, and the folder of the table that the runs belong to;
        empty for the default run.
    label : str
        The folder of these runs.
    overrides : tuple of str
        What is put on the command line.
    seeds : int, default 3
        Seeds 0, 1, ...
    table : str, optional
        Another folder for the table, where two experiments stand in one or one in two.
    """

    experiment: str
    label: str
    overrides: tuple[str, ...]
    seeds: int = 3
    table: str = ""

    def commands(self, output: Path) -> Iterator[tuple[Path, list[str]]]:
        """Yield each seed's folder and arguments."""
        experiment = [f"experiment={self.experiment}"] if self.experiment else []
        for seed in range(self.seeds):
            folder = output / (self.table or self.experiment) / self.label
            arguments = [*experiment, *self.overrides, f"seed={seed}"]
            yield folder / f"seed-{seed}", arguments


# Where three seeds would take the page beyond an hour.
twice = partial(Runs, seeds=2)


def _page_apf() -> list[Runs]:
    lenet, extreme = "apf_lenet5-small", "apf_extreme-small"
    apf = ("method=apf", *APF)
    return [
        Runs(lenet, "fedavg", ("method=fedavg",)),
        Runs(lenet, "apf", apf),
        twice(lenet, "apf_aggressive", ("method=apf_aggressive", *APF)),
        twice(lenet, "gaia", ("method=gaia",)),
        twice(lenet, "cmfl", ("method=cmfl",)),
        twice(lenet, "cmfl-decay", ("method=cmfl", "method.decay=true")),
        twice(lenet, "partial_sync", ("method=partial_sync", *APF)),
        twice(lenet, "permanent_freeze", ("method=permanent_freeze", *APF)),
        *(
            twice(
                lenet,
                f"fedavg-x{times}",
                (
                    "method=fedavg",
                    f"local_steps={5 * times}",
                    f"num_rounds={120 // times}",
                    f"eval_every={10 // times}",
                ),
            )
            for times in (2, 5, 10)
        ),
        *(
            twice(lenet, control, (*apf, f"method.control={control}"), table="control")
            for control in ("aimd", "additive", "multiplicative", "fixed")
        ),
        twice("apf_loose-small", "apf", (), table="control"),
        *(
            twice(experiment, label, overrides)
            for experiment in ("apf_kws-small", "apf_resnet18-small")
            for label, overrides in (("fedavg", ("method=fedavg",)), ("apf", apf))
        ),
        *(
            twice(extreme, method, (f"method={method}", *more))
            for method, more in (
                ("fedavg", ()),
                ("apf", APF),
                ("partial_sync", APF),
                ("permanent_freeze", APF),
            )
        ),
    ]


def _page_gwpf() -> list[Runs]:
    methods = (
        ("fedavg", ("method=fedavg",)),
        ("gwpf", ("method=gwpf",)),
        ("gwpf_paper", ("method=gwpf_paper",)),
        ("apf", ("method=apf", *APF)),
    )
    tasks: dict[str, tuple[str, ...]]
    tasks = {f"gwpf_{task}-small": () for task in ("m1", "e1", "c1")}
    tasks["gwpf_w1-small"] = ("dataset.path=${oc.env:GWPF_DATA}/wikitext-2",)
    return [
        *(
            twice(task, label, (*overrides, *data))
            for task, data in tasks.items()
            for label, overrides in methods
        ),
        *(
            Runs(task, label, (*overrides, *data, "partition=iid"), 1, f"{task}-iid")
            for task, data in tasks.items()
            for label, overrides in methods
        ),
    ]


def _page_gradient_pruning() -> list[Runs]:
    task = "gradient_pruning_resnet18-small"
    dense = ("method=fedavg", "quantization.bits=32")
    fewer = ("local_steps=25", "num_rounds=12", "lr_milestones=[6,9]")
    kept = ("method.keep=0.05",)
    return [
        Runs(task, "fedavg", dense),
        Runs(task, "fedavg-x5", (*dense, *fewer)),
        Runs(task, "pruning", ("quantization.bits=32",)),
        Runs(task, "compression", ()),
        Runs(task, "compression-fp16", ("quantization.fp16=true",)),
        Runs(task, "kept-32", (*kept, "quantization.bits=32")),
        Runs(task, "kept", kept),
        *(
            Runs(
                task,
                f"kept-{name}",
                (*kept, f"server_optimizer={name}", f"server_optimizer.lr={lr}"),
            )
            for name, lr in (
                ("fedavgm", 0.3),
                ("fedadagrad", 0.03),
                ("fedadam", 0.03),
                ("fedyogi", 0.03),
            )
        ),
        Runs(task, "fedavg-fedadagrad", (*dense, *_ADAGRAD)),
        Runs(task, "fedavg-x5-fedadagrad", (*dense, *fewer, *_ADAGRAD)),
        Runs(task, "gwpf", ("method=gwpf", "quantization.bits=32")),
        Runs(task, "gwpf-8", ("method=gwpf",)),
        # The same piece behind other methods, and fewer values.
        Runs(task, "gwpf-8-fedadagrad", ("method=gwpf", *_ADAGRAD)),
        Runs(task, "kept1-fedadagrad", ("method.keep=0.01", *_ADAGRAD)),
        Runs(
            task,
            "kept1-fp16-fedadagrad",
            ("method.keep=0.01", "quantization.fp16=true", *_ADAGRAD),
        ),
    ]


def _page_zerofl() -> list[Runs]:
    cifar, speech = "zerofl_cifar10-small", "zerofl_speech_commands-small"
    fewer = ("num_rounds=8", "eval_every=4", "lr_milestones=[3,5]")

    def masked(ratio: float, *more: str) -> tuple[str, ...]:
        return (f"method.mask_ratio={ratio}", *more)

    return [
        Runs(cifar, "fedavg", ("method=fedavg",)),
        Runs(cifar, "fedavg-x5", ("method=fedavg", "local_steps=50", *fewer)),
        Runs(cifar, "swat", masked(0.9)),
        *(Runs(cifar, f"top_k_weights-{r}", masked(r)) for r in (0.0, 0.1, 0.2)),
        *(
            Runs(cifar, upload, masked(0.2, f"method.upload={upload}"))
            for upload in ("diff_on_top_k", "top_k_diff")
        ),
        Runs(cifar, "swat-95", masked(0.95, "method.sparsity=0.95")),
        *(
            Runs(cifar, f"top_k_weights-95-{r}", masked(r, "method.sparsity=0.95"))
            for r in (0.0, 0.2)
        ),
        Runs(speech, "fedavg", ("method=fedavg",)),
        Runs(speech, "fedavg-x5", ("method=fedavg", "local_steps=25", *fewer)),
        Runs(speech, "swat", masked(0.9)),
        Runs(speech, "top_k_weights-0.2", ()),
    ]


def _page_fedpm() -> list[Runs]:
    conv4 = ("model=conv4", "model.width=16")
    fourth = ("partition=pathological", "partition.classes_per_client=4")
    adam = ("method=fedavg", "lr=0.001")
    few = ("fedavg", "fedavg-x4", "fedpm")
    every = (*few, "fedpm_paper", "kept-fp16")
    # A baseline of FedPM's bitrate.
    kept = (
        *("method=gradient_pruning", "method.keep=0.015", "lr=0.001"),
        *("quantization.bits=8", "quantization.fp16=true"),
    )
    tasks: dict[str, tuple[str, int, tuple[str, ...], tuple[str, ...]]] = {
        "mnist": ("mnist", 12, (), every),
        "mnist-4classes": ("mnist", 12, fourth, few),
        "emnist": ("emnist", 20, (), every),
        "cifar10-conv4": ("cifar10", 20, conv4, every),
        "cifar10-conv4-4classes": ("cifar10", 20, (*conv4, *fourth), few),
        "cifar10-conv6": ("cifar10", 20, (), few),
    }
    runs = []
    for task, (data, rounds, more, wanted) in tasks.items():
        fewer = ("local_steps=400", f"num_rounds={rounds // 4}", "eval_every=1")
        methods: dict[str, tuple[str, ...]] = {
            "fedavg": adam,
            "fedavg-x4": (*adam, *fewer),
            "fedpm": (),
            "fedpm_paper": ("method=fedpm_paper",),
            "kept-fp16": kept,
        }
        runs += [
            Runs(f"fedpm_{data}-small", label, (*methods[label], *more), table=task)
            for label in wanted
        ]
    return runs


def _page_systems() -> list[Runs]:
    systems: dict[str, tuple[str, ...]] = {
        "fedavg": ("method=fedavg",),
        "fedavg-x4": ("method=fedavg", "local_steps=20", "num_rounds=15"),
        "fedavg-adam": ("method=fedavg", *_ADAM, "lr=0.001"),
        "gwpf": ("method=gwpf",),
        "gwpf-8": ("method=gwpf", "quantization.bits=8"),
        "gwpf-8-fedadagrad": ("method=gwpf", "quantization.bits=8", *_ADAGRAD),
        "apf": ("method=apf",),
        "partial_sync": ("method=partial_sync",),
        "permanent_freeze": ("method=permanent_freeze",),
        "gaia": ("method=gaia",),
        "cmfl": ("method=cmfl",),
        "gradient_pruning-8": ("method=gradient_pruning", "quantization.bits=8"),
        "kept-8-fedadagrad": (
            *("method=gradient_pruning", "method.keep=0.05", "quantization.bits=8"),
            *_ADAGRAD,
        ),
        "zerofl": ("method=zerofl",),
        "zerofl-diff": ("method=zerofl", "method.upload=diff_on_top_k", "lr=0.2"),
        "fedpm": ("method=fedpm", *_ADAM, "lr=0.3"),
        "fedpm_paper": ("method=fedpm_paper", *_ADAM, "lr=0.3"),
    }
    rounds = ("num_rounds=60", "eval_every=5")
    return [
        Runs("", label, (*rounds, *overrides), table="digits")
        for label, overrides in systems.items()
    ]


_ADAGRAD = ("server_optimizer=fedadagrad", "server_optimizer.lr=0.03")
_ADAM = ("optimizer=adam",)
PAGES = {
    "apf": _page_apf,
    "gwpf": _page_gwpf,
    "gradient_pruning": _page_gradient_pruning,
    "zerofl": _page_zerofl,
    "fedpm": _page_fedpm,
    "systems": _page_systems,
}


def main() -> None:
    """Run a page's experiments, some at a time, then report each of its tables."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("page", choices=PAGES)
    options.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    options.add_argument("--seeds", type=int, default=3, help="seeds at most (3)")
    options.add_argument("--output", type=Path, default=Path("outputs/experiments"))
    options.add_argument("--dry-run", action="store_true", help="only show commands")
    add_data_option(options)
    given = options.parse_args()
    output = given.output.absolute() / given.page
    console = Console()
    wanted = [
        run
        for runs in PAGES[given.page]()
        for run in islice(runs.commands(output), given.seeds)
    ]
    # One seed of everything first: a set that is stopped then still says something.
    wanted.sort(key=lambda run: run[0].name)
    if given.dry_run:
        for _, arguments in wanted:
            print(shlex.join(["python", "-m", "gwpf_baseline.main", *arguments]))
        return
    todo = [run for run in wanted if not (run[0] / "summary.json").is_file()]
    environment = {**os.environ, "GWPF_DATA": str(given.data.absolute())}
    # Several runs at a time share the processors, which changes no result.
    workers = f"client_resources.num_cpus={min(given.jobs, os.cpu_count() or 1)}"
    started, failed = time.monotonic(), []

    def run(folder: Path, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "gwpf_baseline.main", *arguments]
        command += [f"hydra.run.dir={folder}", workers]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            failed.append(f"{folder}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        minutes = (time.monotonic() - started) / 60
        console.print(f"{minutes:5.1f} min  {' '.join(arguments)}", highlight=False)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda item: run(*item), todo))
    for text in failed:
        console.print(f"failed: {text}", markup=False)
    for table in sorted({folder.parents[1] for folder, _ in wanted}):
        report = [sys.executable, "-m", "gwpf_baseline.report", str(table)]
        report += ["--output", str(output / f"report-{table.name}")]
        subprocess.run(report, cwd=REPOSITORY, check=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
