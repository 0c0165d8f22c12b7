"""What a report calculates: a row of numbers a group, and curves over the rounds."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.records.target import metric_of, reaches
from gwpf_baseline.report.runs import Run

# What a client's computing time depends on beside method, data and model.
_WORK = (
    "local_steps",
    "local_epochs",
    "batch_size",
    "optimizer",
    "precision",
    "client_threads",
    "client_resources.num_gpus",
)
BITS = ("uplink_bits_per_parameter", "downlink_bits_per_parameter")
CLIENTS = ("slowest_client_seconds", "median_client_seconds")
WAYS = ("uplink", "downlink")
PARTS = ("value", "position", "buffer", "overhead")

Groups = Mapping[str, Sequence[Run]]
Row = dict[str, Any]


def traffic(record: RoundRecord) -> int:
    """Return the bytes sent up to the end of a round, both ways."""
    return record.cumulative_uplink_bytes + record.cumulative_downlink_bytes


def first_reaching(run: Run, target: float) -> RoundRecord | None:
    """Return the first round that was measured to have reached a target.

    Parameters
    ----------
    run : Run
        The run.
    target : float
        An accuracy of at least, or a perplexity of at most that much.

    Returns
    -------
    RoundRecord or None
        None if the target was never reached.
    """
    for record in run.records:
        if reaches(metric_of(record, run.metric), target, run.metric):
            return record
    return None


def summarise(groups: Groups, target: float | None = None) -> list[Row]:
    """Calculate the table.

    Parameters
    ----------
    groups : mapping of str to sequence of Run
        As of `group_runs`.
    target : float, optional
        An accuracy or a perplexity to reach.

    Returns
    -------
    list of dict
        A row a group, with the columns of ``report.csv``. Values are means over the
        seeds, None where there are none; what it took to reach the target is a mean
        over those that did. ``compute_seconds`` is that of the median round.
    """
    runs = [run for group in groups.values() for run in group]
    return [_summarise(label, groups[label], runs, target) for label in groups]


def _summarise(
    label: str, group: Sequence[Run], runs: Sequence[Run], target: float | None
) -> Row:
    metric = group[0].metric
    best = min if metric == "perplexity" else max
    curves = [
        [v for v in (metric_of(r, metric) for r in run.records) if v is not None]
        for run in group
    ]
    finals = [curve[-1] for curve in curves if curve]
    last = [run.records[-1] for run in group]
    frozen = [_values(run, "frozen_fraction") for run in group]
    csr = [_values(run, "csr_bytes") for run in group]
    means = [_values(run, "mean_accuracy") for run in group]
    dense = sum(record.dense_bytes for record in last)
    row: Row = {
        "label": label,
        "seeds": len(group),
        f"final_{metric}": _mean(finals),
        f"final_{metric}_std": _deviation(finals),
        f"best_{metric}": _mean(best(curve) for curve in curves if curve),
        "total_uplink_bytes": _mean(r.cumulative_uplink_bytes for r in last),
        "total_downlink_bytes": _mean(r.cumulative_downlink_bytes for r in last),
        "total_bytes": _mean(map(traffic, last)),
        "traffic_ratio": sum(map(traffic, last)) / dense if dense else None,
        "frozen_fraction": _column_mean(group, "frozen_fraction"),
        "last_frozen_fraction": _mean(shares[-1] for shares in frozen if shares),
        "compute_seconds": _compute(group),
        "compute_overhead": _overhead(group, runs),
        "modelled_seconds": _mean(record.modelled_seconds for record in last),
        **{key: _column_mean(group, key) for key in (*CLIENTS, *BITS)},
        "total_csr_bytes": _mean(sum(values) for values in csr if values),
        "final_mean_accuracy": _mean(values[-1] for values in means if values),
        "mask_bits_per_parameter": _mean(run.mask_bits for run in group),
        **_shares(group),
    }
    if target is not None:
        firsts = [first_reaching(run, target) for run in group]
        reached = [record for record in firsts if record is not None]
        rounds = [record.round for record in reached]
        spent = [traffic(record) for record in reached]
        row |= {
            "target": target,
            "reached": len(reached),
            "rounds_to_target": _mean(rounds),
            "rounds_to_target_std": _deviation(rounds),
            "bytes_to_target": _mean(spent),
            "bytes_to_target_std": _deviation(spent),
            "modelled_seconds_to_target": _mean(r.modelled_seconds for r in reached),
        }
    return row


def _mean(values: Iterable[float | None]) -> float | None:
    """Average the values that there are."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None where it has no meaning."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values)


