"""What a run leaves behind: files that can be trusted, and a readable display."""

import io
import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gwpf_baseline.records.display import Display, closing_table
from gwpf_baseline.records.history import (
    COLUMNS,
    LARGEST,
    History,
    RoundRecord,
    from_rows,
    read_history,
)
from gwpf_baseline.records.plots import plot_history

HEADER = (
    "round,seconds,test_accuracy,test_loss,train_loss,uplink_bytes,downlink_bytes,"
    "cumulative_uplink_bytes,cumulative_downlink_bytes,dense_bytes,frozen_fraction,"
    "sent_fraction,clients,failures,compute_seconds,modelled_seconds,"
    "uplink_bits_per_parameter,downlink_bits_per_parameter,csr_bytes,mean_accuracy,"
    "uplink_value_bytes,uplink_position_bytes,uplink_buffer_bytes,"
    "uplink_overhead_bytes,downlink_value_bytes,downlink_position_bytes,"
    "downlink_buffer_bytes,downlink_overhead_bytes,slowest_client_seconds,"
    "median_client_seconds"
)
RUN: dict[str, Any] = {"method": "gwpf", "dataset": "digits", "model": "mlp", "seed": 3}


def make_record(number: int, **changes: Any) -> RoundRecord:
    """Make the record of a round in which 10 clients send 100 bytes and get 200."""
    record = RoundRecord(
        round=number,
        seconds=0.1 * number,
        test_accuracy=1 - 1 / (number + 1),
        test_loss=1 / (number + 1),
        train_loss=1 / (number + 2),
        uplink_bytes=1000,
        downlink_bytes=2000,
        cumulative_uplink_bytes=1000 * number,
        cumulative_downlink_bytes=2000 * number,
        dense_bytes=12000 * number,
        frozen_fraction=0.9,
        sent_fraction=0.1,
        clients=10,
        failures=0,
        compute_seconds=0.03,
        modelled_seconds=0.2 * number,
        uplink_bits_per_parameter=1.5,
        downlink_bits_per_parameter=3.0,
    )
    return replace(record, **changes)


