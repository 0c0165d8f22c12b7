"""Finished runs side by side: ``python -m gwpf_baseline.report RUN RUN``.

Runs that differ in nothing but their seed are one group: a row in the tables, a line in
the figures.
"""

import argparse
import csv
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.records.plots import draw, label_rounds
from gwpf_baseline.records.target import check_target, metric_of, reaches
from gwpf_baseline.report.runs import (
    ReportError,
    Run,
    check_comparable,
    find_runs,
    group_runs,
    read_run,
    text_of,
)
from gwpf_baseline.utils import ConfigError

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
_BITS = ("uplink_bits_per_parameter", "downlink_bits_per_parameter")
_MISSING = "–"
# Okabe and Ito's colours, which the colour-blind can tell apart, with grey instead of
# their yellow, which is hard to see on white. The line styles are a second help.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#808080",
)
_LINES = ("-", "--", "-.", ":")
_PLAIN = StrMethodFormatter("{x:,g}")


Groups = Mapping[str, Sequence[Run]]
Row = dict[str, Any]


# ---- calculating --------------------------------------------------------------------


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
        "traffic_ratio": sum(map(traffic, last)) / dense if dense else None,
        "frozen_fraction": _column_mean(group, "frozen_fraction"),
        "compute_seconds": _compute(group),
        "compute_overhead": _overhead(group, runs),
        "modelled_seconds": _mean(record.modelled_seconds for record in last),
        **{key: _column_mean(group, key) for key in _BITS},
        "total_csr_bytes": _mean(sum(values) for values in csr if values),
        "final_mean_accuracy": _mean(values[-1] for values in means if values),
    }
    if target is not None:
        firsts = [first_reaching(run, target) for run in group]
        reached = [record for record in firsts if record is not None]
        row |= {
            "target": target,
            "reached": len(reached),
            "rounds_to_target": _mean(record.round for record in reached),
            "bytes_to_target": _mean(map(traffic, reached)),
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


# ---- showing ------------------------------------------------------------------------


class Section(NamedTuple):
    """A table for people.

    Parameters
    ----------
    title : str
        What stands above it.
    note : str
        What stands below it: how to read it.
    head : list of str
        Names of the columns.
    rows : list of list of str
        The cells; the first of a row is its label.
    """

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def lay_out(rows: Sequence[Row], metric: str) -> list[Section]:
    """Divide the table into some that fit on a screen, with cells to be read.

    Parameters
    ----------
    rows : sequence of dict
        As of `summarise`.
    metric : {"accuracy", "perplexity"}
        What the runs are measured by.

    Returns
    -------
    list of Section
        Without the columns in which no row has a value, and the sections without a
        column.
    """
    digits = 2 if metric == "perplexity" else 4

    def score(value: float | None) -> str:
        fits = value is not None and value < 1e6
        return f"{value:.{digits}f}" if fits else _number(value)

    def final(row: Row) -> str:
        return f"{score(row[f'final_{metric}'])} ± {score(row[f'final_{metric}_std'])}"

    def reached(row: Row) -> str:
        return f"{row['reached']}/{row['seeds']}"

    result = {
        "seeds": lambda row: str(row["seeds"]),
        f"final {metric}": final,
        "best": lambda row: score(row[f"best_{metric}"]),
        "mean network": lambda row: score(row["final_mean_accuracy"]),
        "MB up": lambda row: _megabytes(row["total_uplink_bytes"]),
        "MB down": lambda row: _megabytes(row["total_downlink_bytes"]),
        "to FedAvg": lambda row: _ratio(row["traffic_ratio"]),
        "× fewer": lambda row: _factor(row["traffic_ratio"]),
    }
    to_target = {
        "reached": reached,
        "rounds": lambda row: _rounds(row["rounds_to_target"]),
        "MB both ways": lambda row: _megabytes(row["bytes_to_target"]),
        "modelled s": lambda row: _number(row["modelled_seconds_to_target"]),
    }
    cost = {
        "mean frozen": lambda row: _percent(row["frozen_fraction"]),
        "compute s": lambda row: _number(row["compute_seconds"]),
        "against FedAvg": lambda row: _percent(row["compute_overhead"], "+"),
        "modelled s": lambda row: _number(row["modelled_seconds"]),
    }
    bandwidth = {
        "bits up": lambda row: _number(row[_BITS[0]]),
        "bits down": lambda row: _number(row[_BITS[1]]),
        "MB up as CSR": lambda row: _megabytes(row["total_csr_bytes"]),
    }
    target = rows[0].get("target")
    sections = [
        _section(
            "Result",
            "Means over the seeds, ± their sample standard deviation. To FedAvg: bytes "
            "both ways ÷ what FedAvg would have sent.",
            result,
            rows,
        ),
        _section(
            "Bandwidth",
            "Bits for each parameter, of a client in a round on average; FedAvg's are "
            "32. As CSR: had clients sent compressed sparse rows.",
            bandwidth,
            rows,
        ),
        _section(
            "Cost",
            "Compute: of a client in the median round, and how much more than FedAvg's."
            " Modelled: how long the run would take over the configured network.",
            cost,
            rows,
        ),
    ]
    if target is not None:
        note = "Reached: of the seeds; the rest are means over those that did."
        sections.insert(1, _section(_aim(metric, target), note, to_target, rows))
    return [section for section in sections if len(section.head) > 1]


def _aim(metric: str, target: float) -> str:
    bound = "at most" if metric == "perplexity" else "at least"
    return f"To a test {metric} of {bound} {target:g}"


def _section(
    title: str,
    note: str,
    columns: Mapping[str, Callable[[Row], str]],
    rows: Sequence[Row],
) -> Section:
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    filled = {
        name: column for name, column in cells.items() if set(column) != {_MISSING}
    }
    labels = [row["label"] for row in rows]
    return Section(
        title,
        note,
        ["", *filled],
        [list(row) for row in zip(labels, *filled.values(), strict=True)],
    )


def _number(value: float | None) -> str:
    """Write a number with three digits, but never round a whole one's away."""
    if value is None:
        return _MISSING
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _rounds(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.1f}".removesuffix(".0")


def _megabytes(value: float | None) -> str:
    return _number(value if value is None else value / 1e6)


def _percent(value: float | None, sign: str = "") -> str:
    return _MISSING if value is None else f"{value:{sign}.1%}"


def _ratio(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3f}"


def _factor(ratio: float | None) -> str:
    return f"{1 / ratio:.1f}" if ratio else _MISSING


def print_sections(sections: Iterable[Section], console: Console) -> None:
    """Print the tables.

    Parameters
    ----------
    sections : iterable of Section
        As of `lay_out`.
    console : Console
        Where to.
    """
    for section in sections:
        table = Table(
            title=section.title,
            title_justify="left",
            caption=section.note,
            caption_justify="left",
            box=SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        # Labels and titles may be broken between words, numbers not at all.
        words = (word for row in section.rows for word in row[0].split())
        table.add_column(min_width=max(map(len, words)))
        for name in section.head[1:]:
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in section.rows:
            # As Text, brackets in a label are not taken for rich's markup.
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()


def write_report(
    groups: Groups, rows: Sequence[Row], sections: Iterable[Section], folder: Path
) -> None:
    """Write ``report.md``, ``report.csv`` and the figures.

    Parameters
    ----------
    groups : mapping of str to sequence of Run
        As of `group_runs`.
    rows : sequence of dict
        As of `summarise`.
    sections : iterable of Section
        As of `lay_out`.
    folder : pathlib.Path
        Where to; made if need be. An earlier report in it is replaced.

    Raises
    ------
    ConfigError
        A folder that cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(groups, rows[0].get("target"), folder)
        text = _markdown(groups, sections, figures)
        (folder / "report.md").write_text(text, encoding="utf-8")
        columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
        with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, columns, extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise ConfigError(
            "output", folder, f"a folder to write to ({error.strerror})"
        ) from error


def _markdown(
    groups: Groups, sections: Iterable[Section], figures: Iterable[str]
) -> str:
    task = next(iter(groups.values()))[0].task
    common = " ".join(
        f"{key.removesuffix('.name')}={text_of(value)}"
        for key, value in task.items()
        if key.endswith(".name")
        or key.partition(".")[0] in ("num_clients", "partition")
    )
    blocks = ["# Report", f"All runs: {_code(common)}."]
    for section in sections:
        table = [section.head, ["---"] + ["---:"] * (len(section.head) - 1)]
        table += [[_code(label), *cells] for label, *cells in section.rows]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        blocks += [f"## {section.title}", "\n".join(lines), section.note]
    blocks += [f"![{name}]({name})" for name in figures]
    runs = [
        f"- {_code(label)}: {', '.join(_code(str(run.folder)) for run in group)}"
        for label, group in groups.items()
    ]
    return "\n\n".join([*blocks, "## Runs", "\n".join(runs)]) + "\n"


def _code(text: str) -> str:
    # Even within backticks a bar would end the cell.
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def draw_figures(groups: Groups, target: float | None, folder: Path) -> list[str]:
    """Draw each figure for which there is anything to draw.

    Parameters
    ----------
    groups : mapping of str to sequence of Run
        As of `group_runs`.
    target : float, optional
        Is marked, if given.
    folder : pathlib.Path
        Where to write the files; figures of an earlier report that are not drawn again
        are removed.

    Returns
    -------
    list of str
        The files' names.
    """
    metric = next(iter(groups.values()))[0].metric

    def score(record: RoundRecord) -> float | None:
        return metric_of(record, metric)

    def number(record: RoundRecord) -> float | None:
        return record.round

    def sent(record: RoundRecord) -> float | None:
        # A logarithm has no place for nothing sent, nor for no time.
        return traffic(record) or None

    def elapsed(record: RoundRecord) -> float | None:
        return record.modelled_seconds or None

    def frozen(record: RoundRecord) -> float | None:
        return record.frozen_fraction

    def bits(record: RoundRecord) -> float | None:
        both = (record.uplink_bits_per_parameter, record.downlink_bits_per_parameter)
        return sum(value or 0.0 for value in both) or None

    x_axes = {
        "rounds": (number, "round", None),
        "bytes": (sent, "bytes sent so far, both ways", EngFormatter("B")),
        "time": (elapsed, "modelled time so far in seconds", _PLAIN),
    }
    drawn = []
    for name, over, y in (
        ("metric_rounds.png", "rounds", score),
        ("metric_bytes.png", "bytes", score),
        ("metric_time.png", "time", score),
        ("frozen.png", "rounds", frozen),
        ("bandwidth.png", "rounds", bits),
    ):
        x, x_label, units = x_axes[over]
        curves = {label: average_curve(groups[label], x, y) for label in groups}
        if not any(curve.x for curve in curves.values()):
            (folder / name).unlink(missing_ok=True)
            continue
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        _draw_curves(axes, curves)
        if y is frozen:
            axes.set_ylabel("frozen share of the parameters")
            axes.set_ylim(-0.02, 1.02)
        elif y is bits:
            axes.set_ylabel("bits a parameter and round, both ways")
            _make_logarithmic(axes, "y", _PLAIN)
        else:
            axes.set_ylabel(f"test {metric}")
            if target is not None:
                axes.axhline(target, color="0.5", linewidth=0.8, label="target")
            if metric == "perplexity":
                _make_logarithmic(axes, "y", _PLAIN)
        if units is None:
            label_rounds(axes)
        else:
            axes.set_xlabel(x_label)
            _make_logarithmic(axes, "x", units)
        _add_legend(figure)
        figure.savefig(folder / name, dpi=150)
        drawn.append(name)
    return drawn


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw a line a group, which looks the same in every figure, and their ranges."""
    for number, (label, curve) in enumerate(curves.items()):
        if not curve.x:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        # The ninth group has the first one's colour, but not its style.
        line = _LINES[(number + number // len(_COLOURS)) % len(_LINES)]
        draw(axes, curve.x, curve.mean, line, label, color=colour)
        if curve.low != curve.high:
            axes.fill_between(
                curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )


def _make_logarithmic(axes: Axes, name: str, units: Formatter) -> None:
    """Scale an axis, with as many labels as have room and no fewer than two."""
    axes.set(**{f"{name}scale": "log"})
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    axis = axes.xaxis if name == "x" else axes.yaxis
    if high < 10 * low:
        axis.set_major_locator(MaxNLocator(6))
    else:
        axis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high < 200 * low else (1, 3))
        )
    axis.set_major_formatter(units)
    axis.set_minor_formatter(NullFormatter())


def _add_legend(figure: Figure) -> None:
    """Name the lines under the axes, in a figure tall enough for both."""
    lines, labels = figure.axes[0].get_legend_handles_labels()
    labels = [textwrap.fill(label, 80) for label in labels]
    columns = 2 if max(map(len, labels)) <= 40 else 1
    rows = sum(1 + label.count("\n") for label in labels) / columns
    figure.set_size_inches(7, 3.8 + 0.2 * rows)
    figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3,
    )


# ---- command line -------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what the user got wrong ends in one line and code 2.

    Parameters
    ----------
    arguments : sequence of str, optional
        Instead of the command line's.
    """
    parser = _Parser(
        prog="python -m gwpf_baseline.report", description="Compare finished runs."
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run's folder, or one with runs below",
    )
    parser.add_argument(
        "--target", type=float, help="an accuracy or perplexity to reach"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report"), help="where to write (report)"
    )
    options = parser.parse_args(arguments)
    try:
        runs = [read_run(folder) for folder in find_runs(options.runs)]
        check_comparable(runs)
        metric = runs[0].metric
        if options.target is not None:
            check_target("target", options.target, metric)
        groups = group_runs(runs)
        rows = summarise(groups, options.target)
        sections = lay_out(rows, metric)
        write_report(groups, rows, sections, options.output)
    except (ReportError, ConfigError) as error:
        parser.error(str(error))
    console = Console()
    print_sections(sections, console)
    console.print(f"The report is in {options.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
