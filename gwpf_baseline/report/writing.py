"""What a report leaves behind: Markdown, a CSV and figures."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from gwpf_baseline.report.figures import draw_figures
from gwpf_baseline.report.measures import Groups, Row
from gwpf_baseline.report.runs import text_of
from gwpf_baseline.report.tables import Section, as_markdown
from gwpf_baseline.utils import ConfigError, escaped


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
        rows = [[_code(label), *cells] for label, *cells in section.rows]
        table = as_markdown(section.head, rows)
        blocks += [f"## {section.title}", table, section.note]
    blocks += [f"![{name}]({name})" for name in figures]
    runs = [
        f"- {_code(label)}: {', '.join(_code(str(run.folder)) for run in group)}"
        for label, group in groups.items()
    ]
    return "\n\n".join([*blocks, "## Runs", "\n".join(runs)]) + "\n"


def _code(text: str) -> str:
    return "`" + escaped(text).replace("`", "'") + "`"
