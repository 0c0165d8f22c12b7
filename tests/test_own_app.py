"""The app that docs/deployment.md shows, word for word, on Flower's simulation."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# What the page says is the reader's own.
OWN = """
import numpy as np
import torch
from gwpf_baseline.config import checked, compose_config, workbench

data = workbench(checked(compose_config([]))).data
partitions = np.array_split(np.arange(len(data.train_targets)), 2)


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
"""
PLAYED = """
if __name__ == "__main__":
    from flwr.simulation import run_simulation

    here = {"address": "local", "log_to_driver": False}
    run_simulation(server_app, client_app, 2, backend_config={"init_args": here})
"""


def test_the_app_of_the_page_runs(tmp_path: Path) -> None:
    """All its rounds, without a failure; clients keep their state on disk."""
    page = (REPOSITORY / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = page.partition("\n## In your own Flower app\n")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "app.py").write_text(OWN + code + PLAYED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=tmp_path,
        env={**os.environ, "GWPF_OUTPUTS": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RoundRecord(round=20, ")
    assert "clients=2, failures=0" in done.stdout
    assert len(list(tmp_path.glob("outputs/*/state/client-*.safetensors"))) == 2
