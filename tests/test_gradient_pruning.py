"""Tests of gradient pruning, against slow and obvious references."""

import math
from typing import Any

import numpy as np
import pytest
from federation import lose, scripted, small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose

from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.gradient_pruning import GradientPruningConfig
from gwpf_baseline.methods.shared.pruning import (
    above_threshold,
    largest,
    largest_share,
    share,
)
from gwpf_baseline.utils import ConfigError

LAYERS = [Layer(slice(0, 12), (3, 4)), Layer(slice(12, 15), (3,))]
LAYERS += [Layer(slice(15, 20), (5, 1))]
VALUES = hnp.arrays(
    np.float32, 20, elements=st.sampled_from([0.0, -0.0, 0.25, -0.5, 1.0, -8.0])
)


def by_sorting(values: np.ndarray, count: int) -> list[int]:
    """Return where the largest magnitudes are, of equal ones the first, but no 0."""
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    return sorted(order[values[order] != 0].tolist())


@given(VALUES, st.integers(0, 20))
def test_the_largest_are_chosen_and_of_equals_the_first(
    values: np.ndarray, count: int
) -> None:
    """By a stable sort."""
    assert largest(values, count).tolist() == by_sorting(values, count)


@pytest.mark.parametrize("count", [1, 40, 4_000, 150_000, 200_000])
@pytest.mark.parametrize("kind", ["normal", "votes", "large in sample", "small in it"])
def test_the_largest_of_many_do_not_depend_on_the_sample(kind: str, count: int) -> None:
    """Also if each seventh value, which are looked at first, is unlike the rest."""
    rng = np.random.default_rng(count)
    values = rng.standard_normal(200_000).astype(np.float32)
    if kind == "votes":
        values = np.float32(0.1) * values.round()
    if "in" in kind:
        values[::7] *= np.float32(1e3 if "large" in kind else 0)
    assert largest(values, count).tolist() == by_sorting(values, count)


@given(VALUES, st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_a_threshold_is_relative_to_the_layers_largest(
    values: np.ndarray, threshold: float
) -> None:
    """By the definition; nothing of 0 is ever sent."""
    expected = []
    for span, _ in LAYERS:
        part = values[span].tolist()
        top = max(abs(v) for v in part)
        expected += [v != 0 and abs(v) >= threshold * top for v in part]
    assert above_threshold(values, LAYERS, threshold).tolist() == expected


@given(VALUES, st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_a_share_is_kept_of_each_layer(values: np.ndarray, keep: float) -> None:
    """The largest of each, rounded up, but nothing of 0."""
    mask = largest_share(values, LAYERS, keep)
    for span, _ in LAYERS:
        part, sent = np.abs(values[span]), mask[span]
        count = math.ceil(keep * part.size)
        assert np.count_nonzero(sent) == min(count, np.count_nonzero(part))
        if sent.any() and not sent.all():
            assert part[sent].min() >= part[~sent].max()


def test_shares_are_not_misled_by_floats() -> None:
    """0.28 * 25 is 7.000000000000001."""
    assert share(0.28, 25) == 7 and share(0.29, 25) == 8 and share(0.0, 25) == 0


def test_nothing_that_is_learned_gets_lost() -> None:
    """Each update is in the model or pending, also when answers are lost."""
    learned, moved = np.zeros(24), np.zeros(24)

    def script(client: int, exchange: int) -> np.ndarray:
        nonlocal learned
        rng = np.random.default_rng([client, exchange])
        steps = (10.0 ** -rng.integers(0, 4, 24) * rng.normal(size=24))[None]
        learned = learned + steps[0]
        return steps.astype(np.float32)

    federation = scripted("gradient_pruning", script, {"threshold": 0.3})
    server, rng = federation.strategy, np.random.default_rng(0)
    for _ in range(40):
        for node in federation.nodes:
            node.tamper = lose if rng.random() < 0.3 else None
        before = server.weights.double().numpy()
        record = federation.play()
        moved += (server.weights.double().numpy() - before) * record.clients
        pending = np.zeros(24)
        for i, node in enumerate(federation.nodes):
            residual = node.state.arrays["residual"].copy()
            if server.clients[i].used == node.state.uploaded:
                residual[node.uploaded()] = 0
            pending += residual
        assert_allclose(moved + pending, learned, atol=1e-4)


def test_the_share_that_is_kept_is_of_each_layer() -> None:
    """The rest is pending."""

    def script(client: int, exchange: int) -> np.ndarray:
        return np.linspace(-1, 1, 24, dtype=np.float32)[None] * 0.1

    federation = scripted("gradient_pruning", script, {"keep": 0.25}, num_clients=1)
    for _ in range(3):
        record = federation.play()
        # One layer of 23 weights and one bias: 6 and 1 of them.
        assert record.sent_fraction == 7 / 24
        assert record.csr_bytes is None  # which only ZeroFL's paper counts
    node = federation.nodes[0]
    assert np.any(node.state.arrays["residual"] != 0)
    assert np.count_nonzero(node.uploaded()) == 7


TRAINING = TrainingConfig(local_steps=2, batch_size=8, lr=0.2)


def test_pruning_quantisation_and_an_optimiser_compose() -> None:
    """Of real training: fewer bytes with each piece, and it learns."""
    sizes = []
    for options, bits in (
        ({"threshold": 0.0}, 32),
        ({"threshold": 0.3}, 32),
        ({"keep": 0.1}, 32),
        ({"keep": 0.1}, 8),
    ):
        federation = small(
            [40, 60, 50],
            TRAINING,
            "gradient_pruning",
            options,
            quantization=Quantization(bits),
            server_optimizer=ServerOptimizerConfig("fedadam", lr=0.03, beta1=0.9),
        )
        first, last = federation.play(), federation.play(25)
        assert last.failures == 0
        assert first.train_loss is not None and last.train_loss is not None
        assert last.train_loss < 0.9 * first.train_loss
        sizes.append(last.cumulative_uplink_bytes)
    # Of so few values, eight bits save less than their own header.
    assert sizes[0] > sizes[1] > sizes[2] and sizes[3] < 0.4 * sizes[0]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, None, True, "1"])
def test_a_wrong_threshold_is_named(value: Any) -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match="method.threshold="):
        GradientPruningConfig(value)


@pytest.mark.parametrize("value", [0, 1.1, math.nan, True, "1"])
def test_a_wrong_share_is_named(value: Any) -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match="method.keep="):
        GradientPruningConfig(keep=value)
