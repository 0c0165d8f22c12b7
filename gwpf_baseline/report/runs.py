"""Finished runs: found, read and checked."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gwpf_baseline.methods.shared.network_file import NETWORK_FILE
from gwpf_baseline.records.history import (
    METRICS,
    SUMMARY_FILE,
    RoundRecord,
    read_history,
)
from gwpf_baseline.records.layers import LAYERS_FILE, LayerRecord, read_layers
from gwpf_baseline.records.target import metric_of, reaches
from gwpf_baseline.utils import (
    check_yaml,
    escaped,
    is_name,
    is_number,
    is_whole,
    one_line,
)

# Where the same data lies.
PLACES = {"dataset.path", "dataset.cache_dir"}
_UNSHOWN = PLACES | {"resume"}
# What every run of a report must have in common, as key or as the group of a key.
_TASK = {"dataset", "partition", "model", "num_clients"}
_RUN_FILES = (SUMMARY_FILE, "config.yaml", "history.csv")
_MEND = "run it again or leave it out"
# What no value of a run comes near.
_LONGEST = 2**16


class ReportError(ValueError):
    """Runs that cannot be reported, or not in one table.

    Parameters
    ----------
    message : str
        What is wrong with which of them, and the mend.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


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
    mask_bits : float, optional
        Bits for each parameter of the file in which FedPM leaves its network, None if
        there is none.
    layers : sequence of LayerRecord
        What became of each layer, if that was recorded.
    """

    folder: Path
    config: dict[str, Any]
    metric: str
    records: list[RoundRecord]
    mask_bits: float | None = None
    layers: Sequence[LayerRecord] = ()

    @property
    def task(self) -> dict[str, Any]:
        """What this run shares with every run that it can be compared with."""
        task = {
            key: value
            for key, value in self.config.items()
            if key.partition(".")[0] in _TASK and key not in PLACES
        }
        return {**task, "metric": self.metric}


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
        try:
            runs = [folder] if _is_run(folder) else _runs_below(folder)
        except OSError as error:
            raise ReportError(f"{folder}: {error.strerror}; leave it out") from error
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
    metric, parameters = _read(_read_summary, folder / SUMMARY_FILE)
    config = _read(_read_config, folder / "config.yaml")
    records = _read(_read_records, folder / "history.csv")
    # The summary may be that of an earlier run in the same folder.
    done = records[-1].round if records else 0
    if done != config["num_rounds"] and not _stopped(config, metric, records):
        raise ReportError(
            f"{folder}: not finished, its history has {done} of "
            f"{config['num_rounds']} rounds; resume it, {_MEND}"
        )
    network = folder / NETWORK_FILE
    size = network.stat().st_size if network.is_file() else None
    mask_bits = 8 * size / parameters if size else None
    layers = _read(read_layers, folder / LAYERS_FILE)
    return Run(folder, config, metric, records, mask_bits, layers)


def _stopped(
    config: dict[str, Any], metric: str, records: Sequence[RoundRecord]
) -> bool:
    """Tell whether a run has ended before its last round, where it was to."""
    stop_at = config.get("stop_at")
    if stop_at is None or not records:
        return False
    return reaches(metric_of(records[-1], metric), stop_at, metric)


def _read(reader: Callable[[Path], Any], file: Path) -> Any:
    """Read one of a run's files, or say in one line why that cannot be."""
    try:
        # What has no end, or waits for whoever writes to it.
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        return reader(file)
    except FileNotFoundError as error:
        # The summary is what a run writes last.
        unfinished = "not finished, it " if file.name == SUMMARY_FILE else ""
        raise ReportError(
            f"{file.parent}: {unfinished}has no {file.name}; {_MEND}"
        ) from error
    # Whatever the parsers stumble over: PyYAML raises more than it says.
    except (
        *(OSError, ValueError, TypeError, AttributeError, LookupError),
        *(ArithmeticError, RecursionError, yaml.YAMLError),
    ) as error:
        reason = one_line(" ".join(str(error).split()))
        raise ReportError(
            f"{file.parent}: {file.name} cannot be used ({reason}); {_MEND}"
        ) from error


def _read_summary(file: Path) -> tuple[str, int]:
    summary = json.loads(file.read_text(encoding="utf-8"))
    summary = summary if isinstance(summary, dict) else {}
    metric, parameters = summary.get("metric"), summary.get("parameters")
    if metric not in METRICS:
        raise ValueError(f"its metric is {metric}, not one of {', '.join(METRICS)}")
    if not isinstance(parameters, int) or parameters < 1:
        raise ValueError(f"its parameters are {parameters}")
    return metric, parameters


def _read_config(file: Path) -> dict[str, Any]:
    # Not as OmegaConf: ${oc.env:TOKEN} would put the reader's secrets into the report.
    text = file.read_text(encoding="utf-8")
    check_yaml(text)
    loaded = yaml.safe_load(text)
    if not isinstance(loaded, dict):
        raise ValueError("it has no keys")
    config = flatten(loaded)
    for key, value in config.items():
        text = f"{key}={text_of(value)}"
        if not text.isprintable() and key not in _UNSHOWN:
            raise ValueError(f"it has characters that cannot be shown: {text}")
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST} characters: {text}")
    for key, fits, kind in (
        ("method.name", is_name, "a name"),
        ("seed", is_whole, "a whole number"),
        ("num_rounds", is_whole, "a whole number"),
    ):
        if not fits(config.get(key)):
            raise ValueError(f"its {key} is {text_of(config.get(key))}, not {kind}")
    stop_at = config.get("stop_at")
    if stop_at is not None and not is_number(stop_at):
        raise ValueError(f"its stop_at is {text_of(stop_at)}")
    return config


def _read_records(file: Path) -> list[RoundRecord]:
    records = read_history(file.parent)
    for number, record in enumerate(records, start=1):
        if record.round != number:
            raise ValueError(f"round {record.round} stands where {number} belongs")
    return records


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
