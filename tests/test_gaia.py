"""Tests of Gaia, against slow and obvious references."""

import math
from typing import Any

import numpy as np
import pytest
from federation import lose, scripted, small, with_tensors
from flwr.common import FitRes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose

from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.gaia import GaiaConfig, significant
from gwpf_baseline.utils import ConfigError

VALUES = hnp.arrays(
    np.float32, 20, elements=st.sampled_from([0.0, -0.0, 0.25, -0.5, 1.0, -8.0])
)


@given(VALUES, VALUES, st.sampled_from([0.25, 0.5, 2.0]), st.sampled_from([1, 4, 16]))
def test_significant_is_a_large_relative_change(
    update: np.ndarray, weights: np.ndarray, threshold: float, server_round: int
) -> None:
    """By the definition; any change of a zero is, no change never."""
    expected = []
    for u, w in zip(update.tolist(), weights.tolist(), strict=True):
        change = abs(u / w) if w else (math.inf if u else 0.0)
        expected.append(change > threshold / server_round**0.5)
    assert significant(update, weights, threshold, server_round).tolist() == expected


def _lively(client: int, exchange: int) -> np.ndarray:
    rng = np.random.default_rng([client, exchange])
    size = 10.0 ** -rng.integers(0, 4, 24)
    return (size * rng.normal(size=24)).astype(np.float32)[None]


def _refused(answer: FitRes) -> FitRes:
    return with_tensors(answer, [t[:-1] for t in answer.parameters.tensors])


def test_nothing_that_is_learned_gets_lost() -> None:
    """Each update is in the model or pending, whatever happens to messages."""
    learned, sent = np.zeros(24), np.zeros(24)

    def script(client: int, exchange: int) -> np.ndarray:
        nonlocal learned
        steps = _lively(client, exchange)
        learned = learned + steps.sum(0)
        return steps

    federation = scripted("gaia", script, {"threshold": 0.5}, fraction_fit=0.75)
    server, rng = federation.strategy, np.random.default_rng(0)
    shares = []
    for _ in range(60):
        for node in federation.nodes:
            luck = rng.choice(["good", "good", "deaf", "lost", "refused"])
            node.reachable = luck != "deaf"
            node.tamper = {"lost": lose, "refused": _refused}.get(luck)
        before = server.weights.double().numpy()
        record = federation.play()
        sent += (server.weights.double().numpy() - before) * record.clients
        shares.append(record.sent_fraction or 0.0)
        pending = np.zeros(24)
        for i, node in enumerate(federation.nodes):
            state = node.state
            residual = state.arrays.get("residual", np.zeros(24)).copy()
            if state.uploaded and server.clients[i].used == state.uploaded:
                residual[node.uploaded()] = 0
            pending += residual
        assert_allclose(sent + pending, learned, atol=1e-4)
    assert 0 < np.mean(shares) < 0.9


def test_clients_train_on_their_own_copy() -> None:
    """What is not sent is in the client's model, and is added to."""

    def script(client: int, exchange: int) -> np.ndarray:
        return np.full((1, 24), 0.004, np.float32)

    # The model is all ones: 0.4 % a round is significant when it has become 1 %.
    federation = scripted("gaia", script, {"threshold": 0.01}, num_clients=1)
    fractions = [federation.play().sent_fraction for _ in range(6)]
    # 0.4 % < 1 %, 0.8 % > 1 % / sqrt(2), then 0.4 % < 0.58 %, 0.8 % > 0.5 %, ...
    assert fractions == [0, 1, 0, 1, 0, 1]
    for done, start in enumerate(federation.nodes[0].starts):
        assert_allclose(start, 1 + done * 0.004, rtol=1e-6)
    assert_allclose(federation.strategy.weights, 1 + 6 * 0.004, rtol=1e-6)


def test_bytes_follow_what_is_sent() -> None:
    """Of real training: fewer bytes than dense, both ways, and it learns."""
    training = TrainingConfig(local_steps=2, batch_size=8, lr=0.2)
    federation = small([40, 60, 50], training, "gaia", {"threshold": 0.3})
    first = federation.play()
    last = federation.play(30)
    assert last.sent_fraction is not None and 0 < last.sent_fraction < 1
    assert last.cumulative_uplink_bytes < 0.5 * last.dense_bytes
    assert last.train_loss is not None and first.train_loss is not None
    assert last.train_loss < first.train_loss and last.failures == 0


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None, True, "1"])
def test_a_wrong_threshold_is_named(value: Any) -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match="method.threshold="):
        GaiaConfig(value)
