"""The engine: real data through Ray, as a user starts it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import (
    REPOSITORY,
    SMALL,
    TIMES,
    model_bytes,
    own_ports,
    rounds_done,
    rows_without_seconds,
    run,
    start,
    until_round,
)
from federation import configured
from PIL import Image
from pyarrow.parquet import read_table, write_table
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gwpf_baseline.config import checked, compose_config, config_dir, workbench
from gwpf_baseline.learning.flat_model import (
    FlatModel,
    buffers_to_vector,
    parameters_to_vector,
)
from gwpf_baseline.learning.training import evaluate
from gwpf_baseline.methods import method_files
from gwpf_baseline.methods.shared.network_file import load_network
from gwpf_baseline.records.history import COLUMNS, RoundRecord, read_history

# Every method as it can be chosen, and so every one that is still to come.
VARIANTS = sorted(file.stem for file in config_dir().glob("method/*.yaml"))


def write_report(*runs: Path, target: float, output: Path) -> str:
    """Report on runs and return what was printed."""
    command = ["-m", "gwpf_baseline.report", *map(str, runs), "--target", str(target)]
    result = subprocess.run(
        [sys.executable, *command, "--output", str(output)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small experiment with two workers."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(*SMALL, f"hydra.run.dir={folder}")
    return folder


def test_default_run_beats_a_tenth_of_the_traffic(tmp_path: Path) -> None:
    """The first command of the README: GWPF on digits, with its table."""
    output = run(f"hydra.run.dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        list(summary)
        == (
            "method dataset model seed rounds parameters metric final_accuracy "
            "best_accuracy final_perplexity best_perplexity total_uplink_bytes "
            "total_downlink_bytes dense_bytes traffic_ratio seconds modelled_seconds "
            "uplink_bits_per_parameter downlink_bits_per_parameter total_csr_bytes "
            "final_mean_accuracy"
        ).split()
    )
    assert summary["method"] == "gwpf"
    assert summary["dataset"] == "digits"
    assert summary["rounds"] == 100
    assert summary["final_accuracy"] > 0.94
    assert summary["metric"] == "accuracy"
    assert summary["final_perplexity"] is summary["modelled_seconds"] is None
    assert 0 < summary["traffic_ratio"] < 0.1
    assert "ratio to dense" in output
    # Quiet: progress lines and the table, nothing of Flower's or Ray's own.
    assert "INFO" not in output
    assert "arning" not in output
    assert len(output.splitlines()) < 40


def test_files_of_a_run(small_run: Path) -> None:
    """Every file that the design names is there and agrees with the others."""
    records = read_history(small_run)
    assert tuple(rows_without_seconds(small_run)[0]) == tuple(
        name for name in COLUMNS if name not in TIMES
    )
    assert [record.round for record in records] == list(range(1, 13))
    assert [record.clients for record in records] == [3] * 12
    assert all(record.failures == 0 for record in records)
    assert all(record.modelled_seconds is None for record in records)
    for before, record in zip([None, *records], records, strict=False):
        assert record.compute_seconds is not None
        took = record.seconds - (before.seconds if before else 0)
        assert 0 < record.compute_seconds < took
    evaluated = [r.round for r in records if r.test_accuracy is not None]
    assert evaluated == [5, 10, 12]
    for name, total in (
        ("uplink_bytes", "cumulative_uplink_bytes"),
        ("downlink_bytes", "cumulative_downlink_bytes"),
    ):
        sums = np.cumsum([getattr(record, name) for record in records])
        assert sums.tolist() == [getattr(record, total) for record in records]
    for record in records:
        for way in ("uplink", "downlink"):
            parts = [
                getattr(record, f"{way}_{part}_bytes")
                for part in ("value", "position", "buffer", "overhead")
            ]
            assert sum(parts) == getattr(record, f"{way}_bytes")
            assert parts[2] == 0 < parts[3] <= 3 * 100  # LeNet-5 has no buffers
    # A vote is a sign, and where.
    assert 0 < records[-1].uplink_value_bytes < records[-1].uplink_position_bytes

    summary = json.loads((small_run / "summary.json").read_text())
    last = records[-1]
    total_bytes = last.cumulative_uplink_bytes + last.cumulative_downlink_bytes
    assert summary["traffic_ratio"] == total_bytes / last.dense_bytes
    assert summary["final_accuracy"] == last.test_accuracy

    # The saved model is the one that was measured.
    cfg = checked(compose_config(SMALL))
    bench = workbench(cfg)
    bench.model.load_state_dict(load_file(small_run / "model.safetensors"))
    model = FlatModel(bench.model)
    loss, accuracy = evaluate(model, bench.data)
    assert accuracy == last.test_accuracy
    assert loss == pytest.approx(last.test_loss, rel=1e-5)

    for name in ("accuracy.png", "traffic.png", "frozen.png"):
        with Image.open(small_run / name) as image:
            image.verify()
    events = EventAccumulator(str(small_run / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("train_loss")]
    assert values == pytest.approx([record.train_loss for record in records], rel=1e-6)
    assert "thaw_budget" in (small_run / "config.yaml").read_text()


@pytest.mark.parametrize(
    "workers", [f"client_resources.num_cpus={os.cpu_count() or 1}", "backend=local"]
)
def test_one_worker_gives_the_history_of_two(
    workers: str, small_run: Path, tmp_path: Path
) -> None:
    """Which process runs a client, and when, leaves no trace; nor does Ray."""
    run(*SMALL, workers, f"hydra.run.dir={tmp_path}")
    assert rows_without_seconds(tmp_path) == rows_without_seconds(small_run)
    assert model_bytes(tmp_path) == model_bytes(small_run)


def test_a_killed_run_goes_on_to_the_same_history(
    small_run: Path, tmp_path: Path
) -> None:
    """SIGKILL in the middle of a round, then resume: nothing shows."""
    killed, resumed = tmp_path / "killed", tmp_path / "resumed"
    process = start(*SMALL, "checkpoint_every=2", f"hydra.run.dir={killed}")
    try:
        until_round(process, killed, 3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert 3 <= rounds_done(killed) < 12

    output = run(f"resume={killed}", f"hydra.run.dir={resumed}")
    assert rows_without_seconds(resumed) == rows_without_seconds(small_run)
    assert model_bytes(resumed) == model_bytes(small_run), output

    # All rounds are done now: there is nothing left to resume.
    process = start(f"resume={resumed}", f"hydra.run.dir={tmp_path / 'again'}")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert output == "error: num_rounds=12: must be more than the 12 rounds done\n"


def test_apf_freezes_and_is_reported_beside_gwpf(
    small_run: Path, tmp_path: Path
) -> None:
    """Clients derive the mask themselves, time is modelled, and runs are compared."""
    folder, report = tmp_path / "apf", tmp_path / "report"
    overrides = [
        *(key for key in SMALL if not key.startswith("fraction_fit")),
        "method=apf",
        "method.check_every=1",
        "method.ema=0.8",
        "method.threshold=0.6",
        "network.uplink_mbps=3",
        "network.downlink_mbps=9",
    ]
    run(*overrides, f"hydra.run.dir={folder}")
    records = read_history(folder)
    assert [(record.clients, record.failures) for record in records] == [(5, 0)] * 12
    frozen = [record.frozen_fraction for record in records]
    assert frozen[0] is not None and frozen[-1] is not None
    assert frozen[0] < 0.1 < frozen[-1] < 1
    assert records[-1].uplink_bytes < 0.9 * records[0].uplink_bytes
    # The first round is the seed's model going up; no mask travels in any.
    assert records[0].downlink_bytes < 1000
    values = 4 * 61_706
    for before, record in zip(records, records[1:], strict=False):
        assert before.sent_fraction is not None
        assert record.downlink_bytes < 5 * (values * before.sent_fraction + 1000)
    modelled = [record.modelled_seconds or 0.0 for record in records]
    for past, now, record in zip([0.0, *modelled], modelled, records, strict=False):
        sent = record.downlink_bytes / 9e6 + record.uplink_bytes / 3e6
        assert now - past > 8 * sent / 5
        slowest, median = record.slowest_client_seconds, record.median_client_seconds
        assert slowest is not None and median is not None
        assert median <= slowest < now - past
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "apf"
    assert summary["modelled_seconds"] == modelled[-1]

    output = write_report(folder, small_run, target=0.1, output=report)
    assert {file.name for file in report.iterdir()} == {
        *("report.md", "report.csv", "metric_rounds.png", "metric_bytes.png"),
        *("metric_time.png", "frozen.png", "bandwidth.png", "to_target.png"),
        "split.png",
    }
    for name in report.glob("*.png"):
        with Image.open(name) as image:
            image.verify()
    with open(report / "report.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    text = (report / "report.md").read_text(encoding="utf-8")
    assert all(f"]({name.name})" in text for name in report.glob("*.png"))
    for label in ("apf", "gwpf"):
        assert label in text and label in output


def test_a_run_ends_where_it_is_told_to_and_can_be_reported(tmp_path: Path) -> None:
    """At the first evaluation that reaches ``stop_at``; no round after it is played."""
    folder, report = tmp_path / "run", tmp_path / "report"
    overrides = ["method=fedavg", "num_clients=3", "num_rounds=200", "eval_every=2"]
    overrides += ["local_steps=10", "lr=0.1", "stop_at=0.5", "partition=iid"]
    run(*overrides, f"hydra.run.dir={folder}")
    records = read_history(folder)
    *before, last = records
    assert [record.round for record in records] == list(range(1, len(records) + 1))
    assert 2 <= last.round < 100 and last.round % 2 == 0
    assert last.test_accuracy is not None and last.test_accuracy >= 0.5
    assert all((record.test_accuracy or 0) < 0.5 for record in before)
    assert all(record.clients == 3 for record in records)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == last.round
    assert summary["final_accuracy"] == last.test_accuracy
    output = write_report(folder, target=0.5, output=report)
    assert "fedavg" in output and str(last.round) in output
    with open(report / "report.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 1


def test_a_wrong_command_line_ends_in_one_line() -> None:
    """Exit code 2, before Ray starts."""
    process = start("method=nope")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    known = sorted(file.stem for file in config_dir().glob("method/*.yaml"))
    assert output == f"error: method=nope: must be one of {', '.join(known)}\n"


def test_sweep_over_methods(data_root: Path, tmp_path: Path) -> None:
    """``-m`` runs one experiment after the other; here every method, on MNIST."""
    methods = [variant for variant in VARIANTS if variant in method_files()]
    assert methods == method_files()
    mnist = ["dataset=mnist", f"dataset.path={data_root / 'mnist'}"]
    run(
        "-m",
        f"method={','.join(methods)}",
        *mnist,
        "num_rounds=3",
        "num_clients=3",
        "eval_every=3",
        "backend=local",
        f"hydra.sweep.dir={tmp_path}",
    )
    summaries, folders = {}, {}
    for folder in sorted(tmp_path.glob("[0-9]*")):
        summary = json.loads((folder / "summary.json").read_text())
        summaries[summary["method"]] = summary
        folders[summary["method"]] = folder
    assert sorted(summaries) == methods
    for method, summary in summaries.items():
        assert summary["rounds"] == 3, method
        records = read_history(folders[method])
        assert not any(record.failures for record in records), method
        assert all(np.isfinite(record.train_loss or np.nan) for record in records)
        # FedPM's network has no biases.
        without = 236 if method == "fedpm" else 0
        assert summary["parameters"] == 61706 - without
        # Only ZeroFL's paper counts in compressed sparse rows.
        assert (summary["total_csr_bytes"] is not None) == (method == "zerofl")
    bits = {m: s["uplink_bits_per_parameter"] for m, s in summaries.items()}
    assert bits["fedavg"] == pytest.approx(32, rel=2e-3)
    assert 0 < bits["gwpf"] < 1 and 0 < bits["fedpm"] < 1
    assert 0.9 < bits["signsgd"] < 1.01
    # A position and a sign for each hundredth.
    assert 0 < bits["stc"] < 0.15
    assert 1 < bits["zerofl"] < bits["gradient_pruning"] < 33
    ratios = {m: s["traffic_ratio"] for m, s in summaries.items()}
    assert ratios["fedavg"] == pytest.approx(1.0, rel=1e-3)
    assert ratios["gwpf"] < 0.1
    assert summaries["zerofl"]["total_csr_bytes"] > 0
    # FedPM's network can be rebuilt from a seed and a mask, and measures the same.
    file = folders["fedpm"] / "network.mask"
    assert 8 * file.stat().st_size < 61470
    network = FlatModel(load_network(file))
    cfg = checked(compose_config([*mnist, "method=fedpm"]))
    accuracy = evaluate(network, workbench(cfg).data)[1]
    assert accuracy == summaries["fedpm"]["final_accuracy"]
    assert 0 < summaries["fedpm"]["final_mean_accuracy"] < 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_every_method_plays(variant: str) -> None:
    """Real training with every file in ``conf/method``, here without processes."""
    overrides = [f"method={variant}", "num_clients=3", "local_steps=2", "seed=3"]
    federation = configured(checked(compose_config(overrides)))
    server = federation.strategy
    before = server.weights.clone()
    for number in range(1, 4):
        record = federation.play()
        assert (record.round, server.answers, record.failures) == (number, 3, 0)
        # Only CMFL's clients may answer that they have nothing worth sending.
        assert record.clients == 3 or variant == "cmfl"
        assert record.train_loss is not None and record.downlink_bytes > 0
        assert 0 < record.uplink_bytes < 1.01 * 3 * 4 * server.dimension
        assert record.sent_fraction is None or 0 <= record.sent_fraction <= 1
        for node in federation.nodes:
            assert node.state.version == server.exchange - 1
    assert server.weights.isfinite().all()
    assert not torch.equal(server.weights, before)


def test_cifar10_with_batch_norm(data_root: Path, tmp_path: Path) -> None:
    """ResNet-18 on CIFAR-10: augmented, and its buffers are exchanged and counted."""
    # A CPU needs minutes for the whole test set, so these are some of the real images.
    for split, size in (("train", 100), ("test", 50)):
        table = read_table(data_root / "cifar10" / f"{split}.parquet")
        write_table(table.slice(0, size), tmp_path / f"{split}.parquet")
    overrides = [
        "experiment=gwpf_c1",
        f"dataset.path={tmp_path}",
        f"dataset.cache_dir={tmp_path / 'cache'}",
        "client_resources.num_gpus=0",
        "num_clients=2",
        "num_rounds=2",
        "local_steps=1",
        "batch_size=4",
    ]
    folder = tmp_path / "run"
    run(*overrides, f"hydra.run.dir={folder}")
    records = read_history(folder)
    model = workbench(checked(compose_config(overrides))).model
    buffers = buffers_to_vector(model).numel()
    assert parameters_to_vector(model).numel() == 11_173_962
    assert [record.clients for record in records] == [2, 2]
    # Clients send votes and buffers; the server buffers, and then a step, too.
    assert 2 * 4 * buffers < records[0].uplink_bytes
    assert 2 * 4 * buffers < records[0].downlink_bytes < records[1].downlink_bytes
    saved = load_file(folder / "model.safetensors")
    assert int(saved["bn1.num_batches_tracked"]) == 2
    assert not torch.equal(saved["bn1.running_mean"], torch.zeros(64))


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Give Flower a home and ports of its own, and stop what it leaves running."""
    port = own_ports()
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "GWPF_OUTPUTS": str(tmp_path / "outputs"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(port + 2),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # The app's dependencies are those of this very environment.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    yield environment
    subprocess.run(["pkill", "-f", f"flower-superlink.*{port}"], check=False)
    shutil.rmtree(tmp_path / "flwr", ignore_errors=True)


def test_flwr_run_gives_the_same_history(
    small_run: Path, tmp_path: Path, flower_home: dict[str, str]
) -> None:
    """``flwr run .`` packs the app, unpacks it elsewhere, and runs it."""
    result = subprocess.run(
        [
            "flwr",
            "run",
            str(REPOSITORY),
            "--stream",
            "--run-config",
            " ".join(SMALL),
            "--federation-config",
            "num-supernodes=5 client-resources-num-cpus=1",
        ],
        env=flower_home,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    outputs = list((tmp_path / "outputs").glob("*"))
    assert len(outputs) == 1, result.stdout + result.stderr
    assert rows_without_seconds(outputs[0]) == rows_without_seconds(small_run)
    assert model_bytes(outputs[0]) == model_bytes(small_run)
    # What clients kept there from round to round is nobody's any more.
    assert not (outputs[0] / "state").exists()


def test_records_are_the_designs_columns() -> None:
    """Scripts rely on these names and their order."""
    assert COLUMNS == tuple(RoundRecord.__dataclass_fields__)
    assert ",".join(COLUMNS) == (
        "round,seconds,test_accuracy,test_loss,train_loss,uplink_bytes,downlink_bytes,"
        "cumulative_uplink_bytes,cumulative_downlink_bytes,dense_bytes,"
        "frozen_fraction,sent_fraction,clients,failures,compute_seconds,"
        "modelled_seconds,uplink_bits_per_parameter,downlink_bits_per_parameter,"
        "csr_bytes,mean_accuracy,uplink_value_bytes,uplink_position_bytes,"
        "uplink_buffer_bytes,uplink_overhead_bytes,downlink_value_bytes,"
        "downlink_position_bytes,downlink_buffer_bytes,downlink_overhead_bytes,"
        "slowest_client_seconds,median_client_seconds"
    )
