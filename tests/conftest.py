"""What all tests share: no network, one thread, and the folder of real data."""

import os

# Read when the libraries are first imported, hence before them.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# Flower's simulation would join a cluster that another test has started meanwhile.
os.environ["RAY_ADDRESS"] = "local"
# In a container Ray may count fewer processors than `os.cpu_count`, as tests do.
os.environ["RAY_USE_MULTIPROCESSING_CPU_COUNT"] = "1"

# pylint: disable=wrong-import-position
import logging  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from command_line import end_what_still_runs  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    """End the runs that a test which failed has left."""
    yield
    end_what_still_runs()


# Of the session, so that it is found before a test changes the environment.
@pytest.fixture(scope="session")
def data_root() -> Path:
    """Return the folder of real datasets, or skip the test where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("GWPF_DATA", beside))
    if not root.is_dir():
        pytest.skip(f"no real data: GWPF_DATA is unset and {root} does not exist")
    return root


@pytest.fixture(name="warnings")
def _warnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Return a function that returns what the strategy has warned of."""
    # The command line, which other tests may have run, keeps the log to itself.
    monkeypatch.setattr(logging.getLogger("gwpf_baseline"), "propagate", True)
    caplog.set_level(logging.WARNING, "gwpf_baseline")
    return lambda: "\n".join(caplog.messages)
