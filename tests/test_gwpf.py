"""Tests of GWPF: against a slow reference, with clients that go away."""

from typing import Any

import numpy as np
import pytest
import torch
from federation import digits, payload_of, scripted, small
from numpy.testing import assert_allclose, assert_array_equal
from ternary_rounds import (
    LENGTH,
    TROUBLE,
    Reference,
    given_by_clients,
    play_in_trouble,
    walk,
)

from gwpf_baseline.callbacks import Evaluation
from gwpf_baseline.exchange.header import Kind
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.training import TrainingConfig, evaluate
from gwpf_baseline.methods import load_method
from gwpf_baseline.utils import ConfigError

# A scripted client takes the five iterations of the default configuration.
STEPS = TrainingConfig().local_steps
OPTIONS = {"vote_fraction": 0.1, "thaw_budget": 0.2, "half_life": 2.0 * STEPS}


@pytest.mark.parametrize(("step", "averaging"), [(3.0, 0.1), (1.5, 0.0), (1.5, 1.0)])
def test_every_round_is_what_the_page_says(step: float, averaging: float) -> None:
    """With clients away, answers lost, and a round in which all of them are."""
    options = {**OPTIONS, "step": step, "averaging": averaging}
    federation = scripted("gwpf", walk, options)
    fading = 0.5 ** (STEPS / OPTIONS["half_life"])
    shares = OPTIONS["vote_fraction"], OPTIONS["thaw_budget"]
    reference, average = Reference(4, *shares, step, fading), np.ones(LENGTH)
    for number, answers in enumerate(TROUBLE, start=1):
        play_in_trouble(federation, answers)
        reference.play(number, answers)
        strategy = federation.strategy
        assert_allclose(strategy.weights, reference.model, atol=1e-5)
        assert_allclose(strategy.residual, reference.due, atol=1e-5)
        if any(answers.values()):
            newest = 1 / (1 + averaging * (number - 1))
            average = (1 - newest) * average + newest * reference.model
        assert_allclose(strategy.measured_weights(), average, atol=1e-5)
        record = strategy.records[-1]
        assert record.clients == sum(answers.values())
        assert record.failures == len(answers) - record.clients
        if record.clients:
            assert record.frozen_fraction == pytest.approx(1 - 5 / 24)
            assert record.sent_fraction == pytest.approx(3 / 24)


def test_what_is_not_forgotten_is_not_lost() -> None:
    """It has moved the model, or is accumulated on the server, or still held."""
    rounds = 6
    federation = scripted("gwpf", walk, {**OPTIONS, "half_life": 1e9})
    federation.play(rounds)
    strategy = federation.strategy
    used = (strategy.weights.numpy() - 1) / 3 + strategy.residual
    assert_allclose(given_by_clients(federation, rounds), used, atol=1e-5)
    assert np.abs(used).max() > 0.1


def test_clients_follow_to_the_bit_whatever_gets_lost() -> None:
    """The model, and where it has moved; steps that are known already are passed
    over."""
    federation = scripted("gwpf", walk, OPTIONS)
    for answers in TROUBLE:
        play_in_trouble(federation, answers)
    play_in_trouble(federation, dict.fromkeys(range(4), True))
    first, *others = (node.state.arrays for node in federation.nodes)
    assert first["activity"].sum() > 0
    for arrays in others:
        assert_array_equal(arrays["weights"], first["weights"])
        assert_array_equal(arrays["activity"], first["activity"])


def test_a_client_that_begins_late_is_told_where_the_model_has_moved() -> None:
    """With the whole model, where the steps since the first would be larger."""
    brief = TrainingConfig(local_steps=1, batch_size=4)
    federation = small(
        [30, 30], brief, "gwpf", {"vote_fraction": 0.1, "thaw_budget": 1.0}
    )
    manager = federation.server.client_manager()
    federation.play()
    away = federation.nodes[1]
    manager.unregister(away)
    federation.play(60)
    manager.register(away)
    for _ in range(3):
        assert federation.play().clients == 2
    kinds = [payload_of(m, federation).header.kind for m in away.received[-3:]]
    assert kinds == [Kind.MODEL, Kind.CHANGES, Kind.CHANGES]
    for name in ("weights", "activity"):
        held = [node.state.arrays[name] for node in federation.nodes]
        assert_array_equal(held[0], held[1])


