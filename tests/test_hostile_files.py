"""Checkpoints that are none, or somebody else's: refused in one line."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import KEPT, Federation, Node, small
from flwr.common import Scalar
from safetensors.torch import save_file

from gwpf_baseline.exchange.coding import MOST, WireError
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.state import InMemory
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.records.checkpoint import (
    CheckpointFolder,
    StateError,
    load_state,
    save_state,
)
from gwpf_baseline.utils import ConfigError

BRIEF = TrainingConfig(local_steps=1, batch_size=10)
METHODS: dict[str, dict[str, Any]] = {
    "gwpf": {},
    "gwpf_paper": {"ema": 0.5, **KEPT},
    "apf": {"check_every": 1},
    "stc": {"down": 0.1},
    "fedpm": {},
    "gaia": {},
}
State = dict[str, Any]


def played(method: str) -> Federation:
    """Return a federation that has played some rounds."""
    options: dict[str, Any] = {}
    if method == "gwpf_paper":
        options["server_optimizer"] = ServerOptimizerConfig("fedadam", beta1=0.9)
    federation = small([30, 40], BRIEF, method, METHODS[method], **options)
    federation.play(3)
    return federation


def spoilt(state: State, file: Path, **changes: Any) -> State:
    """Return a state, changed, as it is read from a file."""
    save_state(file, {**state, **changes})
    return load_state(file)


@pytest.mark.parametrize("method", METHODS)
def test_a_states_own_form_is_accepted(method: str, tmp_path: Path) -> None:
    """By a server that has not begun."""
    state = spoilt(played(method).strategy.state(), tmp_path / "state")
    fresh = played(method)
    fresh.strategy.load_state(state)
    assert fresh.strategy.exchange == fresh.strategy.round == 3


TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "one value": lambda t: t.flatten()[:1].clone(),
    "a value less": lambda t: t[:-1].clone(),
    "a value more": lambda t: torch.cat([t, t[:1]]),
    "integers of 64 bits": lambda t: t.to(torch.int64),
    "half of the bits": lambda t: t.to(torch.float16),
    "NaN": lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else None,
    "infinity": lambda t: (
        torch.full_like(t, torch.inf) if t.is_floating_point() else None
    ),
    "a number": lambda _: 1,
    "no key": lambda _: ...,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", TENSORS)
def test_every_tensor_of_a_servers_state_is_checked(
    method: str, change: str, tmp_path: Path
) -> None:
    """Its type, its shape, and that it is finite."""
    federation = played(method)
    state = federation.strategy.state()
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v) and v.numel() > 1}
    assert len(tensors) > 2
    for key, value in tensors.items():
        # Bytes may be more or fewer; what they say is checked where they are read.
        if value.dtype == torch.uint8:
            continue
        damage = TENSORS[change](value)
        if damage is None:
            continue
        changed = {k: v for k, v in state.items() if k != key}
        if damage is not ...:
            changed[key] = damage
        save_state(tmp_path / "state", changed)
        with pytest.raises(StateError):
            federation.strategy.load_state(load_state(tmp_path / "state"))


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange": -1},
        {"exchange": "3"},
        {"exchange": True},
        {"exchange": 2.0},
        {"exchange": 1},
        {"exchange": MOST + 1},
        {"clients": []},
        {"clients": {"7": {"version": 0, "used": 0}}},
        {"clients": {"x": {"version": 0, "used": 0}}},
        {"clients": {"0": {"version": -2, "used": 0}}},
        {"clients": {"0": {"version": 4, "used": 0}}},
        {"clients": {"0": {"version": "0", "used": 0}}},
        {"clients": {"0": {"version": 0, "used": -1}}},
        {"clients": {"0": {"version": 0}, "1": {"used": 0}}},
        {"clients": {"0": 5}},
        {"records": [[1]]},
        {"records": [5]},
        {"records": {}},
        {"standings": {"0": [1]}},
        {"standings": {"0": [1, 2, 3]}},
        {"standings": {"0": [1.5, 0]}},
        {"standings": {"0": ["1", 0]}},
        {"standings": {"0": [math.inf, 0]}},
        {"standings": {"0": 5}},
        {"standings": {"0": ["x", None]}},
        {"standings": {"7": [0, 0]}},
        {"norms": []},
        {"norms": [[1.0], ["x"]]},
        {"norms": [[1.0], [float("nan")]]},
        {"something": 1},
        {"format": "6"},
        {"format": None},
    ],
)
def test_every_value_of_a_servers_state_is_checked(
    changes: State, tmp_path: Path
) -> None:
    """Numbers in range, and of clients that there are."""
    federation = played("gaia")
    state = spoilt(federation.strategy.state(), tmp_path / "state", **changes)
    with pytest.raises(StateError):
        federation.strategy.load_state(state)


def test_a_checkpoint_of_another_release_is_refused(tmp_path: Path) -> None:
    """It may hold messages that clients of this one would read as something else."""
    federation = played("gwpf")
    before = federation.strategy.state()
    for other in (
        {key: value for key, value in before.items() if key != "format"},
        spoilt(before, tmp_path / "state", format=before["format"] - 1),
    ):
        with pytest.raises(StateError, match="of another release"):
            federation.strategy.load_state(other)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("stc", "method.step_sizes", [{"value": 10**9}]),
        ("stc", "method.step_sizes", [{"nothing": 1}]),
        ("stc", "method.step_sizes", [5]),
        ("stc", "method.step_sizes", [{"value": -1}]),
        ("fedpm", "method.masks", -1),
        ("fedpm", "method.masks", 2.5),
        ("fedpm", "method.masks", 0),
        ("fedpm", "method.masks", 10**6),
        ("apf", "method.in_step", ["x"]),
        ("apf", "method.in_step", 5),
    ],
)
def test_a_methods_own_values_are_checked(
    method: str, key: str, value: Any, tmp_path: Path
) -> None:
    """By the method, or by their type."""
    federation = played(method)
    state = spoilt(federation.strategy.state(), tmp_path / "state", **{key: value})
    with pytest.raises(StateError):
        federation.strategy.load_state(state)


def test_deep_json_is_no_state(tmp_path: Path) -> None:
    """Nor are values that are no object, or metadata that is missing."""
    file = tmp_path / "state"
    for metadata in (
        {"values": "[" * 10**5},
        {"values": '{"a":' * 10**5},
        {"values": "[]"},
        {"values": "7"},
        {"values": "null"},
        {"values": "{"},
        {"other": "{}"},
        None,
    ):
        save_file({"weights": torch.zeros(2)}, file, metadata=metadata)
        with pytest.raises(ConfigError, match="a readable checkpoint") as caught:
            load_state(file)
        assert str(caught.value).isprintable()


# ---- clients ------------------------------------------------------------------------


# A checkpoint's name.
THIRD = "round-000003-00000000"


def start_again(node: Node, folder: CheckpointFolder) -> None:
    """Let a node lose all that it held in memory, but not its disk."""
    build = node.build

    def found(store: InMemory) -> SyncClient:
        client = build(store)
        client.found = [folder]
        return client

    node.build = found
    node.forget()


@pytest.mark.parametrize(
    "changes",
    [
        {"client": 1},
        {"client": None},
        {"cursor": -5},
        {"cursor": "5"},
        {"version": -1},
        {"uploaded": 1.5},
        {"more": 1},
        {"residual": torch.zeros(394)},
        {"residual": torch.zeros(1)},
        {"residual": torch.full((395,), torch.nan)},
        {"weights": torch.zeros(1)},
        {"weights": torch.zeros(396)},
        {"residual": torch.zeros(395, dtype=torch.int64)},
        {"residual": torch.zeros(395, dtype=torch.complex64)},
        {"weights": torch.zeros(395, dtype=torch.bfloat16)},
        {"weights": torch.zeros(395, dtype=torch.float64)},
        {"sent": torch.zeros(3, dtype=torch.uint8)},
        {"sent": torch.zeros(50)},
        {"activity": torch.zeros(9)},
        {"moment.exp_avg": torch.zeros(10**6)},
        {"moment.exp_avg": torch.zeros(5)},
        {"other": torch.full((3,), torch.inf)},
    ],
)
def test_a_client_takes_no_state_but_its_own(changes: State, tmp_path: Path) -> None:
    """In one line, that names the file."""
    federation = played("gaia")
    folder = CheckpointFolder(tmp_path)
    state = federation.nodes[0].state.to_save(0)
    file = folder.client_file(THIRD, 0)
    save_state(file, state)
    start_again(federation.nodes[0], folder)
    client = federation.nodes[0].build(federation.nodes[0].store)
    assert client.load_state(THIRD).cursor == state["cursor"]
    np.testing.assert_array_equal(
        client.load_state(THIRD).arrays["residual"], state["residual"]
    )
    for other in ("", "round-000002-00000000", "round-000003-00000001"):
        assert client.load_state(other).cursor == 0
    save_state(file, {**state, **changes})
    with pytest.raises(ConfigError, match="client-0.safetensors: must be the client"):
        client.load_state(THIRD)


def test_a_folder_that_is_another_users_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the server's can be on a node that has its own part elsewhere."""

    def forbidden(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    assert CheckpointFolder(tmp_path).client_state(THIRD, 0) is None


def test_old_files_of_a_client_are_removed(tmp_path: Path) -> None:
    """But for the checkpoint that counts, which may not be the newest."""
    federation = played("gaia")
    node = federation.nodes[0]
    folder = CheckpointFolder(tmp_path)
    client = node.build(node.store)
    client.saved = folder
    first, second, third, fourth = (f"round-{n:06d}-00000000" for n in (2, 4, 6, 8))
    steps = ((first, ""), (second, first), (third, first), (fourth, third))
    for checkpoint, committed in steps:
        client.get_properties({"checkpoint": checkpoint, "committed": committed})
    kept = sorted(path.parent.name for path in tmp_path.glob("*/*/client-0.*"))
    assert kept == [third, fourth]
    assert len(list(folder.path.iterdir())) == 2


@pytest.mark.parametrize("key", ["checkpoint", "committed"])
@pytest.mark.parametrize(
    "name", ["../../round-000003-00000000", "round-3", 3, b"", 0.5]
)
def test_a_name_that_is_no_checkpoints_leads_to_no_file(
    key: str, name: Scalar, tmp_path: Path
) -> None:
    """Whatever the server says: a name becomes part of a path."""
    node = played("gaia").nodes[0]
    client = node.build(node.store)
    client.saved = CheckpointFolder(tmp_path / "run")
    with pytest.raises(WireError, match=f"{key} .*: the name of a checkpoint"):
        client.get_properties({"checkpoint": THIRD, key: name})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["gwpf", "gwpf_paper", "gaia", "stc", "apf"])
