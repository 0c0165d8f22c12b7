"""Tests of values in fewer bits, against slow and obvious references."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from federation import KEPT, lose, scripted, small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.exchange.quantization import (
    Quantization,
    dequantize,
    quantize,
    read_levels,
    write_levels,
)
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.utils import ConfigError

TRAINING = TrainingConfig(local_steps=2, batch_size=8, lr=0.2)
HEADER = Header("test", Kind.UPDATE, exchange=1, base=0, length=20)
FLOATS = st.floats(-(2.0**40), 2.0**40, width=32)
VALUES = hnp.arrays(np.float32, 20, elements=FLOATS)
COUNTS = st.sampled_from([[20], [0, 7, 13], [1, 0, 0, 19], [5, 5, 5, 5]])


@given(VALUES, COUNTS, st.sampled_from([2, 3, 4, 8, 16]))
def test_a_value_becomes_the_nearest_level(
    values: np.ndarray, counts: list[int], bits: int
) -> None:
    """In each tensor by the tensor's own step; the largest value and zeros exactly."""
    levels, steps = quantize(values, counts, bits)
    back = dequantize(levels, steps, counts)
    limit, nonempty = 2 ** (bits - 1) - 1, [c for c in counts if c]
    assert len(steps) == len(nonempty)
    # Float32 rounds the quotient and the product, of up to 2 ** (bits - 1) steps.
    half = 0.5 + 2.0 ** (bits - 24)
    start = 0
    for step, count in zip(steps.tolist(), nonempty, strict=True):
        part, decoded = values[start : start + count], back[start : start + count]
        top = float(np.abs(part).max())
        assert math.isclose(step * limit, top, rel_tol=1e-5, abs_tol=1e-30)
        assert np.all(np.abs(decoded - part) <= step * half + 1e-37)
        assert np.all(decoded[part == 0] == 0)
        largest = np.abs(part) == top
        assert_allclose(decoded[largest], part[largest], rtol=1e-5, atol=1e-37)
        start += count


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding_at_random_is_right_on_average(bits: int) -> None:
    """Up or down, to one of the two levels next to a value; its mean is the value."""
    draws, counts = 4_000, [3, 4]
    values = np.array([1.0, 0.3, 0.0, -2.0, 0.5, -0.01, 1.9], np.float32)
    tops = np.repeat([1.0, 2.0], counts)
    step = tops / (2 ** (bits - 1) - 1)
    rng, total = np.random.default_rng(0), np.zeros(7)
    for _ in range(draws):
        back = dequantize(*quantize(values, counts, bits, rng), counts)
        assert np.all(np.abs(back - values) < step * (1 + 1e-5))
        assert_allclose(back[[0, 2, 3]], values[[0, 2, 3]], rtol=1e-6)
        total += back
    # Six standard deviations of the mean, of which none is more than half a step.
    assert_allclose(total / draws, values, atol=float(3 * step.max() / draws**0.5))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_levels_take_their_entropy(bits: int) -> None:
    """That of the magnitudes, and a bit for each sign."""
    rng, count = np.random.default_rng(bits), 50_000
    limit = 2 ** (bits - 1) - 1
    values = np.clip(rng.laplace(scale=0.12, size=count), -1, 1).astype(np.float32)
    values[0] = 1
    levels, _ = quantize(values, [count], bits)
    shares = np.bincount(np.abs(levels), minlength=limit + 1) / count
    bits_each = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()
    bits_each += 1 - shares[0]
    size = len(_sent(Quantization(bits), values, [count]))
    assert size <= bits_each * count / 8 * 1.01 + 100


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_level_of_more_bits_is_refused(bits: int) -> None:
    """Before it is used."""
    writer = Writer(HEADER)
    levels = np.zeros(20, np.int8)
    levels[7] = -(2 ** (bits - 1))
    write_levels(writer, levels)
    with pytest.raises(WireError, match=f"a level of more than {bits} bits"):
        read_levels(Reader(writer.payload(), "test", 20), 20, bits)


