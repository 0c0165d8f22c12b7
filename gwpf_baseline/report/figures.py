"""The figures of a report."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    Formatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.records.plots import draw, label_rounds
from gwpf_baseline.records.target import metric_of
from gwpf_baseline.report.groups import all_but_interval
from gwpf_baseline.report.measures import (
    WAYS,
    Axis,
    Curve,
    Groups,
    average_curve,
    layer_curves,
    split,
    summarise,
    traffic,
)

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
_MARKERS = "osD^v"
# Parts of bytes: their name, and a blue for those up, an orange for those down.
_PARTS = {
    "value": ("values", "#0072B2", "#D55E00"),
    "position": ("positions", "#56A5D6", "#EE9A5C"),
    "buffer": ("buffers", "#A3CFEA", "#F7C9A6"),
    "overhead": ("overhead", "#DCECF6", "#FBE7D9"),
}
# Layers up to this many are named in a legend, more by a scale.
_MOST_NAMED = 12
_PLAIN = StrMethodFormatter("{x:,g}")


class _XAxis(NamedTuple):
    of: Axis
    label: str
    units: Formatter | None = None  # logarithmic if there are any


class Kind(NamedTuple):
    """A figure of curves.

    Parameters
    ----------
    x : tuple
        What of a round is drawn along the x axis, its label and its units.
    y : callable
        What of a round is drawn, given the record and the metric of the runs.
    y_label : str
        Its label; ``{metric}`` stands for what the runs are measured by.
    """

    x: _XAxis
    y: Callable[[RoundRecord, str], float | None]
    y_label: str


def _frozen(record: RoundRecord, _: str) -> float | None:
    return record.frozen_fraction


def _bits(record: RoundRecord, _: str) -> float | None:
    both = (record.uplink_bits_per_parameter, record.downlink_bits_per_parameter)
    return sum(value or 0.0 for value in both) or None


# A logarithm has no place for nothing sent, nor for no time.
_ROUNDS = _XAxis(lambda record: record.round, "round")
_BYTES = _XAxis(
    lambda record: traffic(record) or None,
    "bytes sent so far, both ways",
    EngFormatter("B"),
)
_TIME = _XAxis(
    lambda record: record.modelled_seconds or None,
    "modelled time so far in seconds",
    _PLAIN,
)
_CURVES = {
    "metric_rounds": Kind(_ROUNDS, metric_of, "test {metric}"),
    "metric_bytes": Kind(_BYTES, metric_of, "test {metric}"),
    "metric_time": Kind(_TIME, metric_of, "test {metric}"),
    "frozen": Kind(_ROUNDS, _frozen, "frozen share of the parameters"),
    "bandwidth": Kind(_ROUNDS, _bits, "bits a parameter and round, both ways"),
}
# What is drawn of each layer, by its column.
_LAYERS = {
    "nonzero": "non-zero share of each layer",
    "perturbation": "mean effective perturbation of each layer",
    "stabilised": "share of each layer that has come to rest",
    "value": "value of one parameter of each layer",
}
FIGURES = (*_CURVES, "to_target", "split", *_LAYERS)


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
    files = {name: folder / f"{name}.png" for name in FIGURES}
    for file in files.values():
        file.unlink(missing_ok=True)
    return [
        file.name
        for name, file in files.items()
        if draw_figure(name, groups, target, file)
    ]


def draw_figure(name: str, groups: Groups, target: float | None, file: Path) -> bool:
    """Draw a figure, a line or a bar a group.

    Parameters
    ----------
    name : str
        One of `FIGURES`.
    groups : mapping of str to sequence of Run
        Each group under its name in the legend.
    target : float, optional
        Is marked, if given, where the figure shows what the runs are measured by.
    file : pathlib.Path
        Where to write it.

    Returns
    -------
    bool
        Whether there was anything to draw; if not, no file is written.
    """
    if name == "to_target":
        return _draw_to_target(groups, target, file)
    if name == "split":
        return _draw_split(groups, file)
    if name in _LAYERS:
        return _draw_layers(name, groups, file)
    kind = _CURVES[name]
    metric = next(iter(groups.values()))[0].metric
    curves = {
        label: average_curve(group, kind.x.of, lambda record: kind.y(record, metric))
        for label, group in groups.items()
    }
    if not any(curve.x for curve in curves.values()):
        return False
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    _draw_curves(axes, curves)
    axes.set_ylabel(kind.y_label.format(metric=metric))
    if name == "frozen":
        axes.set_ylim(-0.02, 1.02)
    elif name == "bandwidth":
        _make_logarithmic(axes, "y", _PLAIN)
    else:
        if target is not None:
            axes.axhline(target, color="0.5", linewidth=0.8, label="target")
        if metric == "perplexity":
            _make_logarithmic(axes, "y", _PLAIN)
    if kind.x.units is None:
        label_rounds(axes)
    else:
        axes.set_xlabel(kind.x.label)
        _make_logarithmic(axes, "x", kind.x.units)
    _add_legend(figure)
    figure.savefig(file, dpi=150)
    return True


def caption(name: str, metric: str) -> str:
    """Return in words what a figure shows.

    Parameters
    ----------
    name : str
        One of `FIGURES`.
    metric : {"accuracy", "perplexity"}
        What the runs are measured by.

    Returns
    -------
    str
        Such as ``"test accuracy over bytes sent so far, both ways"``.
    """
    if name == "to_target":
        return (
            "bytes and rounds to the target, a line for each method's intervals; "
            "hollow where not all seeds reach it"
        )
    if name == "split":
        return "what bytes are spent on, and how many they are, both ways"
    if name in _LAYERS:
        return f"{_LAYERS[name]} over round"
    kind = _CURVES[name]
    return f"{kind.y_label.format(metric=metric)} over {kind.x.label}"


def _draw_to_target(groups: Groups, target: float | None, file: Path) -> bool:
    """Draw a point a group, and a line through those that differ in their interval."""
    rows = [] if target is None else summarise(groups, target)
    # A logarithm has no place for nothing sent.
    if not any(row["bytes_to_target"] for row in rows):
        return False
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(rows):
        if row["bytes_to_target"]:
            point = (row["rounds_to_target"], row["bytes_to_target"])
            key = all_but_interval(groups[row["label"]][0])
            curves.setdefault(key, []).append(point)
            colour, marker = _look(number, _MARKERS)
            # A mean of the lucky ones is not to be read as one of all.
            fill = "full" if row["reached"] == row["seeds"] else "none"
            axes.plot(*point, marker, color=colour, fillstyle=fill, label=row["label"])
    lines = [sorted(points) for points in curves.values()]
    axes.add_collection(LineCollection(lines, colors="0.8", zorder=0))
    axes.set_xlabel("rounds to the target")
    axes.set_ylabel("bytes to the target, both ways")
    _make_logarithmic(axes, "x", _PLAIN)
    _make_logarithmic(axes, "y", EngFormatter("B"))
    _add_legend(figure)
    figure.savefig(file, dpi=150)
    return True


def _draw_split(groups: Groups, file: Path) -> bool:
    """Draw a bar a group: the shares of what its bytes are spent on, up and down."""
    splits = {label: split(group) for label, group in groups.items()}
    totals = [sum(sum(way.values()) for way in one.values()) for one in splits.values()]
    if not any(totals):
        return False
    labels = [label if len(label) <= 40 else f"{label[:36]} ..." for label in splits]
    figure = Figure((7, min(1.5 + 0.4 * len(splits), 40)), layout="constrained")
    axes = figure.add_subplot()
    places, ends = range(len(splits)), [0.0] * len(splits)
    for number, way in enumerate(WAYS):
        for part, (name, *colours) in _PARTS.items():
            shares = [
                one[way][part] / (total or 1)
                for one, total in zip(splits.values(), totals, strict=True)
            ]
            if any(shares):
                label = f"{name} {way.removesuffix('link')}"
                axes.barh(places, shares, left=ends, color=colours[number], label=label)
            ends = [end + share for end, share in zip(ends, shares, strict=True)]
    axes.set_yticks(places, labels, parse_math=False)
    axes.invert_yaxis()  # the first group on top, as in a table
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of all bytes")
    sizes = axes.secondary_yaxis("right")
    sizes.set_yticks(places, [EngFormatter("B", places=1)(total) for total in totals])
    sizes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)
    return True


def _draw_layers(column: str, groups: Groups, file: Path) -> bool:
    """Draw a panel a group, and in it a line a layer, the first ones darkest."""
    panels = {label: layer_curves(group, column) for label, group in groups.items()}
    panels = {label: curves for label, curves in panels.items() if curves}
    if not panels:
        return False
    rows = math.ceil(len(panels) / 2)
    figure = Figure((7, min(1.2 + 2.6 * rows, 40)), layout="constrained")
    grid = figure.subplots(
        rows, min(2, len(panels)), sharex=True, sharey=True, squeeze=False
    )
    most = max(map(len, panels.values()))
    # The end of the scale is a yellow that is hard to see on white.
    shades = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, most)))
    lines: dict[str, Line2D] = {}
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (label, curves) in zip(grid.flat, panels.items(), strict=False):
        title = textwrap.shorten(label, 45, placeholder=" ...")
        axes.set_title(title, fontsize=10, parse_math=False)
        for number, (layer, (rounds, values)) in enumerate(curves.items()):
            (lines[layer],) = axes.plot(
                rounds, values, color=shades(number), linewidth=1.2
            )
        label_rounds(axes)
        axes.tick_params(labelbottom=True)  # also where no panel is below
    figure.supylabel(_LAYERS[column], fontsize=10)
    if len(lines) <= _MOST_NAMED:
        legend = figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    else:
        scale = ScalarMappable(Normalize(1, most), shades)
        figure.colorbar(scale, ax=list(grid.flat), label="layer, from the input on")
    figure.savefig(file, dpi=150)
    return True


def _draw_curves(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw a line a group, which looks the same in every figure, and their ranges."""
    for number, (label, curve) in enumerate(curves.items()):
        if not curve.x:
            continue
        colour, line = _look(number, _LINES)
        draw(axes, curve.x, curve.mean, line, label, color=colour)
        if curve.low != curve.high:
            axes.fill_between(
                curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
            )


def _look(number: int, styles: Sequence[str]) -> tuple[str, str]:
    """Return a group's colour and style, the same in every figure."""
    # The ninth group has the first one's colour, but not its style.
    style = styles[(number + number // len(_COLOURS)) % len(styles)]
    return _COLOURS[number % len(_COLOURS)], style


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
    # Not those that Matplotlib would name: it leaves out what begins with "_".
    lines = figure.axes[0].get_lines()
    # A value such as 1e-05 is not broken at its hyphen.
    labels = [
        textwrap.fill(
            str(line.get_label()),
            80,
            break_on_hyphens=False,
            max_lines=5,
            placeholder=" ...",
        )
        for line in lines
    ]
    columns = 2 if max(map(len, labels)) <= 36 else 1
    rows = sum(1 + label.count("\n") for label in labels) / columns
    # Matplotlib draws no more than 2**16 pixels, and nobody looks at as many.
    figure.set_size_inches(7, min(3.8 + 0.2 * rows, 40))
    legend = figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may have dollars
