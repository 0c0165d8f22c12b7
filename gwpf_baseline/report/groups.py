"""Runs that belong together, and what they are called."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from gwpf_baseline.config import RESUMABLE, compose_config, config_dir
from gwpf_baseline.report.runs import PLACES, ReportError, Run, flatten, text_of

# What changes nothing in a run but its end, or what is averaged over.
_UNLABELLED = RESUMABLE | PLACES | {"seed", "eval_every"}
# How often clients synchronise.
_INTERVAL = {"local_steps", "local_epochs"}


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
        what the groups differ in, as ``key=value``, without values that are the
        configuration's defaults, unless two groups would then be called the same.

    Raises
    ------
    ReportError
        Two runs with the same seed in a group.
    """
    differing = [_differing(run, runs) for run in runs]
    lengths: dict[str, set[int]] = {}
    for run, values in zip(runs, differing, strict=True):
        lengths.setdefault(_label(values), set()).add(run.config["num_rounds"])
    groups: dict[str, list[Run]] = {}
    named: dict[str, dict[str, Any]] = {}
    for run, values in zip(runs, differing, strict=True):
        # An average of a long run and a short one would be that of neither.
        if len(lengths[_label(values)]) > 1:
            values["num_rounds"] = run.config["num_rounds"]
        groups.setdefault(_label(values), []).append(run)
        named[_label(values)] = values
    labelled = dict(zip(_short_labels(groups, named), groups.values(), strict=True))
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


def all_but_interval(run: Run) -> str:
    """Return what two runs have in common that differ in how often they synchronise."""
    left_out = _UNLABELLED | _INTERVAL
    return text_of(sorted((k, v) for k, v in run.config.items() if k not in left_out))


def _differing(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the method's name and whatever else distinguishes a run."""
    values = {"method.name": run.config["method.name"]}
    # The method's own keys first.
    for key in sorted(run.config, key=lambda key: not key.startswith("method.")):
        group, _, leaf = key.partition(".")
        value = run.config[key]
        # What is not set needs no mention: the runs in which it is set mention it.
        if key in _UNLABELLED or value is None:
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
            values[key] = value
    return values


def _short_labels(
    groups: Mapping[str, Sequence[Run]], named: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Leave defaults out, but those that tell two groups apart."""
    short = {}
    for label, values in named.items():
        defaults = _defaults_of(groups[label][0])
        short[label] = {k: v for k, v in values.items() if v != defaults.get(k)}
    result = []
    for label, values in named.items():
        twins = [named[other] for other in named if short[other] == short[label]]
        kept = {
            key: value
            for key, value in values.items()
            if key in short[label] or any(twin.get(key) != value for twin in twins)
        }
        result.append(_label({"method.name": values["method.name"], **kept}))
    return result


def _label(values: Mapping[str, Any]) -> str:
    """Write a method's name and values as on the command line."""
    parts = [values["method.name"]]
    for key, value in values.items():
        if key != "method.name":
            short = key.removesuffix(".name").removeprefix("method.")
            parts.append(f"{short}={text_of(value)}")
    return " ".join(parts)


def _defaults_of(run: Run) -> dict[str, Any]:
    """Return what a run's values would be, had only its alternatives been named."""
    chosen = [
        f"{key.removesuffix('.name')}={value}"
        for key, value in run.config.items()
        if key.endswith(".name")
    ]
    # A run of another version may name an alternative that is no longer there; what
    # somebody else's file says is not composed, only what is known.
    if not _choices().issuperset(chosen):
        return {}
    names = {k: v for k, v in _defaults().items() if k.endswith(".name")}
    return _defaults(*chosen) | names


def _choices() -> set[str]:
    return {f"{file.parent.name}={file.stem}" for file in config_dir().glob("*/*.yaml")}


@functools.cache
def _defaults(*overrides: str) -> dict[str, Any]:
    return flatten(OmegaConf.to_container(compose_config(overrides)))
