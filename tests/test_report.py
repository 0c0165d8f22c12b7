"""Runs side by side: the right runs in the right rows, and numbers to be trusted."""

import csv
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from finished_runs import RECORDS, make_record, make_run
from matplotlib.figure import Figure
from matplotlib.image import imread

from gwpf_baseline.records.history import COLUMNS, History, read_history
from gwpf_baseline.records.target import metric_of
from gwpf_baseline.report.__main__ import main
from gwpf_baseline.report.figures import draw_figure
from gwpf_baseline.report.groups import check_comparable, group_runs
from gwpf_baseline.report.measures import average_curve, first_reaching, summarise
from gwpf_baseline.report.runs import ReportError, Run, find_runs, read_run
from gwpf_baseline.report.tables import lay_out, write_cell

FIGURES = {"metric_rounds.png", "metric_bytes.png", "metric_time.png", "frozen.png"}
FIGURES |= {"bandwidth.png", "to_target.png", "split.png"}
# Three seeds of one method, as unlike as seeds are; the third diverges.
ACCURACIES = [[0.5, None, 0.8, 0.9], [0.4, None, 0.95, 0.85], [0.3, None, 0.2, 0.1]]


def labels(*folders: Path) -> list[str]:
    """Return the labels of the runs' groups."""
    return list(group_runs([read_run(folder) for folder in folders]))


def report(*arguments: object) -> None:
    """Run the command line."""
    main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line, which must end in one line and code 2."""
    with pytest.raises(SystemExit) as ended:
        report(*arguments)
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.endswith("\n") and errors[:-1].isprintable()
    return errors.removeprefix("error: ").removesuffix("\n")


def table(folder: Path) -> list[dict[str, str]]:
    """Read a report's CSV."""
    with open(folder / "report.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Finding and reading


def test_a_sweep_is_given_by_its_folder(tmp_path: Path) -> None:
    """In the order of its jobs; each run once, however often it is given."""
    sweep = tmp_path / "multirun"
    for seed in (0, 2, 10):
        folder = make_run(sweep / str(seed), seed=seed)
        # Hydra's own files are no run.
        (folder / ".hydra").mkdir()
        shutil.copy(folder / "config.yaml", folder / ".hydra")
    (sweep / "multirun.yaml").touch()
    runs = [sweep / "0", sweep / "2", sweep / "10"]
    assert find_runs([sweep]) == runs
    assert find_runs([sweep / "0"]) == runs[:1]
    above = sweep / "2" / ".."
    assert find_runs([sweep, above, sweep / "2"]) == runs


def test_what_is_read_of_a_run(tmp_path: Path) -> None:
    """Everything that the report needs, to the bit."""
    run = read_run(make_run(tmp_path, "method=fedavg", seed=4))
    assert run.records == RECORDS
    assert run.metric == "accuracy"
    assert run.config["method.name"] == "fedavg"
    assert run.config["client_resources.num_cpus"] == 1
    assert run.config["seed"] == 4


@pytest.mark.parametrize("below", [False, True], ids=["itself", "in a sweep"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", None, "not finished, it has no summary.json; "),
        ("summary.json", "", "summary.json cannot be used (Expecting value"),
        ("summary.json", "[]", "its metric is None, not one of accuracy, perplexity"),
        ("summary.json", '{"metric": "bleu"}', "its metric is bleu"),
        ("summary.json", '{"metric": "accuracy"}', "its parameters are None"),
        ("config.yaml", None, "has no config.yaml; "),
        ("config.yaml", "", "it has no keys"),
        ("config.yaml", "a: 1", "its method.name is null"),
        ("config.yaml", "- a\n- b", "it has no keys"),
        ("config.yaml", "a: [1,\n\n", "config.yaml cannot be used (while parsing"),
        ("config.yaml", "method: {name: gwpf}\nseed: ${b}", "its seed is ${b}, not a"),
        ("config.yaml", "\0", "config.yaml cannot be used"),
        ("summary.json", "[" * 100_000, "maximum recursion depth exceeded"),
        ("summary.json", '{"metric": "\\u001b[2J"}', r"its metric is \x1b[2J, not one"),
        ("config.yaml", "a: " + "[" * 100_000, "nested more than 20 levels deep"),
        ("config.yaml", "{a: " * 5000, "it is nested more than 20 levels deep"),
        ("config.yaml", "a: &a [*a]", "it has the alias *a, which no run writes"),
        ("config.yaml", "a: &a {b: *a}", "it has the alias *a, which no run writes"),
        ("config.yaml", "a: 1" + ":59" * 10**6, "it has a value of 3000001 characters"),
        # What PyYAML raises of these, it says nowhere.
        ("config.yaml", "a: !!timestamp x", "config.yaml cannot be used"),
        ("config.yaml", "a: !!int ''", "config.yaml cannot be used"),
        ("config.yaml", "a: !!bool x", "config.yaml cannot be used"),
        ("config.yaml", f"a: {'1:' * 300}1.5", "int too large to convert to float"),
        ("history.csv", None, "has no history.csv; "),
        ("history.csv", "", "line 1: the columns are not those of a history"),
        ("history.csv", ",".join(COLUMNS) + "\n", "its history has 0 of 3 rounds"),
    ],
)
def test_a_run_that_cannot_be_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: str | None,
    message: str,
    below: bool,
) -> None:
    """It is named, with what to do; in a sweep it is not passed over in silence."""
    make_run(tmp_path / "sweep" / "0")
    run = make_run(tmp_path / "sweep" / "1", seed=1)
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    given = tmp_path / "sweep" if below else run
    line = refusal(capsys, given, "--output", tmp_path / "report")
    assert line.startswith(f"{run}: ")
    assert message in line
    assert line.endswith("; run it again or leave it out") or "; resume it, " in line
    assert not (tmp_path / "report").exists()


