"""Tests of CMFL, against slow and obvious references."""

from typing import Any

import numpy as np
import pytest
import torch
from federation import payload_of, scripted, size, small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from gwpf_baseline.exchange.header import Kind
from gwpf_baseline.exchange.payload import to_parameters
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.cmfl import CMFLConfig, relevance
from gwpf_baseline.utils import ConfigError

VALUES = hnp.arrays(
    np.float32, 20, elements=st.sampled_from([0.0, -0.0, 0.25, -0.5, 1.0])
)


@given(VALUES, VALUES)
def test_relevance_is_the_share_of_equal_signs(a: np.ndarray, b: np.ndarray) -> None:
    """By the definition."""
    expected = sum(np.sign(x) == np.sign(y) for x, y in zip(a, b, strict=True)) / 20
    assert relevance(a, b) == expected


def _script(client: int, exchange: int) -> np.ndarray:
    """Client 3 always goes against the others, client 2 in every third round."""
    step = np.ones((1, 24), np.float32)
    step[:, :3] = -1
    opposed = client == 3 or (client == 2 and exchange % 3 == 0)
    return -step if opposed else step


def test_only_relevant_updates_are_sent_and_others_are_dropped() -> None:
    """An irrelevant client costs a header, and its update never arrives."""
    federation = scripted("cmfl", _script, {"threshold": 0.8})
    expected = np.ones(24)
    direction = _script(0, 1)[0]
    for exchange in range(1, 8):
        record = federation.play()
        skips = [c for c in (2, 3) if _script(c, exchange)[0, 3] < 0 and exchange > 1]
        assert record.clients == 4 - len(skips) and record.failures == 0
        assert record.sent_fraction == (4 - len(skips)) / 4
        for client, node in enumerate(federation.nodes):
            header = payload_of(node.sent[-1], federation).header
            spoke = header.kind is Kind.UPDATE
            assert spoke == (client not in skips)
            # Our header, and nothing else where there is nothing to say.
            head = size(to_parameters(header.pack()))
            assert head < 30 and spoke == (size(node.sent[-1]) > head)
        # In the first round three go one way and one the other.
        expected += direction * (0.5 if exchange == 1 else 1.0)
        assert_allclose(federation.strategy.weights, expected, rtol=1e-6)


def test_a_round_in_which_all_skip_changes_nothing() -> None:
    """The model stays, clients stay in step, and the record says 0."""

    def script(client: int, exchange: int) -> np.ndarray:
        return np.full((1, 24), -1.0 if exchange in (2, 3) else 1.0, np.float32)

    federation = scripted("cmfl", script, num_clients=2)
    federation.play()
    model = federation.strategy.weights.clone()
    for _ in range(2):
        record = federation.play()
        assert (record.clients, record.failures, record.sent_fraction) == (0, 0, 0)
        assert torch.equal(federation.strategy.weights, model)
    record = federation.play()
    assert record.clients == 2
    assert torch.equal(federation.strategy.weights, model + 1)


def test_a_falling_threshold_lets_all_send_in_the_end() -> None:
    """0.8 / sqrt(64) is below the agreement of random signs."""
    training = TrainingConfig(local_steps=2, batch_size=8, lr=0.2)
    constant = small([40, 60, 50], training, "cmfl", {"threshold": 0.8})
    falling = small([40, 60, 50], training, "cmfl", {"threshold": 0.8, "decay": True})
    assert constant.play(20).cumulative_uplink_bytes < (
        falling.play(20).cumulative_uplink_bytes
    )
    assert falling.strategy.records[-1].sent_fraction == 1


@pytest.mark.parametrize(
    ("options", "speaks"),
    [
        ({"threshold": 0.5}, [1, 1, 1, 1]),
        ({"threshold": 0.51}, [1, 0, 0, 0]),
        # 0.8 / sqrt(2) is 0.57, and 0.8 / sqrt(3) is 0.46.
        ({"threshold": 0.8, "decay": True}, [1, 0, 1, 1]),
    ],
)
def test_half_of_the_signs_are_as_many_as_the_threshold_says(
    options: dict[str, Any], speaks: list[int]
) -> None:
    """Or more; it falls by the square root of the rounds, where it does."""

    def script(client: int, exchange: int) -> np.ndarray:
        step = np.ones((1, 24), np.float32)
        if client == 1:
            step[:, 12:] = -0.5
        return step

    federation = scripted("cmfl", script, options, num_clients=2)
    assert [federation.play().clients - 1 for _ in speaks] == speaks


def test_updates_are_compared_with_the_last_one_and_not_with_the_first() -> None:
    """A way that bends by four of 24 signs a round is relevant all along."""

    def script(client: int, exchange: int) -> np.ndarray:
        step = np.ones((1, 24), np.float32)
        step[:, : 4 * (exchange - 1)] = -1
        return step

    federation = scripted("cmfl", script, {"threshold": 0.8}, num_clients=1)
    assert [federation.play().clients for _ in range(7)] == [1] * 7


def test_sampled_clients_compare_with_all_that_they_missed() -> None:
    """A client that comes back sees the model's whole way since it was last asked."""
    federation = scripted("cmfl", _script, {"threshold": 0.8}, fraction_fit=0.5)
    asked = [federation.strategy.weights.numpy().copy()] * 4
    missed = 0
    for number in range(12):
        model = federation.strategy.weights.numpy().copy()
        counts = [len(node.received) for node in federation.nodes]
        record = federation.play()
        assert record.failures == 0
        for client, node in enumerate(federation.nodes):
            if len(node.received) == counts[client]:
                missed += number > 0
                continue
            moved = model - asked[client]
            if moved.any():
                assert_array_equal(node.state.arrays["last_global"], moved)
            asked[client] = model
    assert missed


@pytest.mark.parametrize(
    ("key", "values"),
    [("threshold", [-0.1, 1.1, None, True]), ("decay", [1, None, "no"])],
)
def test_a_wrong_hyper_parameter_is_named(key: str, values: list[Any]) -> None:
    """One line says which."""
    for value in values:
        with pytest.raises(ConfigError, match=f"method.{key}="):
            CMFLConfig(**{key: value})