def scalars(folder: Path, column: str) -> list[tuple[int, float]]:
    """Read a column back from a run's TensorBoard files."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    if column not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(column)]


# Records and their file


def test_columns_are_those_of_the_contract() -> None:
    """People and scripts rely on the names and on their order."""
    assert ",".join(COLUMNS) == HEADER


def test_history_csv_to_the_letter(tmp_path: Path) -> None:
    """What is missing is an empty cell, and a true zero remains one."""
    history = History(tmp_path)
    history.add(
        make_record(
            1,
            seconds=1.5,
            test_accuracy=None,
            test_loss=None,
            train_loss=1 / 3,
            frozen_fraction=0.0,
            sent_fraction=None,
            modelled_seconds=None,
        )
    )
    history.add(
        make_record(
            2,
            seconds=2.5,
            modelled_seconds=0.5,
            csr_bytes=700.0,
            mean_accuracy=0.25,
            uplink_value_bytes=990,
            uplink_overhead_bytes=10,
            downlink_position_bytes=60,
            downlink_buffer_bytes=1940,
            slowest_client_seconds=0.4,
            median_client_seconds=0.25,
        )
    )
    assert (tmp_path / "history.csv").read_bytes().decode() == (
        f"{HEADER}\n"
        "1,1.5,,,0.3333333333333333,1000,2000,1000,2000,12000,0.0,,10,0,0.03,,"
        "1.5,3.0,,,0,0,0,0,0,0,0,0,,\n"
        "2,2.5,0.6666666666666667,0.3333333333333333,0.25,1000,2000,2000,4000,24000,"
        "0.9,0.1,10,0,0.03,0.5,1.5,3.0,700,0.25,990,0,0,10,0,60,1940,0,0.4,"
        "0.25\n"
    )


def test_a_row_is_on_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    """A run that is killed, and so never closes its files, keeps its rounds."""
    history = History(tmp_path)
    for number in (1, 2, 3):
        history.add(make_record(number))
        assert read_history(tmp_path) == history.records
        assert len(scalars(tmp_path, "test_accuracy")) == number


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_loss_that_is_not_finite_is_empty(value: float) -> None:
    """A diverged run has no loss; ``nan`` would spread through every report."""
    assert make_record(1, test_loss=value).test_loss is None
    assert make_record(1, compute_seconds=value).compute_seconds is None
    assert make_record(1, modelled_seconds=value).modelled_seconds is None


def test_numbers_of_numpy_and_torch_become_plain(tmp_path: Path) -> None:
    """Their repr is no number, and JSON does not know them."""
    history = History(tmp_path)
    history.add(
        make_record(
            1,
            test_accuracy=np.float64(0.1),
            train_loss=torch.tensor(0.5),
            clients=np.int64(10),
        )
    )
    assert read_history(tmp_path) == [make_record(1, test_accuracy=0.1, train_loss=0.5)]
    json.dumps([astuple(r) for r in history.records])


@pytest.mark.parametrize("column", ["round", "seconds", "uplink_bytes", "failures"])
def test_a_required_number_may_not_be_missing(column: str) -> None:
    """Only measurements may be."""
    with pytest.raises(ValueError, match=f"{column}: None is no number"):
        make_record(1, **{column: None})


FLOATS = st.floats(-LARGEST, LARGEST, exclude_min=True, exclude_max=True)
COUNTS = st.integers(min_value=0, max_value=2**62)
RECORDS = st.builds(
    RoundRecord,
    COUNTS,
    FLOATS,
    *[st.none() | FLOATS] * 3,
    *[COUNTS] * 5,
    *[st.none() | FLOATS] * 2,
    COUNTS,
    COUNTS,
    *[st.none() | FLOATS] * 2,
)


@pytest.mark.parametrize(
    ("column", "value"),
    [("uplink_bytes", 10**400), ("uplink_bytes", -(10**400)), ("train_loss", 1e100)]
    + [("csr_bytes", 10**400)],
)
def test_what_no_sum_could_hold_is_no_record(column: str, value: float) -> None:
    """Else who adds it to others, or draws it, would stumble over it."""
    row = astuple(make_record(1))
    index = COLUMNS.index(column)
    with pytest.raises(ValueError, match=f"{COLUMNS[index]} is no number below"):
        from_rows([[*row[:index], value, *row[index + 1 :]]])


@given(record=RECORDS)
def test_round_trips_are_exact(
    tmp_path_factory: pytest.TempPathFactory, record: RoundRecord
) -> None:
    """Neither the file nor a checkpoint in JSON changes a bit of any number."""
    folder = tmp_path_factory.mktemp("run")
    history = History(folder)
    history.add(record)
    history.close()
    checkpoint = json.dumps([astuple(r) for r in history.records], allow_nan=False)
    # A repr tells -0.0 from 0.0 and 1 from 1.0, which equality does not.
    assert repr(from_rows(json.loads(checkpoint))) == repr([record])
    assert repr(read_history(folder)) == repr([record])


def test_rows_of_another_length_are_refused() -> None:
    """As those of another version's checkpoint would be."""
    for length in (14, 15, 17):
        with pytest.raises(ValueError, match=f"{length} values, but 30 columns"):
            from_rows([[0] * length])