def rewrite(run: Path, key: str, text: str) -> None:
    """Put a value, as YAML has it, into a run's configuration."""
    file = run / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    group, _, leaf = key.rpartition(".")
    (config[group] if group else config)[leaf] = "PLACEHOLDER"
    written = yaml.safe_dump(config).replace("PLACEHOLDER", text)
    file.write_text(written, encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.name", "''", "its method.name is , not a name"),
        ("method.name", "two words", "its method.name is two words, not a name"),
        ("method.name", '"\\uD800"', r"cannot be shown: method.name=\ud800"),
        ("method.name", '"\\e[2J"', r"cannot be shown: method.name=\x1b[2J"),
        ("method.name", '"a\\u202Eb"', r"cannot be shown: method.name=a\u202eb"),
        ("method.name", "x" * 100_000, "it has a value of 100000 characters"),
        ("optimizer", '"\\e[2J"', r"cannot be shown: optimizer=\x1b[2J"),
        (
            "optimizer",
            f"[{'x, ' * 50_000}]",
            "longer than 65536 characters: optimizer=[",
        ),
        ("optimizer", '{"\\e[2J": 1}', r"cannot be shown: optimizer.\x1b[2J=1"),
        ("lr", f"0x{'f' * 8000}", "Exceeds the limit (4300 digits)"),
        ("seed", "true", "its seed is true, not a whole number"),
        ("num_rounds", "true", "its num_rounds is true, not a whole number"),
        ("stop_at", '"\\e[2J"', r"cannot be shown: stop_at=\x1b[2J"),
    ],
)
def test_a_value_that_cannot_be_shown(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: str,
    message: str,
) -> None:
    """No terminal is steered and no table is torn; the line is short enough to read."""
    run = make_run(tmp_path / "run")
    rewrite(run, key, value)
    line = refusal(capsys, run, "--output", tmp_path / "report")
    assert line.startswith(f"{run}: config.yaml cannot be used (")
    assert message in line
    assert len(line) < 1000


@pytest.mark.parametrize("cell", ["1" + "0" * 400, "-1" + "0" * 400, "1e308"])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_cell_beyond_all_bounds(tmp_path: Path, column: str, cell: str) -> None:
    """Its line is refused, or the number left out, as of a loss that diverged."""
    run = make_run(tmp_path)
    lines = (run / "history.csv").read_text().splitlines()
    cells = lines[2].split(",")
    cells[COLUMNS.index(column)] = cell
    lines[2] = ",".join(cells)
    (run / "history.csv").write_text("\n".join(lines) + "\n")
    try:
        summarise({"gwpf": [read_run(run), read_run(run)]})
    except ReportError as error:
        assert str(error).startswith(f"{run}: history.csv cannot be used (")
    else:
        assert math.isinf(float(cell))
        assert getattr(read_run(run).records[1], column) is None


def test_what_never_ends_or_cannot_be_looked_for_is_refused(tmp_path: Path) -> None:
    """A device, a pipe that nobody writes to, a name that no disk takes."""
    run = make_run(tmp_path / "run")
    for name in ("summary.json", "history.csv"):
        whole = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(ReportError, match=f"{name} cannot be used .it is no file"):
            read_run(run)
        (run / name).unlink()
        (run / name).write_bytes(whole)
    with pytest.raises(ReportError, match="File name too long; leave it out"):
        find_runs([Path("a" * 300)])


def test_what_is_to_be_done_is_told_however_odd_a_name_is() -> None:
    """Escapes are longer than what they stand for, and cut nothing off."""
    error = ReportError("/runs/\x1b[2J\u2028/seed-0: leave it out")
    assert str(error) == r"/runs/\x1b[2J\u2028/seed-0: leave it out"


def test_a_half_written_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it ends within a line or between two: its last round is not the last."""
    run = make_run(tmp_path / "run")
    text = (run / "history.csv").read_text()
    (run / "history.csv").write_text(text[:-5])
    assert "line 4: the line is incomplete" in refusal(capsys, run)
    (run / "history.csv").write_text(text[: text.rindex("\n", 0, -1) + 1])
    assert refusal(capsys, run) == (
        f"{run}: not finished, its history has 2 of 3 rounds; resume it, run it again "
        "or leave it out"
    )


def test_a_history_whose_rounds_are_not_those_of_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where two runs have written to one folder: a round is lacking, or is twice."""
    for number, rounds in enumerate([(1, 1, 2, 3), (1, 3), (2, 3), (3, 2, 1)]):
        records = [make_record(round_) for round_ in rounds]
        run = make_run(tmp_path / str(number), records=records)
        assert "history.csv cannot be used (round" in refusal(capsys, run)


def test_a_run_that_has_reached_its_end_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is finished if its last round is good enough, not if an earlier one was."""
    reached = make_run(tmp_path / "0", num_rounds=9, stop_at=0.75)
    assert len(read_run(reached).records) == 3
    assert labels(reached, make_run(tmp_path / "1", seed=1, num_rounds=9, stop_at=0.7))
    assert labels(reached) == ["gwpf"]
    short = make_run(tmp_path / "2", num_rounds=9, stop_at=0.76)
    assert "its history has 3 of 9 rounds" in refusal(capsys, short)
    records = [*RECORDS, make_record(4, test_accuracy=None)]
    late = make_run(tmp_path / "3", records=records, num_rounds=9, stop_at=0.5)
    assert "its history has 4 of 9 rounds" in refusal(capsys, late)
    language: dict[str, Any] = {"num_rounds": 9, "metric": "perplexity"}
    assert read_run(make_run(tmp_path / "4", stop_at=1.4, **language))
    assert "3 of 9" in refusal(
        capsys, make_run(tmp_path / "5", stop_at=1.3, **language)
    )
    damaged = make_run(tmp_path / "6", num_rounds=9, stop_at="soon")
    assert "its stop_at is soon" in refusal(capsys, damaged)


def test_a_folder_without_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that is not there."""
    for folder in (tmp_path, tmp_path / "missing"):
        assert refusal(capsys, folder).startswith(f"{folder}: no run in it or below")


