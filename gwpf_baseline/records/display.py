"""What a run shows on the terminal: its progress, and a table at the end."""

import math
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from gwpf_baseline.records.history import RoundRecord, perplexity


class Display:
    """The terminal's view of a run, used as a context manager.

    On a terminal it is a live bar. Elsewhere, in a log file or a pipe, it is a plain
    line for the first round, then at about every tenth of the rounds, and for the last.

    Parameters
    ----------
    num_rounds : int
        The rounds of the whole run, those before it was resumed included.
    console : Console
        Where to show it.
    metric : {"accuracy", "perplexity"}
        What the run is measured by.

    Attributes
    ----------
    console : Console
        Whatever else is shown during the run has to go through it, log records by a
        ``RichHandler``, or the live bar is garbled.
    """

    def __init__(
        self,
        num_rounds: int,
        console: Console,
        metric: str = "accuracy",
    ) -> None:
        self.console = console
        self._num_rounds = num_rounds
        self._metric = metric
        self._measured = ""
        self._tenths = -1
        self._progress = Progress(
            MofNCompleteColumn(),
            # The bar takes what the text leaves, so that 80 columns hold the line.
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            # The default forgets rounds older than 30 s, and with them the ETA.
            speed_estimate_period=math.inf,
            disable=not self.console.is_interactive,
            expand=True,
        )
        self._task = self._progress.add_task(
            "", total=num_rounds, status="waiting for the first round"
        )

    def __enter__(self) -> "Display":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()

    def update(self, record: RoundRecord) -> None:
        """Show a round.

        Parameters
        ----------
        record : RoundRecord
            The round that has just ended. If it was not evaluated, what was measured
            in the last round that was stays on show.
        """
        if self._metric == "perplexity" and record.test_loss is not None:
            self._measured = f"ppl {perplexity(record.test_loss):.1f}"
        elif record.test_accuracy is not None:
            self._measured = f"acc {record.test_accuracy:.3f}"
        status = self._status(record)
        self._progress.update(self._task, completed=record.round, status=status)
        tenths = 10 * record.round // self._num_rounds
        if self._progress.disable and tenths > self._tenths:
            self._tenths = tenths
            line = f"{record.round}/{self._num_rounds} {status}"
            self.console.print(
                f"round {line} {_duration(record.seconds)}",
                highlight=False,
                soft_wrap=True,
            )

    def _status(self, record: RoundRecord) -> str:
        parts = [
            f"up {decimal(record.cumulative_uplink_bytes)}",
            f"down {decimal(record.cumulative_downlink_bytes)}",
        ]
        if record.frozen_fraction is not None:
            parts.insert(0, f"frozen {record.frozen_fraction:.0%}")
        if self._measured:
            parts.insert(0, self._measured)
        return " ".join(parts)


def closing_table(summary: dict[str, Any]) -> Table:
    """Lay a run's summary out for the terminal.

    Parameters
    ----------
    summary : dict
        As of `History.summary`.

    Returns
    -------
    Table
        It fits into 80 columns.
    """
    metric = summary["metric"]
    digits = 4 if metric == "accuracy" else 1
    bits = [
        _number(summary[f"{way}link_bits_per_parameter"], 2) for way in ("up", "down")
    ]
    ratio = summary["traffic_ratio"]
    against_dense = "-" if ratio is None else f"{ratio:.3f}"
    if ratio and ratio < 0.95:
        against_dense += f" ({1 / ratio:.1f}x fewer bytes)"
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("method", summary["method"]),
        ("dataset", summary["dataset"]),
        ("model", summary["model"]),
        (f"final {metric}", _number(summary[f"final_{metric}"], digits)),
        (f"best {metric}", _number(summary[f"best_{metric}"], digits)),
        ("sent by clients", decimal(summary["total_uplink_bytes"])),
        ("sent to clients", decimal(summary["total_downlink_bytes"])),
        ("ratio to dense", against_dense),
        ("bits a parameter", f"{bits[0]} up, {bits[1]} down, a client and round"),
        ("time", _duration(summary["seconds"])),
    ):
        # As Text, brackets in a name are not taken for rich's markup.
        table.add_row(name, Text(str(value)))
    return table


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if value < 1e6 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
