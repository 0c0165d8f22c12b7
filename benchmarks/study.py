"""Run what stands behind a page of results, and write its tables.

What has been run already is skipped, so a study that was stopped goes on where it was,
and within a run at its newest checkpoint, if it writes any (checkpoint_every). A run
that fails is named at the end and does not stop the others. The studies are in
studies/, a file a page; README.md says how they are written.

python benchmarks/study.py tasks --table resnet --jobs 2
"""

import argparse
import hashlib
import io
import logging
import os
import shlex
import sys
import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from _common import REPOSITORY, add_data_option
from rich.console import Console

from gwpf_baseline.config import check_same_run, checked, compose_config
from gwpf_baseline.main import run_experiment
from gwpf_baseline.records.checkpoint import CheckpointFolder
from gwpf_baseline.records.history import SUMMARY_FILE
from gwpf_baseline.records.target import check_target
from gwpf_baseline.report.figures import FIGURES, caption, draw_figure
from gwpf_baseline.report.groups import check_comparable
from gwpf_baseline.report.measures import Groups, summarise
from gwpf_baseline.report.runs import ReportError, read_run, text_of
from gwpf_baseline.report.tables import as_markdown, write_cell
from gwpf_baseline.utils import ConfigError

STUDIES = REPOSITORY / "benchmarks" / "studies"
_FIGURES = Path("docs", "results", "figures")


class StudyError(ValueError):
    """A study that cannot be read, or a table that cannot be written."""


class Job(NamedTuple):
    """A run: the folder that it belongs into, its seed and its command line.

    The folder is named after the overrides: whoever changes one runs it again.
    """

    folder: Path
    seed: int
    overrides: list[str]


@dataclass
class Table:
    """A table of a page, with the keys of its YAML.

    Parameters
    ----------
    columns : list of str
        As of `write_cell`, or keys of the configuration.
    rows : dict
        Each row's label, in Markdown, and its overrides. Among these, ``seeds: n``
        asks for the seeds 0 to n - 1 (default 3).
    common : dict, default none
        Overrides of all rows that do not name the same key.
    target : float, optional
        An accuracy or a perplexity to reach.
    figures : list of str, default none
        Of `FIGURES`, drawn of these rows.
    """

    columns: list[str]
    rows: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    figures: list[str] = field(default_factory=list)

    def jobs(
        self,
        common: Mapping[str, Any],
        given: Mapping[str, str],
        output: Path,
        most: int | None,
    ) -> dict[str, list[Job]]:
        """Return each row's runs; rows with the same overrides share theirs."""
        jobs = {}
        for label, own in self.rows.items():
            values = {**common, **self.common, **own}
            seeds = values.pop("seeds", 3)
            values |= given
            overrides = [f"{key}={text_of(value)}" for key, value in values.items()]
            name = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()
            jobs[label] = [
                Job(output / name[:12] / str(seed), seed, [*overrides, f"seed={seed}"])
                for seed in range(min(seeds, most or seeds))
            ]
        return jobs