# Grouping


def test_runs_that_differ_in_their_seeds_only_are_one_group(tmp_path: Path) -> None:
    """Nor does it matter where the data lay, or how the run was carried out."""
    run = make_run(tmp_path / "0")
    other = make_run(
        tmp_path / "1",
        seed=1,
        dataset__path="/elsewhere",
        dataset__cache_dir="/tmp",
        checkpoint_every=7,
        client_resources__num_cpus=2,
        verbose=True,
        resume="/somewhere",
    )
    runs = [read_run(run), read_run(other)]
    check_comparable(runs)
    groups = group_runs(runs)
    assert {k: [r.folder for r in v] for k, v in groups.items()} == {
        "gwpf": [run, other]
    }


def test_labels_name_what_differs(tmp_path: Path) -> None:
    """A method's own keys only among its own runs, and unset ones not at all."""
    assert labels(
        make_run(tmp_path / "0", "method=fedavg"),
        make_run(tmp_path / "1", "method=fedavg", local_steps=20),
        make_run(tmp_path / "2", method__thaw_budget=0.04),
        make_run(tmp_path / "3", method__thaw_budget=0.1),
        make_run(tmp_path / "4", "method=gwpf_paper"),
        make_run(tmp_path / "5", "method=gwpf_paper", local_epochs=1, lr=1),
    ) == [
        "fedavg",
        "fedavg local_steps=20",
        "gwpf",
        "gwpf thaw_budget=0.1",
        "gwpf_paper",
        "gwpf_paper local_epochs=1 lr=1",
    ]


def test_defaults_are_named_only_to_tell_runs_apart(tmp_path: Path) -> None:
    """A value that is not set is never named, so that here the default has to be."""
    adagrad = "server_optimizer=fedadagrad"
    assert labels(
        make_run(tmp_path / "0"),
        make_run(tmp_path / "1", local_steps=None),
        make_run(tmp_path / "2", adagrad),
        make_run(tmp_path / "3", adagrad, server_optimizer__lr=0.5),
        make_run(tmp_path / "4", "method=gwpf_paper"),
    ) == [
        "gwpf local_steps=5",
        "gwpf",
        "gwpf server_optimizer=fedadagrad",
        "gwpf server_optimizer=fedadagrad server_optimizer.lr=0.5",
        "gwpf_paper",
    ]


def test_defaults_are_those_of_the_method(tmp_path: Path) -> None:
    """Each has its own in its own file; what all runs share is never named."""
    assert labels(
        make_run(tmp_path / "0", method__thaw_budget=0.5, lr=1),
        make_run(tmp_path / "1", "method=gwpf_paper", lr=1),
        make_run(tmp_path / "2", "method=gwpf_paper", method__thaw_quorum=0.5, lr=1),
    ) == ["gwpf", "gwpf_paper", "gwpf_paper thaw_quorum=0.5"]


def test_runs_of_a_method_that_is_no_more(tmp_path: Path) -> None:
    """Nobody knows its defaults, so everything that differs is named."""
    old = {"name": "old"}
    assert labels(
        make_run(tmp_path / "0", method=old),
        make_run(tmp_path / "1", method=old, lr=1),
    ) == ["old lr=0.05", "old lr=1"]


def test_alternatives_with_a_name_are_labelled_by_it(tmp_path: Path) -> None:
    """Their other keys matter only where the name is the same."""
    slow, fast = {"name": "slow", "mbps": 1}, {"name": "fast", "mbps": 10}
    assert labels(
        make_run(tmp_path / "0", network=None),
        make_run(tmp_path / "1", network=slow),
        make_run(tmp_path / "2", network=fast),
    ) == ["gwpf", "gwpf network=slow", "gwpf network=fast"]
    assert labels(
        make_run(tmp_path / "3", network=fast),
        make_run(tmp_path / "4", network={**fast, "mbps": 20}),
    ) == ["gwpf network.mbps=10", "gwpf network.mbps=20"]


def test_one_and_one_point_zero_are_the_same(tmp_path: Path) -> None:
    """Also where a third value makes them part of the label."""
    assert labels(
        make_run(tmp_path / "0", lr=1),
        make_run(tmp_path / "1", lr=1.0, seed=1),
        make_run(tmp_path / "2", lr=0.5),
    ) == ["gwpf lr=1", "gwpf lr=0.5"]


def test_runs_of_different_length_are_not_averaged(tmp_path: Path) -> None:
    """But the length of another method's run is of no interest."""
    fedavg = make_run(tmp_path / "0", "method=fedavg", records=RECORDS[:1])
    gwpf = [
        make_run(tmp_path / "1"),
        make_run(tmp_path / "2", records=RECORDS[:2]),
        make_run(tmp_path / "3", seed=1),
    ]
    assert labels(fedavg, gwpf[0], gwpf[2]) == ["fedavg", "gwpf"]
    groups = group_runs([read_run(run) for run in (fedavg, *gwpf)])
    assert {label: len(runs) for label, runs in groups.items()} == {
        "fedavg": 1,
        "gwpf num_rounds=3": 2,
        "gwpf num_rounds=2": 1,
    }


