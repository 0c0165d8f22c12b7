"""Tests of signSGD: against a slow reference, with clients that go away."""

from typing import Any

import numpy as np
import pytest
from federation import payload_of, scripted, small, with_payload
from flwr.common import FitRes
from numpy.testing import assert_allclose
from ternary_rounds import LENGTH, TROUBLE, play_in_trouble, walk

from gwpf_baseline.exchange.payload import Part, Writer
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods import load_method
from gwpf_baseline.utils import ConfigError

STEP = 0.25


def test_a_federation_does_what_the_paper_does() -> None:
    """Most decide, the even ones stay; with clients away, and answers lost."""
    federation = scripted("signsgd", walk, {"step": STEP})
    model = np.ones(LENGTH)
    for number, answers in enumerate(TROUBLE, start=1):
        play_in_trouble(federation, answers)
        voters = [client for client, arrives in answers.items() if arrives]
        for i in range(LENGTH):
            votes = sum(1 if walk(c, number).sum(0)[i] > 0 else -1 for c in voters)
            if votes:
                model[i] += STEP if votes > 0 else -STEP
        assert_allclose(federation.strategy.weights, model, atol=1e-6)
        assert federation.strategy.records[-1].clients == len(voters)


def test_a_parameter_takes_a_bit_each_way() -> None:
    """Up always; down, where an odd number of clients decides on everything."""
    training = TrainingConfig(local_steps=2, batch_size=8)
    federation = small([30, 40, 50], training, "signsgd")
    federation.play(4)
    last = federation.strategy.records[-1]
    before = federation.strategy.records[-2]
    up = last.cumulative_uplink_bytes - before.cumulative_uplink_bytes
    down = last.cumulative_downlink_bytes - before.cumulative_downlink_bytes
    bits = 3 * federation.strategy.dimension
    buffers = last.uplink_buffer_bytes
    assert 8 * (up - buffers) < 1.05 * bits + 3 * 8 * 30
    assert 8 * (down - buffers) < 1.05 * bits + 3 * 8 * 40
    assert last.sent_fraction == 1


def test_whatever_a_client_says_is_one_vote() -> None:
    """A client that is against everything moves nothing that the others agree on."""

    def agreed(client: int, exchange: int) -> np.ndarray:
        del client, exchange
        return np.ones((1, LENGTH), np.float32)

    federation = scripted("signsgd", agreed, {"step": STEP}, 3)

    def against(answer: FitRes) -> FitRes:
        writer = Writer(payload_of(answer.parameters, federation).header)
        writer.bitmap(np.zeros(LENGTH, np.bool_), part=Part.VALUES)
        return with_payload(answer, writer.payload())

    federation.nodes[0].tamper = against
    record = federation.play()
    assert record.clients == 3
    assert_allclose(federation.strategy.weights, 1 + STEP)


@pytest.mark.parametrize("step", [0, -1, float("nan"), float("inf"), True, "x", None])
def test_a_value_that_cannot_be_used_is_named(step: Any) -> None:
    """One line says which."""
    options = {"name": "signsgd", "module": "signsgd", "step": step}
    with pytest.raises(ConfigError, match="method.step="):
        load_method(options)


def test_what_means_nothing_is_refused() -> None:
    """There are no values to round."""
    with pytest.raises(ConfigError, match="quantization.bits=8: must be 32 for sign"):
        small([9, 9], TrainingConfig(), "signsgd", quantization=Quantization(8))
