"""Every benchmark runs to its end, as small as it can be made."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gwpf_baseline.learning.flat_model import Layer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import drift  # noqa: E402

# What each script is given, and what it prints above its table.
SMALL = ["--clients=2", "--steps=1", "--rounds=2", "--warm-up=1"]
SIMULATED = [*SMALL, "--repeats=1"]
SCRIPTS = {
    "outlier.py": (["--rounds=1", "--methods", "gwpf"], "One of ten clients attacks"),
    "payload_size.py": ([], "One upload"),
    "released.py": ([], "Skipped: clone Dora233/GWPF"),
    "start_time.py": (["--repeats=1", "--states", "warm"], "A start and an end"),
    "study.py": (["mnist", "--dry-run"], "python -m gwpf_baseline.main dataset=mnist"),
    "sync_step.py": (
        ["--dimension=1000", "--clients=2", "--repeats=1"],
        "One synchronisation",
    ),
}
# Those that train need MNIST or CIFAR-10.
ON_DATA = {
    "drift.py": (["--rounds=2"], "Between two clients, after the last round"),
    "gpu.py": (
        ["--model=lenet5", *SMALL, "--parallel=1"],
        "A round of lenet5 on",
    ),
    "many_clients.py": (
        ["--lenet5=12", "--resnet18=0", "--repeats=1"],
        "Memory of a simulated client",
    ),
    "overhead.py": (
        ["--models", "lenet5", "--clients=1", "--rounds=1"],
        "A round of lenet5: ",
    ),
    "round_time.py": (SIMULATED, "One round, LeNet-5 on MNIST"),
    "template_client.py": (SIMULATED, "LeNet-5 on MNIST"),
}


def output_of(script: str, options: list[str]) -> str:
    """Run a script, which must succeed."""
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        cwd=BENCHMARKS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Generous: the workers of a simulation are the last to get a busy processor.
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    # Of what there was nothing, as after so few rounds, it says nan.
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert script in UNMEASURED or any("nan" not in row for row in rows), result.stdout
    for row in rows:
        _, *cells = row.strip("│").split("│")
        assert any(re.search(r"\d", cell) for cell in cells), row
    return result.stdout


# Those that print no table of what they measured.
UNMEASURED = {"study.py", "released.py"}
# Makes network namespaces.
AS_ROOT = {
    "slow_network.py": (
        ["--rounds=2", "--model=lenet5", "--methods", "gwpf"],
        "lenet5 over 3.0 and 9.0 Mbps",
    ),
}


def test_no_script_is_forgotten() -> None:
    """A new one needs an entry above."""
    scripts = {script.name for script in BENCHMARKS.glob("[!_]*.py")}
    assert scripts == SCRIPTS.keys() | ON_DATA.keys() | AS_ROOT.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script(script: str) -> None:
    """It ends well and has measured something."""
    options, title = SCRIPTS[script]
    assert title in output_of(script, options)


@pytest.mark.parametrize("script", AS_ROOT)
def test_a_script_that_makes_networks(script: str, data_root: Path) -> None:
    """Where that is allowed."""
    made = ["ip", "netns", "add", "gwpf-test"]
    if shutil.which("ip") is None or subprocess.run(made, check=False).returncode:
        pytest.skip("this machine makes no network namespaces: no root, or no iproute2")
    subprocess.run(["ip", "netns", "del", "gwpf-test"], check=True)
    options, title = AS_ROOT[script]
    assert title in output_of(script, [*options, "--data", str(data_root)])


@pytest.mark.parametrize("script", ON_DATA)
def test_a_script_that_trains(script: str, data_root: Path) -> None:
    """The same, on real data."""
    options, title = ON_DATA[script]
    assert title in output_of(script, [*options, "--data", str(data_root)])


def test_two_values_that_drift_are_drawn_on_both_clients() -> None:
    """Of those alone that leave in the second quarter, each with when it leaves."""
    models = np.random.default_rng(0).normal(size=(2, 8, 6))
    left = np.array([8, 2, 1, 3, 4, 8])
    layers = [Layer(slice(0, 2), (2,)), Layer(slice(2, 6), (4,))]
    panels = drift.draw(models, left, layers, seed=0).axes
    for place, title, axes in zip((1, 3), (1, 2), panels, strict=True):
        assert axes.get_title() == f"a value of tensor {title} of 2"
        *clients, leaves = axes.lines
        assert [line.get_label() for line in clients] == ["client 1", "client 2"]
        for line, values in zip(clients, models[:, :, place], strict=True):
            assert np.array_equal(np.asarray(line.get_ydata()), values)
        assert np.all(np.asarray(leaves.get_xdata()) == left[place] + 0.5)


def test_where_too_few_values_drift_none_is_drawn() -> None:
    """It says so."""
    with pytest.raises(SystemExit, match="fewer than 2 parameters leave by round 4"):
        drift.draw(np.zeros((2, 8, 1)), np.array([2]), [Layer(slice(0, 1), (1,))], 0)