def test_the_same_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would count double."""
    runs = [
        make_run(tmp_path / str(number), seed=seed)
        for number, seed in enumerate((3, 1, 3))
    ]
    assert refusal(capsys, *runs) == (
        f"{runs[0]} and {runs[2]} are both gwpf with seed 3; leave one out"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset__test_fraction": 0.3},
            "dataset.test_fraction is 0.2 in {}, but 0.3",
        ),
        ({"dataset__name": "mnist"}, "dataset.name is digits in {}, but mnist"),
        ({"partition": {"name": "iid"}}, "partition.alpha is 1 in {}, but null"),
        ({"partition__alpha": 0.5}, "partition.alpha is 1 in {}, but 0.5"),
        ({"num_clients": 20}, "num_clients is 10 in {}, but 20"),
        ({"model__name": "mnist_cnn"}, "model.name is lenet5 in {}, but mnist_cnn"),
        ({"model__width": 2}, "model.width is null in {}, but 2"),
        ({"metric": "perplexity"}, "metric is accuracy in {}, but perplexity"),
    ],
)
def test_different_tasks_are_not_compared(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    """The first key that differs says why, with both values and both runs."""
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1", seed=1)]
    if "partition" in changes:
        # As another choice of the group is written: none of the first one's keys.
        other = make_run(tmp_path / "2", "partition=iid")
        message = "partition.name is dirichlet in {}, but iid"
    else:
        other = make_run(tmp_path / "2", **changes)
    expected = f"{message.format(runs[0])} in {other}; report them apart"
    assert refusal(capsys, *runs, other) == expected


# Calculating


def seeds_of(tmp_path: Path, *methods: str) -> list[Path]:
    """Make runs with gaps and failures: `ACCURACIES` for each method."""
    runs = []
    for method in methods:
        for seed, accuracies in enumerate(ACCURACIES):
            records = [
                make_record(
                    number,
                    test_accuracy=accuracy,
                    test_loss=None if accuracy is None else 1 / accuracy,
                    cumulative_uplink_bytes=number * (900 + seed * len(method)),
                    frozen_fraction=None if method == "fedavg" else 1 - 0.5**number,
                    compute_seconds=len(method) + seed / number,
                )
                for number, accuracy in enumerate(accuracies, start=1)
            ]
            # In round 2 nobody answered.
            records[1] = replace(
                records[1],
                clients=0,
                failures=10,
                train_loss=None,
                frozen_fraction=None,
                compute_seconds=None,
                slowest_client_seconds=None,
                median_client_seconds=None,
            )
            folder = tmp_path / method / str(seed)
            runs.append(
                make_run(folder, f"method={method}", records=records, seed=seed)
            )
    return runs


def column_of(folder: Path, name: str) -> list[float]:
    """Read a column of a history with nothing of the package."""
    with open(folder / "history.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def deviation(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, of two values or more."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def expected_row(method: str, folders: list[Path], target: float) -> dict[str, Any]:
    """Calculate a row the slow way: a list of numbers for everything."""
    finals, bests, ups, downs, ratios, frozen, compute = [], [], [], [], [], [], []
    rounds, sent, modelled, csr, bits, lasts = [], [], [], [], [], []
    slowest = []
    for folder in folders:
        accuracies = column_of(folder, "test_accuracy")
        finals.append(accuracies[-1])
        bests.append(sorted(accuracies)[-1])
        ups.append(column_of(folder, "cumulative_uplink_bytes")[-1])
        downs.append(column_of(folder, "cumulative_downlink_bytes")[-1])
        dense = column_of(folder, "dense_bytes")[-1]
        ratios.append((ups[-1] + downs[-1]) / dense)
        compute.append(sorted(column_of(folder, "compute_seconds"))[1])
        csr.append(sum(column_of(folder, "csr_bytes")))
        means = column_of(folder, "mean_accuracy")
        slowest.append(statistics.mean(column_of(folder, "slowest_client_seconds")))
        bits.append(statistics.mean(column_of(folder, "uplink_bits_per_parameter")))
        shares = column_of(folder, "frozen_fraction")
        frozen += [statistics.mean(shares)] if shares else []
        lasts += shares[-1:]
        with open(folder / "history.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["test_accuracy"] and float(row["test_accuracy"]) >= target:
                    rounds.append(int(row["round"]))
                    up, down = (
                        int(row[f"cumulative_{way}link_bytes"])
                        for way in ("up", "down")
                    )
                    sent.append(up + down)
                    modelled.append(float(row["modelled_seconds"]))
                    break
    # In the third round of these runs, the median one, FedAvg's clients take 6, 6 1/3
    # and 6 2/3 s.
    fedavg = 6 + 1 / 3
    return {
        "label": method,
        "seeds": 3,
        "final_accuracy": sum(finals) / 3,
        "final_accuracy_std": deviation(finals),
        "best_accuracy": sum(bests) / 3,
        "total_uplink_bytes": sum(ups) / 3,
        "total_downlink_bytes": sum(downs) / 3,
        "total_bytes": (sum(ups) + sum(downs)) / 3,
        "traffic_ratio": sum(ratios) / 3,
        "frozen_fraction": sum(frozen) / 3 if frozen else None,
        "last_frozen_fraction": sum(lasts) / 3 if lasts else None,
        "compute_seconds": sum(compute) / 3,
        "compute_overhead": sum(compute) / 3 / fedavg - 1,
        "modelled_seconds": 8.0,
        "slowest_client_seconds": statistics.mean(slowest),
        "median_client_seconds": 1.25,
        "uplink_bits_per_parameter": sum(bits) / 3,
        "downlink_bits_per_parameter": 32.0,
        "total_csr_bytes": sum(csr) / 3,
        "final_mean_accuracy": means[-1],
        "mask_bits_per_parameter": None,
        "uplink_value_share": 0.6,
        "uplink_position_share": 0.3,
        "uplink_buffer_share": 0.0,
        "uplink_overhead_share": 0.1,
        "downlink_value_share": 0.75,
        "downlink_position_share": 0.0,
        "downlink_buffer_share": 0.25,
        "downlink_overhead_share": 0.0,
        "target": target,
        "reached": len(rounds),
        "rounds_to_target": sum(rounds) / len(rounds) if rounds else None,
        "rounds_to_target_std": deviation(rounds),
        "bytes_to_target": sum(sent) / len(sent) if sent else None,
        "bytes_to_target_std": deviation(sent),
        "modelled_seconds_to_target": sum(modelled) / len(modelled) if sent else None,
    }


@pytest.mark.parametrize("target", [0.3, 0.8, 0.85, 0.9, 0.95, 0.96])
def test_the_table_equals_a_slow_one(tmp_path: Path, target: float) -> None:
    """With rounds that were not evaluated and rounds in which all clients failed."""
    folders = seeds_of(tmp_path, "fedavg", "gwpf")
    runs = [read_run(folder) for folder in folders]
    rows = summarise(group_runs(runs), target)
    for row, method in zip(rows, ("fedavg", "gwpf"), strict=True):
        own = [folder for folder in folders if folder.parent.name == method]
        assert row == pytest.approx(expected_row(method, own, target))
    assert rows[0]["compute_overhead"] == 0


def test_overhead_is_that_over_the_same_local_work(tmp_path: Path) -> None:
    """Twenty steps take longer than five under any method."""
    seconds = {"fedavg": 2.0, "gwpf": 3.0}
    runs = [
        make_run(
            tmp_path / method / str(steps),
            f"method={method}",
            local_steps=steps,
            records=[make_record(1, compute_seconds=steps * seconds[method])],
        )
        for method, steps in (("fedavg", 5), ("gwpf", 5), ("fedavg", 20), ("gwpf", 50))
    ]
    rows = summarise(group_runs([read_run(run) for run in runs]))
    assert [row["compute_overhead"] for row in rows] == [0, 0.5, 0, None]


def test_the_row_agrees_with_the_summary(tmp_path: Path) -> None:
    """The same names for the same numbers."""
    for name, changes in (("accuracy", {}), ("perplexity", {"test_loss": 3.5})):
        records = [*RECORDS, make_record(4, **changes)]
        run = make_run(tmp_path / name, records=records, metric=name)
        (row,) = summarise(group_runs([read_run(run)]))
        summary = History(tmp_path / "other")
        summary.records = records
        expected = summary.summary(
            method="", dataset="", model="", seed=0, parameters=0, metric=name
        )
        common = row.keys() & expected.keys()
        assert common == {
            f"final_{name}",
            f"best_{name}",
            "total_uplink_bytes",
            "total_downlink_bytes",
            "traffic_ratio",
            "modelled_seconds",
            "uplink_bits_per_parameter",
            "downlink_bits_per_parameter",
            "total_csr_bytes",
            "final_mean_accuracy",
        }
        assert {key: row[key] for key in common} == {k: expected[k] for k in common}


def test_perplexity(tmp_path: Path) -> None:
    """Lower is better, and a target is an upper bound."""
    records = [
        make_record(number, test_loss=loss)
        for number, loss in enumerate([5.0, 3.0, 3.5], start=1)
    ]
    run = read_run(make_run(tmp_path, records=records, metric="perplexity"))
    (row,) = summarise({"gwpf": [run]}, 30)
    assert row["final_perplexity"] == math.exp(3.5)
    assert row["best_perplexity"] == math.exp(3.0)
    assert row["rounds_to_target"] == 2
    assert first_reaching(run, math.exp(3.0)) == records[1]
    assert first_reaching(run, 20) is None


def test_the_perplexity_of_a_model_that_diverged_is_infinite(tmp_path: Path) -> None:
    """It was evaluated; that its loss is not a number is no reason to pass over it."""
    assert metric_of(make_record(1, test_loss=math.nan), "perplexity") == math.inf
    unmeasured = make_record(1, test_loss=None, test_accuracy=None)
    assert metric_of(unmeasured, "perplexity") is None
    assert math.isfinite(metric_of(make_record(1, test_loss=1e9), "perplexity") or 0)

    records = [*RECORDS, make_record(4, test_loss=math.nan)]
    runs = [
        make_run(tmp_path / "0", records=records, metric="perplexity"),
        make_run(
            tmp_path / "1",
            records=[*RECORDS, make_record(4, test_loss=1000)],
            metric="perplexity",
            seed=1,
        ),
    ]
    report(*runs, "--target", 2, "--output", tmp_path / "report")
    (row,) = table(tmp_path / "report")
    assert row["final_perplexity"] == "inf"
    assert "final_perplexity_std" not in row
    assert row["reached"] == "2"
    assert "| inf |" in (tmp_path / "report" / "report.md").read_text()


def test_curves_are_means_over_the_seeds(tmp_path: Path) -> None:
    """Of both axes, with the range, over the rounds that all seeds have."""
    one = [make_record(n, cumulative_uplink_bytes=100 * n) for n in range(1, 5)]
    other = [
        make_record(n, cumulative_uplink_bytes=300 * n, test_accuracy=0.5)
        for n in range(1, 5)
    ]
    other[2] = replace(other[2], test_accuracy=None)
    group = [Run(tmp_path, {}, "accuracy", records) for records in (one, other)]
    curve = average_curve(
        group, lambda r: r.cumulative_uplink_bytes, lambda r: r.test_accuracy
    )
    assert curve.x == [200, 400, 800]
    assert curve.mean == pytest.approx([0.5, (2 / 3 + 0.5) / 2, 0.65])
    assert curve.low == pytest.approx([0.5, 0.5, 0.5])
    assert curve.high == pytest.approx([0.5, 2 / 3, 0.8])


# Showing


@pytest.mark.filterwarnings("error")
def test_names_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in a run's files is a formula, a variable, markup or a path."""
    monkeypatch.setenv("GWPF_SECRET", "hush")
    names = [r"$\frac{", "$x^2$", "${oc.env:GWPF_SECRET}", "${method}", "${", "???"]
    names += ["_hidden", "[/red]", "a|b`c", "=1+1", "../dataset/digits", "gwpf,apf"]
    runs = [make_run(tmp_path / str(number)) for number in range(len(names))]
    for run, name in zip(runs, names, strict=True):
        rewrite(run, "method.name", f"'{name}'")
        rewrite(run, "optimizer", f"'{name} {name}'")
    output = tmp_path / "report"
    report(*runs, "--output", output)
    labels = [f"{name} optimizer={name} {name}" for name in names]
    assert [row["label"] for row in table(output)] == labels
    text = (output / "report.md").read_text()
    printed = capsys.readouterr().out
    for run, name, label in zip(runs, names, labels, strict=True):
        assert f"- `{label.replace('`', chr(39))}`: `{run}`" in text
        assert name in printed
    assert "hush" not in text + printed
    # By itself, too, what Matplotlib would not name.
    report(runs[names.index("_hidden")], "--output", output)


