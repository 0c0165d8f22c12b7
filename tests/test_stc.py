"""Tests of STC: against a slow reference of the paper, with clients that go away."""

from typing import Any

import numpy as np
import pytest
from federation import Federation, lose, payload_of, scripted, small, with_payload
from flwr.common import FitRes
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from ternary_rounds import (
    TROUBLE,
    Reference,
    given_by_clients,
    play_in_trouble,
    slow_ternary,
    walk,
)

from gwpf_baseline.exchange.header import Kind
from gwpf_baseline.exchange.payload import Reader, Sections, Writer, from_parameters
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods import load_method
from gwpf_baseline.methods.shared.ternary import (
    read_ternary,
    ternarise,
    write_ternary,
)
from gwpf_baseline.utils import ConfigError

SHARES = {"up": 0.1, "down": 0.2}


def dense(vector: np.ndarray, keep: float) -> np.ndarray:
    """Compress by the package, as a dense vector."""
    step = ternarise(vector, keep)
    result = np.zeros(vector.size)
    result[step.positions] = step.values()
    return result


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
)
def test_a_vector_is_compressed_as_algorithm_1_says(
    values: list[float], keep: float
) -> None:
    """Also with ties, zeros, and a single value."""
    vector = np.array(values, np.float32)
    assert_allclose(dense(vector, keep), slow_ternary(vector, keep), rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(0.01, 1))
def test_what_is_written_is_read(seed: int, size: int, keep: float) -> None:
    """To the bit, whatever follows it."""
    vector = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    federation = small([10, 10], TrainingConfig(local_steps=1, batch_size=4), "stc")
    step = ternarise(vector, keep)
    writer = Writer(_header(federation))
    write_ternary(writer, step, size)
    write_ternary(writer, ternarise(np.zeros(size, np.float32), keep), size)
    strategy = federation.strategy
    reader = Reader(writer.payload(), strategy.name, strategy.dimension)
    again, nothing = read_ternary(reader, size), read_ternary(reader, size)
    reader.finish()
    assert_array_equal(again.positions, step.positions)
    assert_array_equal(again.values(), step.values())
    assert not nothing.positions.size and not nothing.signs.size


def _header(federation: Federation) -> Any:
    federation.play()
    return payload_of(federation.nodes[0].sent[0], federation).header


def test_a_federation_does_what_the_paper_does() -> None:
    """With clients away, answers lost, and a round in which all of them are."""
    federation, reference = scripted("stc", walk, SHARES), Reference(4, **SHARES)
    for number, answers in enumerate(TROUBLE, start=1):
        play_in_trouble(federation, answers)
        reference.play(number, answers)
        strategy = federation.strategy
        assert_allclose(strategy.weights, reference.model, atol=1e-5)
        assert_allclose(strategy.residual, reference.due, atol=1e-5)
        record = strategy.records[-1]
        assert record.clients == sum(answers.values())
        assert record.failures == len(answers) - record.clients


def test_nothing_that_was_learned_is_lost() -> None:
    """What clients learned has moved the model, or is due, or is still with them."""
    federation, rounds = scripted("stc", walk, SHARES), 6
    federation.play(rounds)
    strategy = federation.strategy
    used = strategy.weights.numpy() - 1 + strategy.residual
    assert_allclose(given_by_clients(federation, rounds), used, atol=1e-5)
    assert np.abs(used).max() > 0.1


def test_a_client_that_was_away_takes_the_missed_steps_to_the_bit() -> None:
    """Each of them costs what it cost those that were there."""
    federation = small(
        [30, 30, 30],
        TrainingConfig(local_steps=2, batch_size=10),
        "stc",
        {"up": 0.02, "down": 0.02},
    )
    manager = federation.server.client_manager()
    federation.play()
    away = federation.nodes[2]
    manager.unregister(away)
    federation.play(3)
    manager.register(away)
    federation.play()
    reader = payload_of(away.received[-1], federation)
    assert reader.header.kind is Kind.CHANGES
    assert (reader.header.base, reader.header.exchange) == (0, 5)
    others = federation.nodes[0].received
    steps = sum(payload_size(message, federation) for message in others[1:])
    assert payload_size(away.received[-1], federation) == steps
    held = [node.state.arrays["weights"] for node in federation.nodes]
    for weights in held[1:]:
        assert_array_equal(weights, held[0])