@pytest.mark.parametrize("bits", [2, 4])
@given(data=st.data())
def test_damaged_levels_are_refused_or_are_levels(
    bits: int, data: st.DataObject
) -> None:
    """Nothing else is raised, and nothing beyond the bits is returned."""
    values = np.linspace(-1, 1, 20, dtype=np.float32)
    payload = bytearray(_sent(Quantization(bits), values, [20]))
    place = data.draw(st.integers(0, len(payload) - 1))
    payload[place] ^= data.draw(st.integers(1, 255))
    try:
        back = Quantization(bits).read_update(Reader(bytes(payload), "test", 20), [20])
    except WireError:
        return
    assert back.shape == (20,) and len(np.unique(np.abs(back))) <= 2 ** (bits - 1)


def _sent(
    quantization: Quantization, values: np.ndarray, counts: Sequence[int]
) -> bytes:
    writer = Writer(HEADER)
    quantization.write_update(writer, values, counts)
    return writer.payload()


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "random"])
@given(VALUES, COUNTS)
def test_what_is_written_can_be_read(
    bits: int, fp16: bool, rounding: str, values: np.ndarray, counts: list[int]
) -> None:
    """Each value is close to what was sent, nothing is left over, and the sender knows
    to the bit what arrives."""
    quantization = Quantization(bits, fp16, "nearest" if bits == 32 else rounding)
    reader = Reader(_sent(quantization, values, counts), "test", 20)
    back = quantization.read_update(reader, counts)
    reader.finish()
    assert back.dtype == np.float32
    if bits == 32 and fp16:
        expected = np.clip(values, -65504, 65504).astype(np.float16)
        assert_array_equal(back, expected.astype(np.float32))
    elif bits == 32:
        assert_array_equal(back, values)
    writer = Writer(HEADER)
    received = quantization.write_update(writer, values, counts)
    assert received.dtype == np.float32
    assert_array_equal(received.view(np.uint32), back.view(np.uint32))


def test_another_precision_is_refused() -> None:
    """By whoever expects other bits, and before a number is used."""
    values, counts = np.ones(20, np.float32), [20]
    kinds = [Quantization(8), Quantization(16), Quantization(), Quantization(fp16=True)]
    kinds.append(Quantization(2))
    for sender in kinds:
        for receiver in kinds:
            reader = Reader(_sent(sender, values, counts), "test", 20)
            if sender == receiver:
                receiver.read_update(reader, counts)
                continue
            with pytest.raises(
                WireError, match="expected|too many|missing|a bitmap of"
            ):
                receiver.read_update(reader, counts)
                reader.finish()


@pytest.mark.parametrize("step", [math.inf, -math.nan, 3e38, -3e38])
def test_a_hostile_step_is_refused(step: float) -> None:
    """Its product with a level would not be finite."""
    writer = Writer(HEADER)
    writer.vector(np.array([step], np.float32))
    writer.vector(np.full(20, 127, np.int8))
    with pytest.raises(WireError, match="step|NaN"):
        Quantization(8).read_update(Reader(writer.payload(), "test", 20), [20])


