"""The tables of a report, for people: on the terminal and in Markdown."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gwpf_baseline.report.measures import BITS, CLIENTS, PARTS, WAYS, Row

_MISSING = "–"
_Write = Callable[[float | None], str]


# ---- cells --------------------------------------------------------------------------


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


def _factor(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.1f}"


def _accuracy(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _perplexity(value: float | None) -> str:
    fits = value is not None and value < 1e6
    return f"{value:.2f}" if fits else _number(value)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


# Each column's key in a row, and how its numbers are written.
_COLUMNS: dict[str, tuple[str, _Write]] = {
    "seeds": ("seeds", str),
    "mean network": ("final_mean_accuracy", _accuracy),
    "MB up": ("total_uplink_bytes", _megabytes),
    "MB down": ("total_downlink_bytes", _megabytes),
    "MB both ways": ("total_bytes", _megabytes),
    "to FedAvg": ("traffic_ratio", _ratio),
    "× fewer": ("traffic_ratio", lambda ratio: _factor(_inverse(ratio))),
    "rounds to target": ("rounds_to_target", _rounds),
    "MB to target": ("bytes_to_target", _megabytes),
    "modelled s to target": ("modelled_seconds_to_target", _number),
    "bits up": (BITS[0], _number),
    "bits down": (BITS[1], _number),
    "MB up as CSR": ("total_csr_bytes", _megabytes),
    "file bits": ("mask_bits_per_parameter", _number),
    "mean frozen": ("frozen_fraction", _percent),
    "last frozen": ("last_frozen_fraction", _percent),
    "compute s": ("compute_seconds", _number),
    "against FedAvg": ("compute_overhead", lambda share: _percent(share, "+")),
    "modelled s": ("modelled_seconds", _number),
    "slowest s": (CLIENTS[0], _number),
    "median s": (CLIENTS[1], _number),
}
_SHARES: dict[str, tuple[str, _Write]] = {
    f"{way.removesuffix('link')} {part}": (f"{way}_{part}_share", _percent)
    for way in WAYS
    for part in PARTS
}
_COLUMNS |= _SHARES
_FEWER = "× fewer "


def write_cell(row: Row, first: Row, column: str) -> str:
    """Write a number of a row for people.

    Parameters
    ----------
    row, first : dict
        As of `summarise`: the row, and the one that it is compared with.
    column : str
        ``final accuracy`` or ``final perplexity``, ``best``, ``reached``, a column of
        numbers such as ``MB up``, ``to first`` (bytes both ways ÷ the first row's), or
        ``× fewer`` and a column of numbers, for the first row's ÷ the row's. What a
        row has the deviation of is written with it.

    Returns
    -------
    str
        A dash if there is no such number.

    Raises
    ------
    KeyError
        There is no such column, or the rows lack what it needs.
    """
    metric = "perplexity" if "final_perplexity" in row else "accuracy"
    score = _perplexity if metric == "perplexity" else _accuracy
    if column == f"final {metric}":
        return _with_spread(row, f"final_{metric}", score)
    if column == "best":
        return score(row[f"best_{metric}"])
    if column == "reached":
        return f"{row['reached']}/{row['seeds']}"
    if column == "to first":
        return _ratio(_inverse(_quotient(first, row, "total_bytes")))
    if column not in _COLUMNS and column.startswith(_FEWER):
        key, _ = _COLUMNS[column.removeprefix(_FEWER)]
        return _factor(_quotient(first, row, key))
    return _with_spread(row, *_COLUMNS[column])


def _with_spread(row: Row, key: str, write: _Write) -> str:
    spread = row.get(f"{key}_std")
    return write(row[key]) + (f" ± {write(spread)}" if spread is not None else "")


def _quotient(first: Row, row: Row, key: str) -> float | None:
    return first[key] / row[key] if first[key] is not None and row[key] else None


# ---- tables -------------------------------------------------------------------------


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
    sections = [
        _section(
            "Result",
            "Means over the seeds, ± their sample standard deviation. To FedAvg: bytes "
            "both ways ÷ what FedAvg would have sent.",
            (
                *("seeds", f"final {metric}", "best", "mean network"),
                *("MB up", "MB down", "to FedAvg", "× fewer"),
            ),
            rows,
        ),
        _section(
            "Bandwidth",
            "Bits for each parameter, of a client in a round on average; FedAvg's are "
            "32. As CSR: had clients sent compressed sparse rows. File: what is left, "
            "a seed and a mask.",
            ("bits up", "bits down", "MB up as CSR", "file bits"),
            rows,
        ),
        _section(
            "Where bytes go",
            "Shares of what clients send (up) and are sent (down). Position: bitmaps. "
            "Overhead: headers, and what was refused.",
            _SHARES,
            rows,
        ),
        _section(
            "Cost",
            "Frozen: on average, and in the last round. Compute: of a client in the "
            "median round, and how much more than FedAvg's. Modelled: how long the run "
            "would take over the configured network; and the slowest and the median "
            "client of a round, on average.",
            (
                *("mean frozen", "last frozen"),
                *("compute s", "against FedAvg"),
                *("modelled s", "slowest s", "median s"),
            ),
            rows,
        ),
    ]
    target = rows[0].get("target")
    if target is not None:
        bound = "at most" if metric == "perplexity" else "at least"
        title = f"To a test {metric} of {bound} {target:g}"
        note = "Reached: of the seeds; the rest are means over those that did."
        columns = ["reached"]
        columns += [f"{what} to target" for what in ("rounds", "MB", "modelled s")]
        sections.insert(1, _section(title, note, columns, rows))
    return [section for section in sections if len(section.head) > 1]


def _section(
    title: str, note: str, columns: Iterable[str], rows: Sequence[Row]
) -> Section:
    cells = {name: [write_cell(row, rows[0], name) for row in rows] for name in columns}
    filled = {
        name: column for name, column in cells.items() if set(column) != {_MISSING}
    }
    labels = [row["label"] for row in rows]
    return Section(
        title,
        note,
        # The title names the target.
        ["", *(name.removesuffix(" to target") for name in filled)],
        [list(row) for row in zip(labels, *filled.values(), strict=True)],
    )


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
        # But for a word that would leave the numbers no room.
        table.add_column(min_width=min(40, max(map(len, words))), overflow="fold")
        for name in section.head[1:]:
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in section.rows:
            # As Text, brackets in a label are not taken for rich's markup.
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()


def as_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    Parameters
    ----------
    head : sequence of str
        Names of the columns; the first one is that of the labels.
    rows : iterable of sequence of str
        The cells. A bar in one does not end it.

    Returns
    -------
    str
        Its lines, without a newline at the end.
    """
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
