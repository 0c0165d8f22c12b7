"""What the benchmarks share: their options, their progress, and a table."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")

REPOSITORY = Path(__file__).resolve().parents[1]


def parser(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Build a command line of whole numbers.

    Parameters
    ----------
    description : str, optional
        A module's docstring; its first line is shown.
    **defaults : int
        Each option and its default.

    Returns
    -------
    argparse.ArgumentParser
        To which further options can be added.
    """
    result = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    for name, default in defaults.items():
        option = "--" + name.replace("_", "-")
        result.add_argument(option, type=int, default=default, help=f"({default})")
    return result


def add_data_option(options: argparse.ArgumentParser) -> None:
    """Add ``--data``, the folder of real datasets."""
    beside = REPOSITORY.parent / "shared" / "data"
    root = Path(os.environ.get("GWPF_DATA", beside))
    options.add_argument(
        "--data", type=Path, default=root, help="has mnist/ and cifar10/ in it"
    )


def announced(items: Iterable[T], name: Callable[[T], str] = str) -> Iterator[T]:
    """Go through what is measured, saying on stderr what it is and how much is left.

    Parameters
    ----------
    items : iterable
        What is measured.
    name : callable, default ``str``
        Returns what to call an item.

    Yields
    ------
    object
        The items.
    """
    ahead = list(items)
    for number, item in enumerate(ahead, 1):
        print(f"{number} of {len(ahead)}: {name(item)}", file=sys.stderr, flush=True)
        yield item


def show(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    options: argparse.Namespace,
) -> None:
    """Print a table, and under it the parameters that it was measured with.

    Parameters
    ----------
    title : str
        The title.
    columns : sequence of str
        Names of the columns.
    rows : sequence of sequences
        A row's cells; floats are shown with three digits.
    options : argparse.Namespace
        The parameters.
    """
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    console = Console(width=100)
    console.print(table)
    values = {k: v for k, v in vars(options).items() if not isinstance(v, Path)}
    console.print(", ".join(f"{k}={v}" for k, v in values.items()), highlight=False)


def _text(cell: Any) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