def test_folders_steer_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does a file that lists them; the names may be those of an archive."""
    run = make_run(tmp_path / "a\n\x1b[2J`[red]")
    output = tmp_path / "\x1b[2J[/red]"
    report(run, "--output", output)
    text = (output / "report.md").read_text()
    assert r"/a\n\x1b[2J'[red]`" in text
    printed = capsys.readouterr().out
    assert r"\x1b[2J[/red]" in printed
    assert "\x1b" not in text + printed
    (run / "summary.json").unlink()
    assert r"a\n\x1b[2J`[red]: not finished" in refusal(capsys, run)


def test_a_legend_has_an_end(tmp_path: Path) -> None:
    """However many there are of however long names, Matplotlib can draw it."""
    run = read_run(make_run(tmp_path / "run"))
    assert draw_figure("bandwidth", {"x " * 50_000: [run]}, None, tmp_path / "long.png")
    assert imread(tmp_path / "long.png").shape[0] < 1000
    many = {f"{number} {'x' * 40}": [run] for number in range(200)}
    assert draw_figure("bandwidth", many, None, tmp_path / "many.png")
    assert imread(tmp_path / "many.png").shape[0] == 6000


def test_a_long_word_leaves_the_numbers_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is broken, as no other word is."""
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1", optimizer="x" * 4000)]
    report(*runs, "--output", tmp_path / "report")
    printed = capsys.readouterr().out
    assert printed.count("0.7500") >= 2
    assert max(map(len, printed.splitlines())) < 200