@dataclass
class Study:
    """What stands behind a page, with the keys of its YAML.

    Parameters
    ----------
    page : Path
        The page, as of the root of the repository.
    tables : dict of str to Table
        The tables by the names that their markers in the page have.
    common : dict, default none
        Overrides of all rows of all tables that do not name the same key.
    """

    page: Path
    tables: dict[str, Table]
    common: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Turn what YAML has into a page and tables."""
        self.page = REPOSITORY / self.page
        tables: Mapping[str, Any] = self.tables
        self.tables = {name: Table(**table) for name, table in tables.items()}
        for name, table in self.tables.items():
            unknown = [figure for figure in table.figures if figure not in FIGURES]
            if unknown:
                raise ValueError(f"{name} has no figure {unknown[0]}")

    def choose(self, names: Sequence[str] | None) -> None:
        """Leave out the tables that are not among the names, where there are any."""
        for name in names or ():
            if name not in self.tables:
                known = ", ".join(self.tables)
                raise StudyError(f"no table {name}, only {known}")
        if names:
            self.tables = {name: self.tables[name] for name in names}


def read_study(name: str) -> Study:
    """Read a study, or say in one line why that cannot be."""
    file = STUDIES / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in STUDIES.glob("*.yaml")))
        raise StudyError(f"no such page, only {known}")
    try:
        return Study(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{file.name}: {' '.join(str(error).split())}") from error


# ---- running ------------------------------------------------------------------------


def run_all(jobs: Sequence[Job], at_a_time: int, data: Path) -> list[str]:
    """Run what is not there yet; return what to say of the runs that failed."""
    os.environ["GWPF_DATA"] = str(data.absolute())
    console, started, failed = Console(), time.monotonic(), []
    todo = [job for job in jobs if not (job.folder / SUMMARY_FILE).is_file()]
    # Processes that import but once, and that nothing of this one gets into.
    with ProcessPoolExecutor(
        at_a_time, get_context("spawn"), initializer=logging.disable
    ) as pool:
        running = {pool.submit(run_one, job): job for job in todo}
        try:
            for done in as_completed(running):
                job, error = running[done], done.result()
                if error:
                    failed.append(f"{job.folder}: {error}")
                minutes = (time.monotonic() - started) / 60
                line = f"{minutes:5.1f} min  {' '.join(job.overrides)}"
                console.print(line, highlight=False)
        except BrokenProcessPool:
            failed.append("a process was killed; what is not there is run next time")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_one(job: Job) -> str:
    """Run a job in this process, without Ray: to the bit the same results.

    Returns what has failed.
    """
    try:
        cfg = checked(compose_config([*job.overrides, "backend=local"]))
        if CheckpointFolder(job.folder).rounds():
            cfg.resume = str(job.folder)
            check_same_run(cfg)
        run_experiment(cfg, job.folder, Console(file=io.StringIO()))
    except ConfigError as error:
        return str(error)
    # Whatever it is: the others go on.
    except Exception:  # pylint: disable=broad-exception-caught
        return traceback.format_exc()[-4000:]
    return ""


def arguments_of(job: Job) -> list[str]:
    """Return the arguments of Python that do the same on Ray."""
    return ["-m", "gwpf_baseline.main", *job.overrides, f"hydra.run.dir={job.folder}"]


# ---- writing ------------------------------------------------------------------------


def replace_table(text: str, name: str, block: str) -> str:
    """Put a block between a table's markers.

    Parameters
    ----------
    text : str
        The page.
    name : str
        The table's name.
    block : str
        What belongs there.

    Returns
    -------
    str
        The page with it.

    Raises
    ------
    StudyError
        A marker that is missing.
    """
    for marker in (f"<!-- table {name} -->", f"<!-- end {name} -->"):
        if text.count(marker) != 1:
            raise StudyError(f"the page needs one line {marker}")
    before, start, rest = text.partition(f"<!-- table {name} -->")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    if not end:
        raise StudyError(f"<!-- end {name} --> has to follow its table")
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def table_block(
    command: Sequence[str],
    page: Path,
    name: str,
    table: Table,
    jobs: Mapping[str, Sequence[Job]],
) -> str:
    """Write a table from its finished runs, and draw its figures.

    Parameters
    ----------
    command : sequence of str
        The study's name, and what else its runs were given.
    page : Path
        The page, from which the figures are linked.
    name : str
        The table's name.
    table : Table
        The table.
    jobs : mapping of str to sequence of Job
        Each row's runs.

    Returns
    -------
    str
        Markdown: the table, a line that says where it comes from, the figures.

    Raises
    ------
    StudyError
        Runs that are not there, a column that there is not, a figure without data.
    """
    folders = [job.folder for row in jobs.values() for job in row]
    missing = [f for f in folders if not (f / SUMMARY_FILE).is_file()]
    if missing:
        raise StudyError(f"{len(missing)} of its {len(folders)} runs are not there")
    groups = {
        label: [read_run(job.folder) for job in row] for label, row in jobs.items()
    }
    runs = [run for group in groups.values() for run in group]
    check_comparable(runs)
    metric = runs[0].metric
    if table.target is not None:
        check_target("target", table.target, metric)
    lines = [_markdown(table, groups), "", _origin([*command, "--table", name], jobs)]
    plain = {label.replace("`", ""): group for label, group in groups.items()}
    for figure in table.figures:
        file = REPOSITORY / _FIGURES / f"{command[0]}_{name}_{figure}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not draw_figure(figure, plain, table.target, file):
            raise StudyError(f"its runs have nothing for the figure {figure}")
        link = Path(os.path.relpath(file, page.parent)).as_posix()
        lines += ["", f"![{caption(figure, metric)}]({link})"]
    return "\n".join(lines)


def _markdown(table: Table, groups: Groups) -> str:
    rows = summarise(groups, table.target)
    cells = []
    for row, group in zip(rows, groups.values(), strict=True):
        cells.append([row["label"]])
        for column in table.columns:
            known = group[0].config
            try:
                cells[-1].append(
                    text_of(known[column])
                    if column in known
                    else write_cell(row, rows[0], column)
                )
            except KeyError as error:
                raise StudyError(f"no column {column} of its runs") from error
    target = "" if table.target is None else f"{table.target:g}"
    head = [column.replace("target", target) for column in table.columns]
    return as_markdown(["", *head], cells)


def _origin(command: Sequence[str], jobs: Mapping[str, Sequence[Job]]) -> str:
    counts = sorted({len(row) for row in jobs.values()})
    seeds = " or ".join("seed 0" if n == 1 else f"seeds 0 to {n - 1}" for n in counts)
    line = shlex.join(["python", "benchmarks/study.py", *command])
    return f"`{line}`, {seeds}, release {_version()}."


def _version() -> str:
    # Not the installed one: an editable installation keeps that of its first day.
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["project"]["version"]


# ---- command line -------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", help="the name of a file in studies/")
    parser.add_argument(
        "overrides", nargs="*", help="of all its runs, such as client_threads=2"
    )
    parser.add_argument(
        "--table", action="append", help="one of its tables, can be repeated (all)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--seeds", type=int, help="seeds at most (the study's)")
    parser.add_argument("--output", type=Path, default=Path("outputs/studies"))
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="only show commands")
    only.add_argument("--write-only", action="store_true", help="run nothing")
    add_data_option(parser)
    given = parser.parse_intermixed_args(arguments)
    wrong = [override for override in given.overrides if "=" not in override]
    if wrong:
        parser.error(f"{wrong[0]}: must be an override, as in client_threads=2")
    if given.jobs < 1 or (given.seeds is not None and given.seeds < 1):
        parser.error("--jobs and --seeds must be at least 1")
    try:
        study = read_study(given.page)
        study.choose(given.table)
        text = study.page.read_text(encoding="utf-8")
        for name in study.tables:
            replace_table(text, name, "")
    except (StudyError, OSError) as error:
        parser.error(f"{given.page}: {error}")
    # Numbers of another release are not this one's.
    output = given.output.absolute() / _version()
    overrides = dict(override.split("=", 1) for override in given.overrides)
    rows = {
        name: table.jobs(study.common, overrides, output, given.seeds)
        for name, table in study.tables.items()
    }
    jobs = {
        job.folder: job
        for table in rows.values()
        for row in table.values()
        for job in row
    }
    # One seed of everything first: a set that is stopped then still says something.
    ordered = sorted(jobs.values(), key=lambda job: job.seed)
    if given.dry_run:
        for job in ordered:
            print(shlex.join(["python", *arguments_of(job)]))
        return
    command = [given.page, *given.overrides]
    problems = [] if given.write_only else run_all(ordered, given.jobs, given.data)
    for name, table in study.tables.items():
        try:
            block = table_block(command, study.page, name, table, rows[name])
            # Read anew: somebody may have written the page while the runs went on.
            text = study.page.read_text(encoding="utf-8")
            study.page.write_text(replace_table(text, name, block), encoding="utf-8")
        except (StudyError, ReportError, ConfigError, OSError) as error:
            problems.append(f"table {name} is left as it was: {error}")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