GOOD_ROW = "1,1.5,,,0.5,1000,2000,1000,2000,12000,0.9,,10,0,0.25,7.5,1.0,4.0,,,"
GOOD_ROW += "0,0,0,0,0,0,0,0,2.5,2.0\n"
OLD_HEADERS = [HEADER.partition(f",{name}")[0] for name in ("uplink_bits", "slowest")]
OLD_ROWS = [GOOD_ROW.partition(cells)[0] + "\n" for cells in (",1.0,4.0", ",2.5,2.0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the columns are not those of a history"),
        ("round,accuracy\n1,0.5\n", "line 1: the columns"),
        (HEADER, "line 1: the line is incomplete"),
        (f"{HEADER}\n{GOOD_ROW}2,3.1,,,0.", "line 3: the line is incomplete"),
        # All cells are there, but the last may have been cut from 12 to 1.
        (f"{HEADER}\n{GOOD_ROW[:-1]}", "line 2: the line is incomplete"),
        (f"{HEADER}\n{GOOD_ROW}\n", "line 3: 1 values, but 30 columns"),
        (f"{HEADER}\n{GOOD_ROW}1,2\n", "line 3: 2 values, but 30 columns"),
        (f"{HEADER}\nx{GOOD_ROW}", "line 2: round: 'x1' is no number"),
        (f"{HEADER}\n{GOOD_ROW.replace('1.5', '')}", "line 2: seconds: None"),
        (f"{HEADER}\n{GOOD_ROW.replace('0.9', chr(0))}", "line 2: frozen_fraction"),
        (f"{HEADER}\n{GOOD_ROW.replace('0.25', '-')}", "line 2: compute_seconds: '-'"),
        (f"{HEADER}\n{GOOD_ROW.replace('7.5', '7;5')}", "line 2: modelled_seconds"),
        # As releases before these columns wrote it.
        *(
            (f"{header}\n{row}", "line 1: the columns are not those of")
            for header, row in zip(OLD_HEADERS, OLD_ROWS, strict=True)
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The error says which file, which line and what is wrong with it."""
    path = tmp_path / "history.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_history(tmp_path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    """A broken disk gives the same kind of message."""
    row = GOOD_ROW.encode().replace(b"0.5", b"\xff\xfe")
    (tmp_path / "history.csv").write_bytes(f"{HEADER}\n".encode() + row)
    with pytest.raises(ValueError, match="line 2: train_loss"):
        read_history(tmp_path)


# Resuming


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Rounds after the checkpoint are run again, and must not be there twice."""
    records = [make_record(number) for number in range(1, 8)]
    whole = History(tmp_path / "whole")
    for record in records:
        whole.add(record)

    killed = History(tmp_path / "resumed")
    for record in records[:3]:
        killed.add(record)
    checkpoint = json.dumps([astuple(r) for r in killed.records])
    killed.add(replace(records[3], test_accuracy=0.0))
    resumed = History(tmp_path / "resumed")
    resumed.restore(from_rows(json.loads(checkpoint)))
    for record in records[3:]:
        resumed.add(record)

    files = [tmp_path / name / "history.csv" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert scalars(tmp_path / "whole", "test_accuracy") == scalars(
        tmp_path / "resumed", "test_accuracy"
    )
    assert resumed.records == whole.records


def test_a_resume_that_fails_early_destroys_nothing(tmp_path: Path) -> None:
    """The checkpoint may turn out to be unreadable after the history was made."""
    History(tmp_path).add(make_record(1))
    History(tmp_path)
    assert read_history(tmp_path) == [make_record(1)]


# TensorBoard


def test_tensorboard_has_what_the_csv_has(tmp_path: Path) -> None:
    """Every column under its own name; what is missing is no point, not a zero."""
    history = History(tmp_path)
    first = make_record(1, test_accuracy=None, frozen_fraction=None)
    history.add(replace(first, compute_seconds=None))
    history.add(make_record(2, test_accuracy=0.75, frozen_fraction=None))
    history.close()
    assert scalars(tmp_path, "test_accuracy") == [(2, 0.75)]
    assert scalars(tmp_path, "cumulative_uplink_bytes") == [(1, 1000), (2, 2000)]
    assert scalars(tmp_path, "clients") == [(1, 10), (2, 10)]
    assert scalars(tmp_path, "frozen_fraction") == []
    assert scalars(tmp_path, "compute_seconds") == [(2, pytest.approx(0.03))]
    modelled = [(1, pytest.approx(0.2)), (2, pytest.approx(0.4))]
    assert scalars(tmp_path, "modelled_seconds") == modelled


# Summary


def test_summary_of_a_run(tmp_path: Path) -> None:
    """Final is the last evaluation, even if later rounds were not evaluated."""
    history = History(tmp_path)
    for number, accuracy in enumerate([0.5, 0.9, 0.8, None], start=1):
        history.add(make_record(number, test_accuracy=accuracy, seconds=number * 2.5))
    summary = history.write_summary(**RUN, parameters=50)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert list(summary.items()) == [
        *RUN.items(),
        ("rounds", 4),
        ("parameters", 50),
        ("metric", "accuracy"),
        ("final_accuracy", 0.8),
        ("best_accuracy", 0.9),
        ("final_perplexity", None),
        ("best_perplexity", None),
        ("total_uplink_bytes", 4000),
        ("total_downlink_bytes", 8000),
        ("dense_bytes", 48000),
        ("traffic_ratio", 0.25),
        ("seconds", 10.0),
        ("modelled_seconds", 0.8),
        ("uplink_bits_per_parameter", 1.5),
        ("downlink_bits_per_parameter", 3.0),
        ("total_csr_bytes", None),
        ("final_mean_accuracy", None),
    ]


def test_summary_of_a_sparse_and_random_network(tmp_path: Path) -> None:
    """Bytes as CSR are summed up, the mean network's accuracy is the last one."""
    history = History(tmp_path)
    for number, accuracy in enumerate([0.5, 0.75, None], start=1):
        history.add(make_record(number, csr_bytes=100, mean_accuracy=accuracy))
    summary = history.summary(**RUN, parameters=50)
    assert summary["total_csr_bytes"] == 300
    assert summary["final_mean_accuracy"] == 0.75


def test_summary_of_a_language_model(tmp_path: Path) -> None:
    """The perplexity is exp(loss); the best is the lowest, and accuracies remain."""
    history = History(tmp_path)
    for number, loss in enumerate([6.0, 4.5, 5.0, None], start=1):
        history.add(make_record(number, test_loss=loss, modelled_seconds=None))
    summary = history.write_summary(**RUN, parameters=50, metric="perplexity")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["metric"] == "perplexity"
    assert summary["final_perplexity"] == pytest.approx(148.4131591)
    assert summary["best_perplexity"] == pytest.approx(90.0171313)
    assert summary["final_accuracy"] == 0.8
    assert summary["modelled_seconds"] is None


def test_summary_of_a_language_model_that_diverged(tmp_path: Path) -> None:
    """A loss beyond what exp can take is a huge number that JSON holds, no error."""
    history = History(tmp_path)
    history.add(make_record(1, test_loss=1e30))
    summary = history.write_summary(**RUN, parameters=50, metric="perplexity")
    assert 1e300 < summary["final_perplexity"] == summary["best_perplexity"]
    assert math.isfinite(summary["final_perplexity"])
    history.add(make_record(2, test_loss=math.nan))
    assert history.summary(**RUN, parameters=50, metric="perplexity") == {
        **summary,
        "rounds": 2,
        "final_accuracy": make_record(2).test_accuracy,
        "best_accuracy": make_record(2).test_accuracy,
        "total_uplink_bytes": 2000,
        "total_downlink_bytes": 4000,
        "dense_bytes": 24000,
        "seconds": 0.2,
        "modelled_seconds": 0.4,
    }


def test_summary_without_a_round(tmp_path: Path) -> None:
    """A run that is stopped in its first round still ends in order."""
    summary = History(tmp_path).write_summary(**RUN, parameters=50)
    assert (summary["rounds"], summary["dense_bytes"]) == (0, 0)
    assert summary["final_accuracy"] is None
    assert summary["best_accuracy"] is None
    assert summary["traffic_ratio"] is None
    assert summary["modelled_seconds"] is None
    summary = History(tmp_path).summary(**RUN, parameters=50, metric="perplexity")
    assert summary["final_perplexity"] is summary["best_perplexity"] is None


# Plots


def ink(path: Path) -> float:
    """Measure the share of an image that is not white, and check its size."""
    image = imread(path)[..., :3]
    height, width, _ = image.shape
    assert 500 <= height <= 1500
    assert 800 <= width <= 2000
    return float((image.min(axis=2) < 0.9).mean())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "records",
    [
        pytest.param([], id="no round"),
        pytest.param([make_record(1)], id="one round"),
        pytest.param(
            [make_record(0, uplink_bytes=0, downlink_bytes=0)], id="before round 1"
        ),
        pytest.param([make_record(i) for i in range(101)], id="many rounds"),
        pytest.param(
            [
                make_record(i, frozen_fraction=None, sent_fraction=None)
                for i in range(1, 9)
            ],
            id="no shares",
        ),
        pytest.param(
            [make_record(i, test_accuracy=None) for i in range(1, 9)],
            id="no evaluation",
        ),
        pytest.param(
            [
                make_record(
                    1, cumulative_uplink_bytes=0, cumulative_downlink_bytes=0, clients=0
                )
            ],
            id="all clients failed",
        ),
    ],
)
def test_plots_of_every_kind_of_run(tmp_path: Path, records: list[RoundRecord]) -> None:
    """Each has something to see, a curve or a sentence, and draws without warnings."""
    history = History(tmp_path)
    history.restore(records)
    plot_history(history.records, history.folder)
    history.close()
    for name in ("accuracy.png", "traffic.png", "frozen.png"):
        assert 0.001 < ink(tmp_path / name) < 0.2


def test_a_plot_says_what_is_missing(tmp_path: Path) -> None:
    """Rather than to show axes without a curve."""
    missing = {"test_accuracy": None, "frozen_fraction": None, "sent_fraction": None}
    for folder, changes in (("full", {}), ("lacking", missing)):
        history = History(tmp_path / folder)
        history.add(make_record(1, **changes))
        plot_history(history.records, history.folder)
        history.close()
    for name in ("accuracy.png", "frozen.png"):
        assert ink(tmp_path / "lacking" / name) < ink(tmp_path / "full" / name) / 1.5


# Display


def make_console(**options: Any) -> tuple[Console, io.StringIO]:
    """Make a console of 80 columns that writes to memory."""
    text = io.StringIO()
    return Console(file=text, width=80, _environ={}, **options), text


def test_plain_display_prints_a_line_a_tenth() -> None:
    """The first round shows that the run works; then each tenth, and the last."""
    console, text = make_console()
    with Display(num_rounds=200, console=console) as display:
        for number in range(1, 201):
            display.update(make_record(number, seconds=4000.0))
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        f"{number}/200" for number in (1, *range(20, 201, 20))
    ]
    assert lines[-1] == (
        "round 200/200 acc 0.995 frozen 90% up 200.0 kB down 400.0 kB 1:06:40"
    )


@pytest.mark.parametrize("num_rounds", [1, 3, 7, 10, 11, 19, 105])
def test_plain_display_of_any_number_of_rounds(num_rounds: int) -> None:
    """Few enough lines for a log, and always the last round."""
    console, text = make_console()
    with Display(num_rounds, console) as display:
        for number in range(1, num_rounds + 1):
            display.update(make_record(number))
    lines = text.getvalue().splitlines()
    assert len(lines) <= 11
    assert lines[-1].startswith(f"round {num_rounds}/{num_rounds} ")


def test_plain_display_leaves_out_what_it_does_not_know() -> None:
    """And keeps the last accuracy on show between two evaluations."""
    console, text = make_console()
    lacking = {"test_accuracy": None, "frozen_fraction": None, "seconds": 1.0}
    with Display(num_rounds=3, console=console) as display:
        display.update(make_record(1, **lacking))
        display.update(make_record(2, **lacking | {"test_accuracy": 0.5}))
        display.update(make_record(3, **lacking))
    assert text.getvalue().splitlines() == [
        "round 1/3 up 1.0 kB down 2.0 kB 0:00:01",
        "round 2/3 acc 0.500 up 2.0 kB down 4.0 kB 0:00:01",
        "round 3/3 acc 0.500 up 3.0 kB down 6.0 kB 0:00:01",
    ]


def test_plain_display_of_a_language_model() -> None:
    """It shows the perplexity of the last round that was evaluated, no accuracy."""
    console, text = make_console()
    with Display(num_rounds=3, console=console, metric="perplexity") as display:
        for number, loss in ((1, None), (2, 5.0), (3, None)):
            accuracy = None if loss is None else 0.25
            record = make_record(number, test_loss=loss, test_accuracy=accuracy)
            display.update(replace(record, frozen_fraction=None, seconds=1.0))
    assert text.getvalue().splitlines() == [
        "round 1/3 up 1.0 kB down 2.0 kB 0:00:01",
        "round 2/3 ppl 148.4 up 2.0 kB down 4.0 kB 0:00:01",
        "round 3/3 ppl 148.4 up 3.0 kB down 6.0 kB 0:00:01",
    ]


def test_live_bar_fits_a_terminal_of_80_columns() -> None:
    """Long numbers shrink the bar; nothing is cut off."""
    console, text = make_console(force_terminal=True)
    with Display(num_rounds=1000, console=console) as display:
        display.update(
            make_record(
                1000,
                cumulative_uplink_bytes=999_900_000,
                cumulative_downlink_bytes=999_900_000,
            )
        )
    shown = Text.from_ansi(text.getvalue()).plain
    for part in (
        "1000/1000",
        "acc 0.999 frozen 90% up 999.9 MB down 999.9 MB",
        "ETA",
        "00:00",
    ):
        assert part in shown
    assert "…" not in shown


def test_log_lines_stand_above_the_live_bar() -> None:
    """What goes through the display's console does not tear the bar."""
    console, text = make_console(force_terminal=True)
    with Display(num_rounds=2, console=console) as display:
        display.update(make_record(1))
        display.console.print("a client failed")
    before, after = text.getvalue().rsplit("a client failed", maxsplit=1)
    assert before.endswith("\r\x1b[2K")  # the old bar is erased
    assert after.startswith("\n")
    assert "acc 0.500" in after


# Closing table


SUMMARY = {
    **RUN,
    "rounds": 200,
    "parameters": 61706,
    "metric": "accuracy",
    "final_accuracy": 0.98123,
    "best_accuracy": 0.98346,
    "final_perplexity": None,
    "best_perplexity": None,
    "total_uplink_bytes": 26_344_246,
    "total_downlink_bytes": 912_400,
    "dense_bytes": 534_400_000,
    "traffic_ratio": 0.051,
    "seconds": 3725.2,
    "modelled_seconds": None,
    "uplink_bits_per_parameter": 2.134,
    "downlink_bits_per_parameter": None,
}


def rows_of(summary: dict) -> dict[str, str]:
    """Print a closing table on 80 columns and read its rows."""
    console, text = make_console()
    console.print(closing_table(summary))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split("│")[1:3] for line in lines if "│" in line]
    return {name.strip(): value.strip() for name, value in cells}


