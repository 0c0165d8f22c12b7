"""Finished runs: found, read, checked, and put into groups."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gwpf_baseline.config import RESUMABLE
from gwpf_baseline.records.history import METRICS, RoundRecord, read_history

# Where the same data lies, and what changes nothing in a run or what is averaged over.
_PLACES = {"dataset.path", "dataset.cache_dir"}
_UNLABELLED = RESUMABLE | _PLACES | {"seed", "eval_every"}
# What every run of a report must have in common, as key or as the group of a key.
_TASK = {"dataset", "partition", "model", "num_clients"}
_RUN_FILES = ("summary.json", "config.yaml", "history.csv")
_MEND = "run it again or leave it out"


class ReportError(ValueError):
    """Runs that cannot be reported, or not in one table."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Parameters
    ----------
    folder : pathlib.Path
        Where it lies.
    config : dict
        Its configuration, each value under its dotted key.
    metric : {"accuracy", "perplexity"}
        What it is measured by.
    records : list of RoundRecord
        Its rounds; there is at least one.
    """

    folder: Path
    config: dict[str, Any]
    metric: str
    records: list[RoundRecord]

    @property
    def task(self) -> dict[str, Any]:
        """What this run shares with every run that it can be compared with."""
        task = {
            key: value
            for key, value in self.config.items()
            if key.partition(".")[0] in _TASK and key not in _PLACES
        }
        return {**task, "metric": self.metric}


# ---- reading ------------------------------------------------------------------------


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Find the runs' folders.

    Parameters
    ----------
    folders : iterable of pathlib.Path
        Folders of runs, or folders with such folders below, as Hydra's multirun makes.

    Returns
    -------
    list of pathlib.Path
        The runs' folders, each once. Among them are those of unfinished runs, so that
        a seed whose run was killed is not left out in silence.

    Raises
    ------
    ReportError
        A folder that has nothing of a run.
    """
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = [folder] if _is_run(folder) else _runs_below(folder)
        if not runs:
            raise ReportError(
                f"{folder}: no run in it or below; give a folder that a run has named "
                "as that of its results"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _RUN_FILES)


def _runs_below(folder: Path) -> list[Path]:
    files = (file for name in _RUN_FILES for file in folder.rglob(name))
    # Hydra keeps a config.yaml of its own in the folder .hydra of every run.
    below = {file.parent for file in files if file.parent.name != ".hydra"}
    # Job 10 of a multirun comes after job 9: the groups' order is that of the runs.
    return sorted(below, key=lambda run: (run.parent, len(run.name), run.name))


def read_run(folder: Path) -> Run:
    """Read a finished run.

    Parameters
    ----------
    folder : pathlib.Path
        The run's folder.

    Returns
    -------
    Run
        Its configuration and its rounds.

    Raises
    ------
    ReportError
        A run that was not finished, or a file of it that is missing or damaged.
    """
    metric = _read(_read_metric, folder / "summary.json")
    config = _read(_read_config, folder / "config.yaml")
    records = _read(lambda file: read_history(file.parent), folder / "history.csv")
    # The summary may be that of an earlier run in the same folder.
    done = records[-1].round if records else 0
    if done != config["num_rounds"]:
        raise ReportError(
            f"{folder}: not finished, its history has {done} of "
            f"{config['num_rounds']} rounds; resume it, {_MEND}"
        )
    return Run(folder, config, metric, records)


def _read(reader: Callable[[Path], Any], file: Path) -> Any:
    """Read one of a run's files, or say in one line why that cannot be."""
    try:
        return reader(file)
    except FileNotFoundError as error:
        # The summary is what a run writes last.
        unfinished = "not finished, it " if file.name == "summary.json" else ""
        raise ReportError(
            f"{file.parent}: {unfinished}has no {file.name}; {_MEND}"
        ) from error
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ReportError(
            f"{file.parent}: {file.name} cannot be used ({reason}); {_MEND}"
        ) from error


def _read_metric(file: Path) -> str:
    summary = json.loads(file.read_text(encoding="utf-8"))
    metric = summary.get("metric") if isinstance(summary, dict) else None
    if metric not in METRICS:
        raise ValueError(f"its metric is {metric}, not one of {', '.join(METRICS)}")
    return metric


def _read_config(file: Path) -> dict[str, Any]:
    loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise ValueError("it has no keys")
    config = flatten(OmegaConf.to_container(loaded, resolve=True))
    for key, kind in (("method.name", str), ("seed", int), ("num_rounds", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"its {key} is {text_of(config.get(key))}")
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration.

    Parameters
    ----------
    config : dict
        Values, or dicts of them.
    prefix : str
        What to put before each key.

    Returns
    -------
    dict
        Each value under its dotted key.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict)
        flat |= (
            flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
        )
    return flat


# ---- grouping -----------------------------------------------------------------------


def check_comparable(runs: Sequence[Run]) -> None:
    """Check that all runs had the same data, clients and model.

    Parameters
    ----------
    runs : sequence of Run
        At least one.

    Raises
    ------
    ReportError
        Two runs that had not; it names them and the first key that differs.
    """
    first = runs[0]
    for run in runs:
        for key in first.task | run.task:
            one, other = first.task.get(key), run.task.get(key)
            if one != other:
                raise ReportError(
                    f"{key} is {text_of(one)} in {first.folder}, but "
                    f"{text_of(other)} in {run.folder}; report them apart"
                )


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put runs together that differ in their seeds only.

    Parameters
    ----------
    runs : sequence of Run
        At least one.

    Returns
    -------
    dict of str to list of Run
        The groups in the order of their first runs. A label is the method's name and
        what the groups differ in, as ``key=value``.

    Raises
    ------
    ReportError
        Two runs with the same seed in a group.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_label(run, runs), []).append(run)
    labelled: dict[str, list[Run]] = {}
    for label, group in groups.items():
        lengths = {run.config["num_rounds"] for run in group}
        for run in group:
            # An average of a long run and a short one would be that of neither.
            length = f" num_rounds={run.config['num_rounds']}"
            full = label + length if len(lengths) > 1 else label
            labelled.setdefault(full, []).append(run)
    for label, group in labelled.items():
        seen: dict[int, Run] = {}
        for run in group:
            twin = seen.setdefault(run.config["seed"], run)
            if twin is not run:
                raise ReportError(
                    f"{twin.folder} and {run.folder} are both {label} with seed "
                    f"{run.config['seed']}; leave one out"
                )
    return labelled


def _label(run: Run, runs: Sequence[Run]) -> str:
    """Name the method and whatever else distinguishes a run."""
    parts = [run.config["method.name"]]
    # The method's own keys first.
    for key in sorted(run.config, key=lambda key: not key.startswith("method.")):
        group, _, leaf = key.partition(".")
        value = run.config[key]
        # What is not set needs no mention: the runs in which it is set mention it.
        if key in _UNLABELLED or key == "method.name" or value is None:
            continue
        name = f"{group}.name"
        # The hyper-parameters of another method, or of any other alternative with a
        # name, say nothing: the name does.
        peers = [
            peer
            for peer in runs
            if leaf == "name" or peer.config.get(name) == run.config.get(name)
        ]
        if any(peer.config.get(key) != value for peer in peers):
            short = group if leaf == "name" else key.removeprefix("method.")
            parts.append(f"{short}={text_of(value)}")
    return " ".join(parts)


def text_of(value: Any) -> str:
    """Write a value as on the command line.

    Parameters
    ----------
    value : object
        A value of a configuration.

    Returns
    -------
    str
        The same for 1 and 1.0.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)