def payload_size(message: Any, federation: Federation) -> int:
    """Return the bytes of a message's steps."""
    reader = payload_of(message, federation)
    for _ in range(reader.header.base, reader.header.exchange - 1):
        read_ternary(reader, federation.strategy.dimension)
    return reader.sizes.total()


def test_a_client_that_was_away_for_too_long_gets_the_model() -> None:
    """Where the missed steps would be larger than it, also by a lost state."""
    brief = TrainingConfig(local_steps=1, batch_size=4)
    federation = small([30, 30], brief, "stc", {"up": 0.1, "down": 1.0})
    manager = federation.server.client_manager()
    federation.play()
    away = federation.nodes[1]
    manager.unregister(away)
    federation.play(60)
    assert sum(s.size for s in federation.strategy.steps) < 4 * 400
    manager.register(away)
    federation.play()
    assert payload_of(away.received[-1], federation).header.kind is Kind.MODEL
    assert federation.strategy.records[-1].clients == 2
    away.forget()
    federation.play()  # it says that it has lost its state
    assert federation.play().clients == 2
    assert_array_equal(
        away.state.arrays["weights"], federation.nodes[0].state.arrays["weights"]
    )


def test_steps_that_had_arrived_before_are_not_taken_twice() -> None:
    """The server does not know of them, since the client's answer got lost."""
    federation = scripted("stc", walk, SHARES)
    federation.play(2)
    federation.nodes[1].tamper = lose
    federation.play()
    federation.nodes[1].tamper = None
    federation.play()
    header = payload_of(federation.nodes[1].received[-1], federation).header
    assert header.base == 1 and header.exchange == 4
    held = [node.state.arrays["weights"] for node in federation.nodes]
    for weights in held[1:]:
        assert_array_equal(weights, held[0])


def test_an_upload_of_lenet_is_short() -> None:
    """Below the 1,017 bytes of separate arrays by what their headers took."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(61_706).astype(np.float32)
    coded = Sections()
    write_ternary(coded, ternarise(vector, 0.01), vector.size)
    assert coded.size < 1017 - 200


@pytest.mark.parametrize("magnitude", [-1.0, float("nan"), float("inf")])
def test_a_hostile_magnitude_is_refused(magnitude: float) -> None:
    """It is that client's failure, and moves nothing."""
    federation = scripted("stc", walk, SHARES)

    def spoil(answer: FitRes) -> FitRes:
        payload = bytes(from_parameters(answer.parameters))
        return with_payload(answer, payload[:-4] + np.array(magnitude, "<f4").tobytes())

    federation.nodes[0].tamper = spoil
    record = federation.play()
    assert (record.clients, record.failures) == (3, 1)
    assert np.isfinite(federation.strategy.weights.numpy()).all()


@pytest.mark.parametrize("key", ["up", "down"])
@pytest.mark.parametrize("value", [0, -0.1, 1.1, float("nan"), True, "much", None])
def test_wrong_shares_are_named(key: str, value: Any) -> None:
    """With the key as it is written on the command line."""
    with pytest.raises(ConfigError, match=f"method.{key}="):
        load_method({"module": "stc", key: value})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"quantization": Quantization(bits=8)}, "quantization.bits=8"),
        ({"quantization": Quantization(fp16=True)}, "quantization.fp16=True"),
        ({"server_optimizer": ServerOptimizerConfig("fedadam")}, "server_optimizer="),
        ({"server_optimizer": ServerOptimizerConfig(lr=3)}, "server_optimizer.lr=3"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], key: str
) -> None:
    """By name, with what is allowed."""
    with pytest.raises(ConfigError, match=f"{key}.*: must be .* for stc, which"):
        scripted("stc", walk, SHARES, **options)
