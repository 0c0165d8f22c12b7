"""The command line: what it says where Ray cannot start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


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
