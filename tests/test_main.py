"""The command line: what it says where nothing, or Ray, cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def only_line(
    folder: Path, code: int, variables: dict[str, str], *overrides: str
) -> str:
    """Run a command line, which must fail by a code, and return all that it says."""
    process = subprocess.run(
        [sys.executable, "-m", "gwpf_baseline.main", *overrides],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == code
    assert process.stdout == ""
    [line] = process.stderr.splitlines()
    return line


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
    no_ray = {"RAY_TMPDIR": str(tmp_path / "file")}
    line = only_line(tmp_path, 2, no_ray, override)
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
    folder_of_run = f"hydra.run.dir={tmp_path / 'run'}"
    line = only_line(REPOSITORY, 1, somewhere, "num_rounds=1", folder_of_run)
    assert line.startswith("error: Ray could not start: ")
    assert reason in line and "RAY_TMPDIR" in line
