"""Studies: pages whose tables come from the runs that they name, and from no others."""

import io
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import RECORDS, make_run
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.main import run_experiment

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "benchmarks"))
import study  # noqa: E402

PAGES = sorted(file.stem for file in study.STUDIES.glob("*.yaml"))
PAGE = """# Results

Before.

<!-- table first -->
old
<!-- end first -->

Between.

<!-- table second --><!-- end second -->
After.
"""
STUDY: dict[str, Any] = {
    "page": "docs/results/small.md",
    "common": {"seeds": 2, "local_steps": 7},
    "tables": {
        "first": {
            "target": 0.6,
            "columns": [
                *("seeds", "final accuracy", "local_steps", "MB both ways", "to first"),
                *("rounds to target", "× fewer MB to target"),
            ],
            "figures": ["metric_bytes"],
            "rows": {
                "`fedavg`": {"method": "fedavg"},
                "`gwpf`, 3 | 4": {"local_steps": 3, "lr_milestones": [2, 3]},
            },
        },
        "second": {
            "columns": ["MB up"],
            "common": {"seeds": 1, "method": "fedavg"},
            "rows": {"the same": {}},
        },
    },
}


@pytest.fixture(name="root")
def make_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository of one study and its page."""
    monkeypatch.setattr(study, "REPOSITORY", tmp_path)
    monkeypatch.setattr(study, "STUDIES", tmp_path)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "small.md").write_text(PAGE)
    write_study(tmp_path, STUDY)
    return tmp_path


def write_study(root: Path, content: Any) -> None:
    """Write the study."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (root / "small.yaml").write_text(text)


def run_study(root: Path, *options: str) -> int:
    """Run the command line; return its exit status."""
    try:
        study.main(["small", "--output", str(root / "outputs"), *options])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
    return 0


class Runner:  # pylint: disable=too-few-public-methods
    """Stands for `run_one`: leaves a finished run, or fails."""

    def __init__(self) -> None:
        self.overrides: list[list[str]] = []
        self.fails = ""
        self._composing = threading.Lock()

    def __call__(self, job: study.Job) -> str:
        """Make the run's folder."""
        self.overrides.append(job.overrides)
        if self.fails and self.fails in job.overrides:
            return "it broke"
        with self._composing:
            make_run(job.folder, *job.overrides, seed=job.seed)
        return ""


@pytest.fixture(name="runner")
def make_runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Run nothing in earnest, in threads."""
    runner = Runner()
    monkeypatch.setattr(study, "run_one", runner)
    monkeypatch.setattr(
        study, "ProcessPoolExecutor", lambda size, *_, **__: ThreadPoolExecutor(size)
    )
    return runner


# The studies that there are


@pytest.mark.parametrize("name", PAGES)
def test_every_study_can_be_run_and_written(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its overrides fit the configuration, and its page has a place for each table."""
    monkeypatch.setenv("GWPF_DATA", "/data")
    read = study.read_study(name)
    text = read.page.read_text(encoding="utf-8")
    seen: list[dict[str, Any]] = []
    for table_name, table in read.tables.items():
        text = study.replace_table(text, table_name, "")
        jobs = table.jobs(read.common, {}, Path(), 1)
        for number, (label, own) in enumerate(table.rows.items()):
            # What another table has, too, is composed once: that is what takes time.
            if number == 0 or own not in seen:
                checked(compose_config(jobs[label][0].overrides))
            seen.append(own)


# Running


def test_what_is_there_is_not_run_again(root: Path, runner: Runner) -> None:
    """Each run once, though two tables show it; one seed of everything first."""
    assert run_study(root, "--jobs", "2") == 0
    assert sorted(runner.overrides[:2]) == [
        ["local_steps=3", "lr_milestones=[2, 3]", "seed=0"],
        ["local_steps=7", "method=fedavg", "seed=0"],
    ]
    assert len(runner.overrides) == 4
    assert run_study(root) == 0
    assert len(runner.overrides) == 4

    next(root.glob("outputs/*/*/1/summary.json")).unlink()
    assert run_study(root) == 0
    assert len(runner.overrides) == 5