def test_closing_table() -> None:
    """In units that a reader can compare at a glance."""
    assert rows_of(SUMMARY) == {
        "method": "gwpf",
        "dataset": "digits",
        "model": "mlp",
        "final accuracy": "0.9812",
        "best accuracy": "0.9835",
        "sent by clients": "26.3 MB",
        "sent to clients": "912.4 kB",
        "ratio to dense": "0.051 (19.6x fewer bytes)",
        "bits a parameter": "2.13 up, - down, a client and round",
        "time": "1:02:05",
    }


def test_closing_table_of_a_language_model() -> None:
    """Perplexities stand in place of the accuracies, and fit however large."""
    language = {**SUMMARY, "metric": "perplexity", "model": "transformer"}
    rows = rows_of(
        {**language, "final_perplexity": 148.4131, "best_perplexity": 90.0171}
    )
    assert rows["final perplexity"] == "148.4"
    assert rows["best perplexity"] == "90.0"
    assert not [name for name in rows if "accuracy" in name]
    rows = rows_of(language)
    assert rows["final perplexity"] == rows["best perplexity"] == "-"
    rows_of({**language, "final_perplexity": 1e304, "best_perplexity": 1e304})


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(None, "-"), (0.0, "0.000"), (1.001, "1.001"), (0.5, "0.500 (2.0x fewer bytes)")],
)
def test_closing_table_ratio(ratio: float | None, shown: str) -> None:
    """A saving is spelled out only where there is one."""
    assert rows_of({**SUMMARY, "traffic_ratio": ratio})["ratio to dense"] == shown


def test_closing_table_without_evaluation_and_with_odd_names() -> None:
    """Brackets are no markup, and a long name is folded rather than cut."""
    rows = rows_of(
        {
            **SUMMARY,
            "dataset": "[bold]images",
            "model": "m" * 100,
            "final_accuracy": None,
            "best_accuracy": None,
        }
    )
    assert rows["dataset"] == "[bold]images"
    assert rows["final accuracy"] == rows["best accuracy"] == "-"
    assert rows["model"] + rows[""] == "m" * 100