@pytest.mark.parametrize("counts", [None, [1, 2, 3], [-1] * 113])
def test_a_client_that_lost_count_says_so(counts: list[int] | None) -> None:
    """And gets the whole model, with the counts."""
    federation = small([30, 40], TrainingConfig(local_steps=1, batch_size=4))
    federation.play(2)
    node = federation.nodes[0]
    assert node.state.arrays["activity"].shape == (113,)
    state = node.state
    del state.arrays["activity"]
    if counts is not None:
        state.arrays["activity"] = np.array(counts, np.int32)
    node.store.save(state)
    record = federation.play()
    assert (record.clients, record.failures) == (1, 1)
    assert federation.play().clients == 2
    assert payload_of(node.received[-1], federation).header.kind is Kind.MODEL
    assert_array_equal(
        node.state.arrays["activity"], federation.nodes[1].state.arrays["activity"]
    )


@pytest.mark.parametrize("counts", [[-1] * 113, [0] * 112])
def test_a_checkpoint_with_impossible_counts_is_refused(counts: list[int]) -> None:
    """It is damaged: nothing that follows could be read."""
    federation = small([30, 40], TrainingConfig(local_steps=1, batch_size=4))
    federation.play(2)
    state = federation.strategy.state()
    state["activity"] = torch.tensor(counts, dtype=torch.int32)
    with pytest.raises(ValueError, match="activity|counts"):
        small([30, 40], TrainingConfig()).strategy.load_state(state)


def test_only_what_is_thawed_moves() -> None:
    """In real training: the budget, all by one magnitude, nothing else by a bit."""
    training = TrainingConfig(local_steps=2, batch_size=10)
    federation = small([50, 60, 70], training)
    strategy = federation.strategy
    assert strategy.dimension == 395
    for _ in range(8):
        before = strategy.weights.clone()
        federation.play()
        moved = strategy.weights.view(torch.int32) != before.view(torch.int32)
        assert int(moved.sum()) == 16  # 4 % of 395, rounded up
        sizes = (strategy.weights - before)[moved].abs().numpy()
        assert_allclose(sizes, sizes[0], rtol=1e-4)


def test_no_coordinate_is_thawed_without_a_vote() -> None:
    """Not even to fill up the budget."""

    def script(client: int, exchange: int) -> np.ndarray:
        steps = np.zeros((1, LENGTH), np.float32)
        steps[0, [2, 3, 19]] = 1
        return steps

    federation = scripted("gwpf", script, {"vote_fraction": 0.5, "thaw_budget": 0.5})
    federation.play()
    moved = np.flatnonzero(federation.strategy.weights.numpy() != 1)
    assert moved.tolist() == [2, 3, 19]


def test_the_averaged_model_is_measured_and_goes_on_after_a_restart() -> None:
    """Its accuracy is the record's; a checkpoint has it to the bit."""
    training = TrainingConfig(local_steps=2, batch_size=10, lr=0.2)
    data = digits()
    built: list[torch.Tensor] = []

    def measure(number: int, weights: Any, buffers: Any) -> tuple[float, float]:
        model = FlatModel(federation.strategy.model)
        model.load(weights, buffers)
        built.append(weights.clone())
        return evaluate(model, data)

    federation = small([50, 60], training, callbacks=[Evaluation(measure)])
    federation.play(4)
    strategy = federation.strategy
    assert torch.equal(built[-1], strategy.average)
    assert not torch.equal(strategy.average, strategy.weights)
    again = small([50, 60], training)
    again.strategy.load_state(strategy.state())
    assert_array_equal(again.strategy.measured_weights(), strategy.average)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("vote_fraction", [0, -0.1, 1.1, float("nan"), True, "much", None]),
        ("thaw_budget", [0, -0.1, 1.1, float("nan"), True, "much", None]),
        ("step", [0, -1, float("nan"), float("inf"), True, "long", None]),
        ("half_life", [0, -1, float("nan"), float("inf"), True, "long", None]),
        ("averaging", [-0.1, 1.1, float("nan"), True, "much", None]),
    ],
)
def test_a_value_that_cannot_be_used_is_named(key: str, values: list[Any]) -> None:
    """With the key as it is written on the command line."""
    for value in values:
        with pytest.raises(ConfigError, match=f"method.{key}="):
            load_method({"module": "gwpf", key: value})