def test_real_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that share a process come out as alone; one that cannot be, is named."""
    common = {"seeds": 2, "num_rounds": 2, "num_clients": 3, "local_steps": 1}
    rows = {"a": {"method": "fedavg"}, "b": {}, "c": {"dataset": "nowhere"}}
    table = {"columns": ["MB up"], "rows": rows, "common": common}
    write_study(root, {**STUDY, "tables": {"second": table}})
    assert run_study(root, "--jobs", "2") == 1
    errors = capsys.readouterr().err
    assert errors.count("dataset=nowhere: must be one of") == 2
    assert "second is left as it was: 2 of its 6 runs are not there" in errors
    done = [file.parent for file in root.glob("outputs/*/*/*/summary.json")]
    assert len(done) == 4

    for number, folder in enumerate(done):
        cfg = OmegaConf.load(folder / "config.yaml")
        assert isinstance(cfg, DictConfig)
        alone = root / "alone" / str(number)
        run_experiment(checked(cfg), alone, Console(file=io.StringIO()))
        for name in ("config.yaml", "model.safetensors"):
            assert (alone / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_that_was_stopped_goes_on(root: Path) -> None:
    """At its newest whole checkpoint, if there is one, and to the same end."""
    common = {"seeds": 1, "num_clients": 3, "local_steps": 1, "checkpoint_every": 2}
    table = {"columns": ["MB up"], "rows": {"a": {"num_rounds": 5}}, "common": common}
    write_study(root, {**STUDY, "tables": {"second": table}})
    assert run_study(root) == 0
    (folder,) = (file.parent for file in root.glob("outputs/*/*/*/summary.json"))
    model = (folder / "model.safetensors").read_bytes()
    history = (folder / "history.csv").read_text().splitlines()
    checkpoint = next(folder.glob("checkpoints/round-*"))

    def stop() -> None:
        (folder / "summary.json").unlink()
        (folder / "model.safetensors").unlink()

    def end() -> list[str]:
        assert run_study(root) == 0
        assert (folder / "model.safetensors").read_bytes() == model
        return (folder / "history.csv").read_text().splitlines()

    stop()
    assert checkpoint.name.startswith("round-000004-")
    assert end()[:5] == history[:5]  # with the seconds that the first start measured

    stop()
    next(checkpoint.glob("server*")).unlink()  # killed before it was whole
    assert end()[1:5] != history[1:5]


def test_other_overrides_are_another_run(root: Path, runner: Runner) -> None:
    """Nobody finds the runs of an earlier version of a study in its tables."""
    run_study(root, "--seeds", "1")
    assert len(runner.overrides) == 2
    changed = {**STUDY, "common": {"seeds": 2, "local_steps": 8}}
    write_study(root, changed)
    run_study(root, "--seeds", "1")
    assert runner.overrides[2:] == [["local_steps=8", "method=fedavg", "seed=0"]]


def test_a_run_that_fails(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others go on; its table is left as it was, and the next time it is run."""
    runner.fails = "local_steps=3"
    assert run_study(root) == 1
    assert len(runner.overrides) == 4
    errors = capsys.readouterr().err
    assert errors.count("it broke") == 2
    assert "table first is left as it was: 2 of its 4 runs are not there" in errors
    text = (root / "docs/results/small.md").read_text()
    assert "<!-- table first -->\nold\n<!-- end first -->" in text
    assert "| the same |" in text
    runner.fails = ""
    assert run_study(root) == 0
    assert len(runner.overrides) == 6