def _values(run: Run, column: str) -> list[float]:
    """Return what a column has, in the rounds in which it has anything."""
    values = (getattr(record, column) for record in run.records)
    return [value for value in values if value is not None]


def _column_mean(group: Iterable[Run], column: str) -> float | None:
    """Average a column over the rounds, and that over the seeds."""
    return _mean(_mean(_values(run, column)) for run in group)


def split(group: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return what a group's bytes are spent on.

    Parameters
    ----------
    group : sequence of Run
        The runs.

    Returns
    -------
    dict of str to dict of str to float
        For each of `WAYS` the bytes of each of `PARTS`, the mean of the runs.
    """
    return {
        way: {
            part: statistics.fmean(
                sum(getattr(record, f"{way}_{part}_bytes") for record in run.records)
                for run in group
            )
            for part in PARTS
        }
        for way in WAYS
    }


def layer_curves(
    group: Sequence[Run], column: str
) -> dict[str, tuple[list[int], list[float]]]:
    """Return how each layer of a group develops.

    Parameters
    ----------
    group : sequence of Run
        The runs; those in which layers were not recorded do not count.
    column : {"nonzero", "perturbation", "stabilised", "value"}
        What of it.

    Returns
    -------
    dict of str to tuple
        For each layer the rounds, and the means of the runs that have recorded them; a
        parameter's value, which means something else with each seed, is the first's.
    """
    found: dict[str, dict[int, list[float]]] = {}
    recorded = [run for run in group if run.layers]
    for run in recorded[:1] if column == "value" else recorded:
        for record in run.layers:
            values = found.setdefault(record.layer, {}).setdefault(record.round, [])
            values.append(getattr(record, column))
    return {
        layer: (list(by_round), [statistics.fmean(v) for v in by_round.values()])
        for layer, by_round in found.items()
    }


def _shares(group: Sequence[Run]) -> Row:
    """Return what share of a direction's bytes each part of the payloads takes."""
    shares: Row = {}
    for way, sizes in split(group).items():
        total = sum(sizes.values())
        for part, size in sizes.items():
            shares[f"{way}_{part}_share"] = size / total if total else None
    return shares


def _compute(group: Iterable[Run]) -> float | None:
    """Return for how long a client computes in a round."""
    seconds = [_values(run, "compute_seconds") for run in group]
    # Not the mean: in its first round a worker process also starts up, for seconds.
    return _mean(statistics.median(values) for values in seconds if values)


def _overhead(group: Sequence[Run], runs: Iterable[Run]) -> float | None:
    """Compare the computing time with that of FedAvg, for the same local work."""
    work = [group[0].config.get(key) for key in _WORK]
    own = _compute(group)
    fedavg = _compute(
        run
        for run in runs
        if run.config["method.name"] == "fedavg"
        and [run.config.get(key) for key in _WORK] == work
    )
    return own / fedavg - 1 if own is not None and fedavg else None


class Curve(NamedTuple):
    """A line of a figure, over the rounds that every seed of a group has.

    Parameters
    ----------
    x, mean : list of float
        Means over the seeds.
    low, high : list of float
        Their range.
    """

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


Axis = Callable[[RoundRecord], float | None]


def average_curve(group: Sequence[Run], x: Axis, y: Axis) -> Curve:
    """Average the curves of a group's seeds.

    Parameters
    ----------
    group : sequence of Run
        The seeds.
    x, y : callable
        What to draw of a round; None leaves it out.

    Returns
    -------
    Curve
        A point for each round that all seeds have: where one is lacking, the mean would
        jump.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for run in group:
        for record in run.records:
            at, value = x(record), y(record)
            if at is not None and value is not None:
                points.setdefault(record.round, []).append((at, value))
    curve = Curve([], [], [], [])
    for number in sorted(points):
        if len(points[number]) == len(group):
            places, values = zip(*points[number], strict=True)
            curve.x.append(statistics.fmean(places))
            curve.mean.append(statistics.fmean(values))
            curve.low.append(min(values))
            curve.high.append(max(values))
    return curve