@pytest.mark.filterwarnings("error")
def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the terminal and in Markdown for people, raw in a CSV, and drawn."""
    seeds_of(tmp_path / "runs", "fedavg", "gwpf")
    output = tmp_path / "deep" / "report"
    report(tmp_path / "runs", "--target", "0.85", "--output", output)

    rows = table(output)
    assert [row["label"] for row in rows] == ["fedavg", "gwpf"]
    runs = [read_run(folder) for folder in find_runs([tmp_path / "runs"])]
    for row, calculated in zip(rows, summarise(group_runs(runs), 0.85), strict=True):
        assert row == {k: "" if (v := calculated[k]) is None else str(v) for k in row}
        assert all(v is None for k, v in calculated.items() if k not in row)

    text = (output / "report.md").read_text(encoding="utf-8")
    assert (
        "| `gwpf` | 3 | 0.6167 ± 0.4481 | 0.7167 | 0.5400 | 0.00362 | 0.00800 |" in text
    )
    assert "## To a test accuracy of at least 0.85" in text
    assert "| `gwpf` | 2/3 | 3.5 ± 0.7 | " in text
    assert f"- `gwpf`: `{tmp_path / 'runs' / 'gwpf' / '0'}`" in text
    for name in FIGURES:
        assert f"]({name})" in text
        assert imread(output / name).shape[1] == 1050
    assert {file.name for file in output.iterdir()} == FIGURES | {
        "report.md",
        "report.csv",
    }

    printed = capsys.readouterr().out
    assert "0.6167 ± 0.4481" in printed
    assert "…" not in printed
    assert str(output) in printed


def test_what_no_run_has_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns, sections and figures, also those of an earlier report."""
    output = tmp_path / "report"
    full = make_run(tmp_path / "full", records=[make_record(1, frozen_fraction=0.5)])
    report(full, "--target", "0.4", "--output", output)
    assert FIGURES <= set(os.listdir(output))

    lacking: dict[str, int | None] = dict.fromkeys(
        (
            "compute_seconds",
            "modelled_seconds",
            "uplink_bits_per_parameter",
            "downlink_bits_per_parameter",
            "csr_bytes",
            "mean_accuracy",
            "slowest_client_seconds",
            "median_client_seconds",
        )
    )
    for way in ("uplink", "downlink"):
        for part in ("value", "position", "buffer", "overhead"):
            lacking[f"{way}_{part}_bytes"] = 0
    run = make_run(tmp_path / "lacking", records=[make_record(1, **lacking)])
    report(run, "--output", output)
    (row,) = table(output)
    assert list(row) == [
        "label",
        "seeds",
        "final_accuracy",
        "best_accuracy",
        "total_uplink_bytes",
        "total_downlink_bytes",
        "total_bytes",
        "traffic_ratio",
    ]
    assert FIGURES & set(os.listdir(output)) == {
        "metric_rounds.png",
        "metric_bytes.png",
    }
    text = (output / "report.md").read_text()
    assert "| 0.5000 |" in text and "±" not in text.partition("Means over")[0]
    assert "## Cost" not in text
    assert "## Where bytes go" not in text
    assert "frozen.png" not in text
    capsys.readouterr()