METHODS = ["fedavg", "gwpf_paper", "apf", "gaia", "cmfl", "gradient_pruning", "zerofl"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_sends_values_sends_fewer_bits(method: str) -> None:
    """It learns as before; values cost a quarter, and half with half precision."""
    firsts: list[RoundRecord] = []
    downlinks: list[int] = []
    losses = []
    options = KEPT if method == "gwpf_paper" else {}
    for bits, fp16 in ((32, False), (8, False), (32, True)):
        federation = small(
            [40, 60, 50],
            TRAINING,
            method,
            options,
            quantization=Quantization(bits, fp16),
        )
        first = federation.play()
        last = federation.play(11)
        assert last.failures == 0 and federation.strategy.records[1].failures == 0
        firsts.append(first)
        downlinks.append(last.cumulative_downlink_bytes)
        assert first.train_loss is not None and last.train_loss is not None
        losses.append(last.train_loss)
        assert last.train_loss < first.train_loss
    assert_allclose(losses, losses[0], rtol=0.1)
    exact, rounded, half = (record.uplink_value_bytes for record in firsts)
    # Beside the values there are their types and numbers, and a step for each tensor.
    assert rounded <= exact / 4 + 3 * (3 + 2 + 6 * 4)
    assert half <= exact / 2 + 3 * 3
    assert len({record.uplink_position_bytes for record in firsts}) == 1
    saved = [firsts[0].uplink_bytes - record.uplink_bytes for record in firsts]
    assert saved[1] >= exact - rounded - 9 and saved[2] >= exact - half - 9
    assert downlinks[1] <= downlinks[0] * 1.05 and downlinks[2] < downlinks[0]


# ---- error feedback -----------------------------------------------------------------

ROUNDINGS = [Quantization(8), Quantization(16), Quantization(fp16=True)]


def _steps(client: int, exchange: int) -> np.ndarray:
    """Return steps of which one is large, so that the others are mostly rounded
    away."""
    steps = np.full((1, 24), 1e-3 * (1 + client), np.float32)
    steps[:, 0] = 1.0
    return steps


@pytest.mark.parametrize("quantization", ROUNDINGS, ids=["8", "16", "half"])
@pytest.mark.parametrize(
    "method", ["fedavg", "cmfl", "gwpf_paper", "apf", "gradient_pruning", "zerofl"]
)
def test_what_rounding_leaves_out_is_sent_later(
    method: str, quantization: Quantization
) -> None:
    """After any number of rounds the sum of what arrived is the sum of what was
    learned, but for what one rounding can leave out."""
    # Neither freezes what changes by the same amount each time.
    everything: dict[str, dict[str, Any]] = {
        "cmfl": {"threshold": 0.0},
        "gradient_pruning": {"keep": 1.0},
        "gwpf_paper": KEPT,
        "zerofl": {"sparsity": 0.0, "mask_ratio": 0.0, "upload": "diff_on_top_k"},
    }
    options = everything.get(method, {})
    federation = scripted(method, _steps, options, 2, quantization=quantization)
    rounds = 60
    federation.play(rounds)
    assert all(record.failures == 0 for record in federation.strategy.records)
    learned = np.mean([rounds * _steps(client, 1)[0] for client in (0, 1)], axis=0)
    if quantization.fp16:
        most = 2.0**-11 * 1.1
    else:
        most = 1.1 / (2 ** (quantization.bits - 1) - 1)
    # The large coordinate is the step's own measure.
    arrived = federation.strategy.weights.numpy() - 1.0
    assert_allclose(arrived[1:], learned[1:], rtol=0, atol=most + 1e-5)
    assert_allclose(arrived[0], learned[0], rtol=1e-3)


@pytest.mark.parametrize("quantization", ROUNDINGS, ids=["8", "16", "half"])
@pytest.mark.parametrize("method", ["fedavg", "gwpf_paper"])
def test_the_residual_is_what_the_server_did_not_get(
    method: str, quantization: Quantization
) -> None:
    """Once an upload was used, what stays of it is its rounding, to the bit."""
    options = KEPT if method == "gwpf_paper" else {}
    federation = scripted(method, _steps, options, 1, quantization=quantization)
    strategy, node = federation.strategy, federation.nodes[0]
    federation.play()
    due = _steps(0, 1)[0] + np.float32(0)
    arrived = strategy.weights.numpy() - np.float32(1)
    left_out = node.state.arrays["left_out"].copy()
    assert np.count_nonzero(left_out) > 0
    assert_allclose(arrived + left_out, due, rtol=0, atol=1e-6)
    seen: list[np.ndarray] = []
    build = node.build

    def watched(store: Any) -> Any:
        client = build(store)
        settle = client.settle

        def settled(state: Any) -> None:
            settle(state)
            seen.append(state.arrays["residual"].copy())

        client.settle = settled  # type: ignore[method-assign]
        return client

    node.build = watched
    federation.play()
    (residual,) = seen
    assert_array_equal(residual, left_out)


@pytest.mark.parametrize("method", ["fedavg", "gradient_pruning"])
def test_nothing_is_kept_of_what_is_rounded_at_random(method: str) -> None:
    """It is right on average already; draws differ by client and round."""

    def halves(client: int, exchange: int) -> np.ndarray:
        del client, exchange
        return np.array([[1.0] + [0.5] * 23], np.float32)

    quantization = Quantization(2, rounding="random")
    options = {"keep": 1.0} if method == "gradient_pruning" else {}
    federation = scripted(method, halves, options, 2, quantization=quantization)
    moved = []
    for _ in range(30):
        before = federation.strategy.weights.clone()
        federation.play()
        moved.append((federation.strategy.weights - before).numpy())
        for node in federation.nodes:
            assert "left_out" not in node.state.arrays
    assert_allclose(np.array(moved)[:, 0], 1.0)
    # The rest of the first tensor, which has the large one, and the other tensor.
    assert {0.0, 0.5, 1.0} == set(np.unique(moved))
    assert_allclose(np.mean(moved, axis=0)[1:], 0.5, atol=0.4)
    twin = scripted(method, halves, options, 2, quantization=quantization)
    twin.play()
    assert_array_equal(twin.strategy.weights.numpy() - 1, moved[0])


def test_both_exchanges_of_a_round_draw_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As does every client."""
    seeds: list[int] = []
    write_update = Quantization.write_update

    def noting(self: Quantization, *args: Any) -> np.ndarray:
        seeds.append(args[-1])
        return write_update(self, *args)

    monkeypatch.setattr(Quantization, "write_update", noting)
    quantization = Quantization(8, rounding="random")
    clients, rounds = 2, 20
    federation = small([40, 60], TRAINING, "gwpf_paper", quantization=quantization)
    federation.play(rounds)
    assert len(seeds) > 1.5 * clients * rounds
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("method", ["fedavg", "gwpf_paper"])
def test_the_rounding_of_a_lost_upload_is_forgotten(method: str) -> None:
    """The server has got nothing of it, so nothing of it is missing."""
    options = KEPT if method == "gwpf_paper" else {}
    quantization = Quantization(8)
    federation = scripted(method, _steps, options, 2, quantization=quantization)
    node = federation.nodes[1]
    federation.play()
    node.tamper = lose
    federation.play()
    before = node.state.arrays["residual"].copy()
    node.tamper = None
    federation.play()
    after = node.state.arrays["residual"]
    if method == "gwpf_paper":
        # What it learned stays until it is used, and comes to what it learns next.
        assert_allclose(after, before + _steps(1, 1)[0], rtol=0, atol=1e-6)
    else:
        # FedAvg keeps only what was left out before, and nothing has been since.
        assert_array_equal(after, before)


@pytest.mark.parametrize("bits", [0, 1, 5, 64, 8.5, 8.0, None, True, "8"])
def test_wrong_bits_are_named(bits: Any) -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match="quantization.bits="):
        Quantization(bits)


@pytest.mark.parametrize("rounding", ["down", None, True])
def test_a_wrong_rounding_is_named(rounding: Any) -> None:
    """One line says which, also if there is nothing to round."""
    with pytest.raises(ConfigError, match="quantization.rounding=.* one of nearest"):
        Quantization(8, rounding=rounding)
    with pytest.raises(ConfigError, match="nearest where quantization.bits=32"):
        Quantization(rounding="random")


def test_wrong_fp16_is_named() -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match="quantization.fp16=1: must be true or"):
        Quantization(fp16=1)  # type: ignore[arg-type]