def test_a_dry_run(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints the commands and does nothing else."""
    assert run_study(root, "--dry-run", "--seeds", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" hydra.run.dir=")[0] for line in lines] == [
        "python -m gwpf_baseline.main local_steps=7 method=fedavg seed=0",
        "python -m gwpf_baseline.main local_steps=3 'lr_milestones=[2, 3]' seed=0",
    ]
    assert not runner.overrides
    assert (root / "docs/results/small.md").read_text() == PAGE


def test_some_of_its_tables(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are neither run nor written; one that is not there is named."""
    assert run_study(root, "--table", "second") == 0
    assert runner.overrides == [["local_steps=7", "method=fedavg", "seed=0"]]
    page = (root / "docs/results/small.md").read_text(encoding="utf-8")
    assert "<!-- table first -->\nold\n" in page
    assert "| the same |" in page
    assert run_study(root, "--table", "second", "--table", "third") == 2
    assert capsys.readouterr().err == (
        "error: small: no table third, only first, second\n"
    )


def test_overrides_of_all_runs(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """They win, the page says so, and runs without them are not these."""
    assert run_study(root, "--seeds", "1") == 0
    runner.overrides.clear()
    assert run_study(root, "--seeds", "1", "client_threads=2", "local_steps=9") == 0
    assert all(
        {"client_threads=2", "local_steps=9"} <= set(overrides)
        and not {"local_steps=7", "local_steps=3"} & set(overrides)
        for overrides in runner.overrides
    )
    assert len(runner.overrides) == 2
    page = (root / "docs/results/small.md").read_text(encoding="utf-8")
    command = "python benchmarks/study.py small client_threads=2 local_steps=9"
    assert f"`{command} --table first`, " in page
    capsys.readouterr()
    assert run_study(root, "client_threads") == 2
    assert capsys.readouterr().err == (
        "error: client_threads: must be an override, as in client_threads=2\n"
    )


# Writing


def test_a_page(root: Path, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the markers is what the runs say, the rest is left alone."""
    monkeypatch.setattr(study, "_version", lambda: "1.2.3")
    assert run_study(root) == 0
    # Of three rounds with 3 kB each, the second one reaches 0.6.
    first = [
        (
            "|  | seeds | final accuracy | local_steps | MB both ways | to first "
            "| rounds to 0.6 | × fewer MB to 0.6 |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `fedavg` | 2 | 0.7500 ± 0.0000 | 7 | 0.00900 | 1.000 | 2 ± 0 | 1.0 |",
        "| `gwpf`, 3 \\| 4 | 2 | 0.7500 ± 0.0000 | 3 | 0.00900 | 1.000 | 2 ± 0 | 1.0 |",
        "",
        (
            "`python benchmarks/study.py small --table first`, "
            "seeds 0 to 1, release 1.2.3."
        ),
        "",
        (
            "![test accuracy over bytes sent so far, both ways]"
            "(figures/small_first_metric_bytes.png)"
        ),
    ]
    second = [
        "|  | MB up |",
        "| --- | ---: |",
        "| the same | 0.00300 |",
        "",
        "`python benchmarks/study.py small --table second`, seed 0, release 1.2.3.",
    ]
    expected = PAGE.replace("\nold\n", "\n\n" + "\n".join(first) + "\n\n").replace(
        "second --><!--", "second -->\n\n" + "\n".join(second) + "\n\n<!--"
    )
    page = root / "docs/results/small.md"
    assert page.read_text(encoding="utf-8") == expected
    figures = root / "docs/results/figures"
    assert [f.name for f in figures.iterdir()] == ["small_first_metric_bytes.png"]

    runner.overrides.clear()
    assert run_study(root, "--write-only") == 0
    assert not runner.overrides
    assert page.read_text(encoding="utf-8") == expected


def test_nothing_to_write_of(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table from half of its runs would not be what it says."""
    run_study(root, "--seeds", "1")
    before = (root / "docs/results/small.md").read_text()
    capsys.readouterr()
    assert run_study(root, "--write-only") == 1
    assert capsys.readouterr().err == (
        "table first is left as it was: 2 of its 4 runs are not there\n"
    )
    assert (root / "docs/results/small.md").read_text() == before
    assert runner.overrides


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columns": ["MB sideways"]}, "no column MB sideways of its runs"),
        ({"columns": ["MB to target"]}, "no column MB to target of its runs"),
        ({"target": 60}, "target=60: must be an accuracy in (0, 1]"),
        ({"figures": ["frozen"]}, "its runs have nothing for the figure frozen"),
        ({"rows": {"a": {}, "b": {"num_clients": 3}}}, "num_clients is 10 in "),
    ],
)
def test_a_table_that_cannot_be_written(
    root: Path,
    runner: Runner,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    """It is named, with the reason in one line."""
    second = STUDY["tables"]["second"] | changes
    write_study(root, {**STUDY, "tables": {"second": second}})
    assert run_study(root) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"table second is left as it was: {message}")
    assert errors.count("\n") == 1
    assert (root / "docs/results/small.md").read_text() == PAGE
    assert runner.overrides


# Mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("page: [", "small.yaml: while parsing"),
        ("", "small.yaml: "),
        ({"page": "docs/results/small.md"}, "missing 1 required positional argument"),
        ({**STUDY, "tabels": {}}, "unexpected keyword argument 'tabels'"),
        ({**STUDY, "tables": {"first": {"rows": {}}}}, "missing 1 required"),
        (
            {**STUDY, "tables": {"a": {"columns": [], "rows": {}, "figures": ["x"]}}},
            "a has no figure x",
        ),
        ({**STUDY, "page": "nowhere.md"}, "No such file"),
    ],
)
def test_damaged_studies(
    root: Path, capsys: pytest.CaptureFixture[str], content: Any, message: str
) -> None:
    """One line says what is wrong."""
    write_study(root, content)
    assert run_study(root) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: small: ")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_page_without_a_place_for_a_table(
    root: Path, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is run."""
    page = root / "docs/results/small.md"
    for text, message in (
        (PAGE.replace("<!-- end first -->", ""), "one line <!-- end first -->"),
        (PAGE.replace("table second", "table 2"), "one line <!-- table second -->"),
        (PAGE + "<!-- table first -->", "one line <!-- table first -->"),
        (
            PAGE.replace("table first", "x")
            .replace("end first", "table first")
            .replace("x", "end first"),
            "<!-- end first --> has to follow its table",
        ),
    ):
        page.write_text(text)
        assert run_study(root) == 2
        assert message in capsys.readouterr().err
        assert page.read_text() == text
    assert not runner.overrides


def test_other_mistakes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown page, no job at all, options that exclude each other."""
    with pytest.raises(SystemExit):
        study.main(["other"])
    assert capsys.readouterr().err == "error: other: no such page, only small\n"
    for options in (("--jobs", "0"), ("--seeds", "0"), ("--dry-run", "--write-only")):
        assert run_study(root, *options) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_told_by_what_it_is(root: Path, runner: Runner) -> None:
    """Not by the order in which its overrides are written."""
    row = {"method": "fedavg", "local_steps": 7}
    second = {
        "columns": ["seeds"],
        "rows": {"a": row, "b": dict(reversed(row.items()))},
    }
    write_study(root, {**STUDY, "tables": {"second": second}})
    assert run_study(root, "--seeds", "1") == 0
    assert len(runner.overrides) == 1
    (run,) = root.glob("outputs/*/*/0")
    assert len(study.read_run(run).records) == len(RECORDS)
