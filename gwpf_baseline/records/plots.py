"""The plots of a run."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from gwpf_baseline.records.history import RoundRecord


def plot_history(records: Sequence[RoundRecord], folder: Path) -> None:
    """Draw ``accuracy.png``, ``traffic.png`` and ``frozen.png``.

    Parameters
    ----------
    records : sequence of RoundRecord
        The run's rounds.
    folder : Path
        Where to write the files.
    """
    _plot_accuracy(records, folder)
    _plot_traffic(records, folder)
    _plot_frozen(records, folder)


def _plot_accuracy(records: Sequence[RoundRecord], folder: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    measured, accuracies = _measured(records, "test_accuracy")
    draw(by_round, [record.round for record in measured], accuracies)
    traffic = [
        record.cumulative_uplink_bytes + record.cumulative_downlink_bytes
        for record in measured
    ]
    draw(by_bytes, traffic, accuracies)
    label_rounds(by_round)
    by_round.set_ylabel("test accuracy")
    by_bytes.set_xlim(left=0)
    by_bytes.set_xlabel("bytes sent so far, both ways")
    by_bytes.xaxis.set_major_formatter(EngFormatter("B"))
    if not accuracies:
        _say(figure, "No round was evaluated.")
    figure.savefig(folder / "accuracy.png", dpi=150)


def _plot_traffic(records: Sequence[RoundRecord], folder: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    # Nothing has been sent before round 1, and a logarithm has no place for that.
    sent = [record for record in records if record.dense_bytes]
    rounds = [record.round for record in sent]
    for column, label, style in (
        ("dense_bytes", "FedAvg would have sent, both ways", "k:"),
        ("cumulative_downlink_bytes", "sent to clients", "C1"),
        # Dashed, so that the line below shows through where both are equal.
        ("cumulative_uplink_bytes", "sent by clients", "C0--"),
    ):
        draw(axes, rounds, [getattr(r, column) for r in sent], style, label)
    label_rounds(axes)
    axes.set_ylabel("bytes so far")
    if sent:
        axes.set_yscale("log")
        # Whole decades: only these are labelled, and a short run may span none.
        low, high = (math.log10(limit) for limit in axes.get_ylim())
        axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
        axes.yaxis.set_major_formatter(EngFormatter("B"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend()
    else:
        _say(figure, "Nothing was sent.")
    figure.savefig(folder / "traffic.png", dpi=150)


def _plot_frozen(records: Sequence[RoundRecord], folder: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for column, label, style in (
        ("frozen_fraction", "frozen", "C0"),
        ("sent_fraction", "sent by a client", "C1"),
    ):
        measured, shares = _measured(records, column)
        if shares:
            draw(axes, [r.round for r in measured], shares, style, label)
    label_rounds(axes)
    axes.set_ylabel("share of the parameters")
    axes.set_ylim(-0.02, 1.02)
    if axes.lines:
        axes.legend()
    else:
        _say(figure, "This method reports no frozen and no sent share.")
    figure.savefig(folder / "frozen.png", dpi=150)


def _measured(
    records: Iterable[RoundRecord], column: str
) -> tuple[list[RoundRecord], list[float]]:
    """Pick the records that have a value in the column, and these values."""
    picked = [record for record in records if getattr(record, column) is not None]
    return picked, [getattr(record, column) for record in picked]


def draw(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    style: str = "-",
    label: str | None = None,
    **line: Any,
) -> None:
    """Draw a line; few points are marked, since a single one would not show.

    Parameters
    ----------
    axes : Axes
        Where to draw it.
    x, y : sequence of float
        Its points.
    style : str
        Matplotlib's short form of its colour, its style or both, such as ``"C0--"``.
    label : str, optional
        Its name in the legend.
    **line
        Further properties of Matplotlib's ``Line2D``.
    """
    line |= {"marker": "o" if len(x) <= 30 else "", "markersize": 3}
    axes.plot(x, y, style, label=label, linewidth=1.5, **line)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def label_rounds(axes: Axes) -> None:
    """Prepare an axis of rounds.

    Parameters
    ----------
    axes : Axes
        Its x axis is meant; its lines have to be drawn before.
    """
    axes.set_xlim(left=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _say(figure: Figure, text: str) -> None:
    """Put a sentence where the curves would be."""
    for axes in figure.axes:
        axes.set_axis_off()
    figure.text(0.5, 0.5, text, ha="center", va="center")