def test_a_target_that_no_run_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That too is a result."""
    output = tmp_path / "report"
    report(make_run(tmp_path / "run"), "--target", "1", "--output", output)
    (row,) = table(output)
    assert row["reached"] == "0"
    assert "rounds_to_target" not in row
    assert "0/1" in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("accuracy", [None, 0.1])
def test_runs_in_which_everything_failed(
    tmp_path: Path, accuracy: float | None
) -> None:
    """No byte, no time: nothing to divide by, and no place on a logarithmic axis."""
    nothing = {
        "test_accuracy": accuracy,
        "test_loss": math.nan,
        "cumulative_uplink_bytes": 0,
        "cumulative_downlink_bytes": 0,
        "dense_bytes": 0,
        "clients": 0,
        "failures": 10,
        "compute_seconds": None,
        "modelled_seconds": 0.0,
        "slowest_client_seconds": None,
        "median_client_seconds": None,
        "uplink_bits_per_parameter": 0.0,
        "downlink_bits_per_parameter": 0.0,
        **dict.fromkeys((column for column in COLUMNS if "_bytes" in column), 0),
    }
    runs = [
        make_run(tmp_path / str(seed), records=[make_record(1, **nothing)], seed=seed)
        for seed in range(2)
    ]
    output = tmp_path / "report"
    report(*runs, "--target", "0.5", "--output", output)
    (row,) = table(output)
    assert "traffic_ratio" not in row
    drawn = FIGURES & set(os.listdir(output))
    assert drawn == ({"metric_rounds.png"} if accuracy else set())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_figures_of_many_groups_and_of_single_points(
    tmp_path: Path, metric: str
) -> None:
    """More groups than colours, long labels, and a run of one round."""
    records = [replace(RECORDS[0], test_loss=math.nan if metric == "accuracy" else 3.0)]
    for number in range(10):
        make_run(
            tmp_path / "runs" / str(number),
            records=records,
            metric=metric,
            lr=(number + 1) / 7,
            optimizer="adam" if number % 2 else "sgd",
            note=f"[red]a|b`c {'x' * 60} {'y' * 60}" if number == 9 else None,
        )
    output = tmp_path / "report"
    report(tmp_path / "runs", "--target", "1", "--output", output)
    assert len(table(output)) == 10
    lines = (output / "report.md").read_text().splitlines()
    # No label breaks its row.
    rows = [line.replace("\\|", "") for line in lines if line.startswith("| `")]
    assert len({row.count("|") for row in rows[:10]}) == 1
    assert {row.count("`") for row in rows} == {2}


def test_what_it_takes_to_a_target(tmp_path: Path) -> None:
    """A point for each group that reaches it, a line through a method's intervals.

    It is hollow where only some of the group's seeds do.
    """
    groups = {
        name: [
            read_run(make_run(tmp_path / name / str(seed), *overrides, seed=seed))
            for seed in range(2)
        ]
        for name, *overrides in (
            ("every 5", "method=gwpf"),
            ("every 50", "method=gwpf", "local_steps=50"),
            ("fedavg", "method=fedavg", "local_steps=50"),
        )
    }
    short = [make_record(1, test_accuracy=0.1)]
    groups["never"] = [read_run(make_run(tmp_path / "never", records=short))]
    groups["fedavg"][1] = read_run(make_run(tmp_path / "luckless", records=short))
    file = tmp_path / "figure.png"
    seen: dict[str, Figure] = {}
    with mock.patch.object(
        Figure, "savefig", lambda self, *_, **__: seen.update(f=self)
    ):
        assert draw_figure("to_target", groups, 0.5, file)
    (axes,) = seen["f"].axes
    rows = {row["label"]: row for row in summarise(groups, 0.5)}
    points = {
        str(line.get_label()): np.array(line.get_data()) for line in axes.get_lines()
    }
    assert points.keys() == {"every 5", "every 50", "fedavg"}
    hollow = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    assert [line.get_label() for line in hollow] == ["fedavg"]
    for label, ((rounds,), (size,)) in points.items():
        assert rounds == rows[label]["rounds_to_target"]
        assert size == rows[label]["bytes_to_target"]
    lengths = [np.size(path.vertices) // 2 for path in axes.collections[0].get_paths()]
    assert sorted(lengths) == [1, 2]
    assert not draw_figure("to_target", groups, 0.999, file)
    assert not draw_figure("to_target", groups, None, file)


def test_where_bytes_go(tmp_path: Path) -> None:
    """Of the bytes of all rounds and seeds, not of each round by itself."""
    records = [
        make_record(1),
        make_record(2, uplink_value_bytes=0, uplink_position_bytes=0),
    ]
    run = read_run(make_run(tmp_path, records=records))
    (section,) = [
        section
        for section in lay_out(summarise({"gwpf": [run]}), "accuracy")
        if section.title == "Where bytes go"
    ]
    assert dict(zip(section.head[1:], section.rows[0][1:], strict=True)) == {
        "up value": "54.5%",
        "up position": "27.3%",
        "up buffer": "0.0%",
        "up overhead": "18.2%",
        "down value": "75.0%",
        "down position": "0.0%",
        "down buffer": "25.0%",
        "down overhead": "0.0%",
    }


def test_columns_that_compare_with_the_first_row(tmp_path: Path) -> None:
    """Bytes relative to it, and how often any number goes into its own."""
    fewer = {"cumulative_uplink_bytes": 500, "cumulative_downlink_bytes": 1000}
    groups = {
        "all": [read_run(make_run(tmp_path / "0", records=[make_record(1)]))],
        "half": [read_run(make_run(tmp_path / "1", records=[make_record(1, **fewer)]))],
    }
    first, row = summarise(groups, 0.5)
    assert write_cell(row, first, "to first") == "0.500"
    assert write_cell(row, first, "× fewer MB up") == "2.0"
    assert write_cell(row, first, "× fewer MB to target") == "2.0"
    assert write_cell(row, first, "× fewer") == "8.0"
    assert write_cell(row, first, "× fewer mean frozen") == "–"
    with pytest.raises(KeyError):
        write_cell(row, first, "MB sideways")


def test_the_size_of_a_network_that_is_left_behind(tmp_path: Path) -> None:
    """In bits for each of its 50 parameters."""
    run = make_run(tmp_path)
    (run / "network.mask").write_bytes(bytes(6))
    (row,) = summarise({"fedpm": [read_run(run)]})
    assert row["mask_bits_per_parameter"] == pytest.approx(0.96)
    assert write_cell(row, row, "file bits") == "0.960"


def test_the_tables_show_no_digit_too_few(tmp_path: Path) -> None:
    """Large numbers keep all their digits before the point, small ones three."""
    records = [
        make_record(
            1,
            cumulative_uplink_bytes=12_345_678_900,
            cumulative_downlink_bytes=1234,
            dense_bytes=10**12,
        )
    ]
    run = read_run(make_run(tmp_path, records=records))
    result = lay_out(summarise({"gwpf": [run]}), "accuracy")[0]
    cells = dict(zip(result.head, result.rows[0], strict=True))
    assert cells["MB up"] == "12346"
    assert cells["MB down"] == "0.00123"
    assert (cells["to FedAvg"], cells["× fewer"]) == ("0.012", "81.0")


def test_the_slowest_and_the_median_client(tmp_path: Path) -> None:
    """Means over the rounds that have them, only where a run has any."""
    times: list[tuple[float | None, float | None]] = [(4.0, 1.0), (None, None), (8, 2)]
    names = ("slowest_client_seconds", "median_client_seconds")
    folders = {}
    for label, rounds in (("modelled", times), ("not", [(None, None)] * 3)):
        records = [
            make_record(number, **dict(zip(names, both, strict=True)))
            for number, both in enumerate(rounds, start=1)
        ]
        folders[label] = [read_run(make_run(tmp_path / label, records=records))]
    cost = lay_out(summarise(folders), "accuracy")[-1]
    assert cost.head[-2:] == ["slowest s", "median s"]
    assert [row[-2:] for row in cost.rows] == [["6.00", "1.50"], ["–", "–"]]
    (cost,) = lay_out(summarise({"not": folders["not"]}), "accuracy")[-1:]
    assert not {"slowest s", "median s"} & set(cost.head)


def test_bandwidths_of_many_clients_are_reported(tmp_path: Path) -> None:
    """A list with one value a client is long, and a run that had it is a run."""
    for number, mbps in enumerate((3.25, 1.25)):
        folder = tmp_path / "runs" / str(number)
        make_run(folder, num_clients=1000, network__uplink_mbps=[mbps] * 1000)
    report(tmp_path / "runs", "--output", tmp_path / "report")
    first, second = table(tmp_path / "report")
    assert first["label"].count("3.25") == second["label"].count("1.25") == 1000


# Command line


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [
        ("accuracy", "98", "target=98.0: must be an accuracy in (0, 1]"),
        ("accuracy", "nan", "target=nan: must be an accuracy in (0, 1]"),
        ("perplexity", "0.9", "target=0.9: must be a perplexity >= 1"),
        ("perplexity", "inf", "target=inf: must be a perplexity >= 1"),
        ("accuracy", "high", "argument --target: invalid float value: 'high'"),
    ],
)
def test_impossible_targets(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metric: str,
    target: str,
    message: str,
) -> None:
    """A percentage is no accuracy."""
    run = make_run(tmp_path / "run", metric=metric)
    assert refusal(capsys, run, "--target", target) == message


def test_other_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No runs, an unknown option, a file where the folder should be."""
    assert "RUN" in refusal(capsys)
    assert "--targe" in refusal(capsys, tmp_path, "--targett", "1")
    run = make_run(tmp_path / "run")
    line = refusal(capsys, run, "--output", run / "config.yaml")
    assert line.startswith(
        f"output={run / 'config.yaml'}: must be a folder to write to"
    )


def test_runs_are_only_read(tmp_path: Path) -> None:
    """A report changes nothing in them."""
    run = make_run(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    report(run, "--output", tmp_path / "report")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
    assert read_history(run) == RECORDS
    check_comparable([read_run(run)])
