"""Finished runs side by side: ``python -m gwpf_baseline.report RUN RUN``.

Runs that differ in nothing but their seed are one group: a row in the tables, a line in
the figures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from gwpf_baseline.records.target import check_target
from gwpf_baseline.report.groups import check_comparable, group_runs
from gwpf_baseline.report.measures import summarise
from gwpf_baseline.report.runs import ReportError, find_runs, read_run
from gwpf_baseline.report.tables import lay_out, print_sections
from gwpf_baseline.report.writing import write_report
from gwpf_baseline.utils import ConfigError, escaped, one_line


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {escaped(message)}\n")


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
    where = one_line(options.output)
    console.print(f"The report is in {where}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