def test_a_node_that_starts_again_loses_nothing(method: str, tmp_path: Path) -> None:
    """If it has its part of the last checkpoint: the same models to the bit."""
    federation, twin = played(method), played(method)
    node, folder = federation.nodes[0], CheckpointFolder(tmp_path)
    save_state(folder.client_file(THIRD, 0), node.state.to_save(0))
    start_again(node, folder)
    federation.strategy.committed = THIRD
    for _ in range(3):
        assert federation.play().failures == twin.play().failures == 0
        assert torch.equal(federation.strategy.weights, twin.strategy.weights)


@pytest.mark.parametrize(
    ("method", "missing"),
    [("stc", "weights"), ("gwpf", "weights"), ("gwpf", "activity")]
    + [("apf", "schedule.period"), ("apf", "schedule.checks")],
)
def test_a_node_whose_state_lacks_something_says_so(
    method: str, missing: str, tmp_path: Path
) -> None:
    """It is lost for a round, and then holds the model that the server has."""
    federation = played(method)
    node, folder = federation.nodes[0], CheckpointFolder(tmp_path)
    state = node.state.to_save(0)
    del state[missing]
    save_state(folder.client_file(THIRD, 0), state)
    start_again(node, folder)
    federation.strategy.committed = THIRD
    assert federation.play().failures == 1
    for _ in range(3):
        assert federation.play().failures == 0
    np.testing.assert_array_equal(
        node.state.arrays["weights"], federation.nodes[1].state.arrays["weights"]
    )


def test_what_was_used_after_a_checkpoint_is_not_sent_again(tmp_path: Path) -> None:
    """A node that starts again with an older state drops what that has due."""
    federation = played("gaia")
    node, folder = federation.nodes[0], CheckpointFolder(tmp_path)
    save_state(folder.client_file(THIRD, 0), node.state.to_save(0))
    assert node.state.arrays["residual"].any()
    assert federation.play().failures == 0
    start_again(node, folder)
    federation.strategy.committed = THIRD
    # It has lost round 4, says so, and goes on in the next one.
    assert federation.play().failures == 1
    assert node.state.cursor > 0 and "residual" not in node.state.arrays
    assert federation.play().failures == 0
