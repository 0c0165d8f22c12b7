"""The command line: what it says where nothing, or Ray, cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=null", "method=null: must be one of apf, "),
        ("~seed", "seed=nothing: must be given"),
        ("connect_timeout=nan", "connect_timeout=nan: must be a number >= 0"),
        ("lr=" + "[" * 2000, "overrides="),
        ("hydra.run.dir=file/run", "output folder="),
        ("dataset.test_fraction=0.99999", "dataset.test_fraction=0.99999: must be"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_code_2(
    tmp_path: Path, override: str, message: str
) -> None:
    """Whoever finds it: Hydra, the check, or who loads the data; Ray never starts."""
    (tmp_path / "file").touch()
    process = subprocess.run(
        [sys.executable, "-m", "gwpf_baseline.main", override],
        cwd=tmp_path,
        env={**os.environ, "RAY_TMPDIR": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    assert process.stdout == ""
    [line] = process.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert line.isprintable()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file/folder", "Not a directory"), ("long" * 25, "path length cannot exceed")],
)
def test_a_ray_that_cannot_start_is_one_line_and_code_1(
    tmp_path: Path, folder: str, reason: str
) -> None:
    """The process ends, by itself and soon: it asks no other Ray to stand in."""
    (tmp_path / "file").touch()
    somewhere = {"RAY_TMPDIR": str(tmp_path / folder), "RAY_ADDRESS": "127.0.0.1:1"}
    process = subprocess.run(
        [
            sys.executable,
            *("-m", "gwpf_baseline.main"),
            *("num_rounds=1", f"hydra.run.dir={tmp_path / 'run'}"),
        ],
        cwd=REPOSITORY,
        env={**os.environ, **somewhere},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 1
    assert process.stdout == ""
    [line] = process.stderr.splitlines()
    assert line.startswith("error: Ray could not start: ")
    assert reason in line and "RAY_TMPDIR" in line
