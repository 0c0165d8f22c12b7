"""Tests of FedPM, against slow and obvious references."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, configured, size, small
from flwr.common import FitRes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from gwpf_baseline.callbacks import Evaluation
from gwpf_baseline.config import compose_config, workbench
from gwpf_baseline.exchange.coding import WireError, encode_bitmap
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Writer,
    from_parameters,
    to_parameters,
)
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import (
    FlatModel,
    buffers_to_vector,
    parameters_to_vector,
)
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.training import TrainingConfig, evaluate
from gwpf_baseline.methods.fedpm import (
    FedPMConfig,
    FedPMStrategy,
    adapt,
    agreement,
    posterior_mode,
    sample_mask,
)
from gwpf_baseline.methods.shared.masked_network import (
    certain_scores,
    masked,
    score_table,
    to_levels,
)
from gwpf_baseline.methods.shared.network_file import (
    NETWORK_FILE,
    load_network,
    pack_description,
    unpack_description,
)
from gwpf_baseline.model import build_model
from gwpf_baseline.records.checkpoint import load_state, save_state
from gwpf_baseline.server_app import Evaluator
from gwpf_baseline.utils import ConfigError

BITS = (8, 16)
INF = math.inf


# ---- the masked network -------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 5, 7)),
        (nn.Conv2d(2, 3, (1, 2), padding=1, padding_mode="circular"), (3, 2, 5, 5)),
    ],
)
def test_masked_layers_do_what_the_paper_says(
    layer: Any, shape: tuple[int, ...]
) -> None:
    """A sample forward, the probability's gradient backward; the mean in evaluation."""
    plain: Any = copy.deepcopy(layer)
    mine: Any = masked(layer, 128, 8, 3)
    assert isinstance(mine, type(plain))
    inputs = torch.randn(shape)
    mine.weight.data.normal_()
    probability = mine.weight.detach().sigmoid()

    torch.manual_seed(5)
    mask = torch.bernoulli(probability)
    plain.bias = None
    plain.weight.data = mine.fixed * mask
    torch.manual_seed(5)
    output = mine(inputs)
    assert torch.equal(output, plain(inputs)) and 0 < mask.mean() < 1
    plain(inputs).square().sum().backward()
    output.square().sum().backward()
    expected = plain.weight.grad * mine.fixed * probability * (1 - probability)
    torch.testing.assert_close(mine.weight.grad, expected)

    mine.eval()
    plain.weight.data = mine.fixed * probability
    assert torch.equal(mine(inputs), plain(inputs))
    mine.weight.data = certain_scores(mask.bool().numpy())
    plain.weight.data = mine.fixed * mask
    for mode in (True, False):
        assert torch.equal(mine.train(mode)(inputs), plain(inputs))


def test_weights_are_signs_of_one_size() -> None:
    """The standard deviation of Kaiming's, and either sign half of the time."""
    model: Any = masked(
        nn.Sequential(nn.Conv2d(8, 64, 3), nn.Linear(200, 50)), 128, 8, 1
    )
    for layer, fan_in in zip(model, (8 * 9, 200), strict=True):
        signs = layer.fixed * math.sqrt(fan_in / 2)
        torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
        assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())
    again: Any = masked(
        nn.Sequential(nn.Conv2d(8, 64, 3), nn.Linear(200, 50)), 128, 8, 1
    )
    other: Any = masked(
        nn.Sequential(nn.Conv2d(8, 64, 3), nn.Linear(200, 50)), 128, 8, 2
    )
    for i in range(2):
        assert torch.equal(model[i].fixed, again[i].fixed)
        assert not torch.equal(model[i].fixed, other[i].fixed)


@pytest.mark.parametrize("name", ["conv4", "vgg11"])
def test_only_scores_are_left_to_train(name: str) -> None:
    """All are 0; biases, scales and shifts are gone, statistics are not."""
    model = build_model(name, (3, 32, 32), 10, width=4)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    statistics = sum(b.numel() for b in model.buffers())
    model = masked(model, 128, 8, 0)
    scores = parameters_to_vector(model)
    assert scores.numel() == matrices and not scores.any()
    state = model.state_dict()
    assert sum(v.numel() for v in state.values()) == matrices + statistics
    assert not any("fixed" in key for key in state)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape", "culprit"),
    [("kws_lstm", (1, 49, 20), "LSTM"), ("transformer", (35,), "Embedding")],
)
def test_other_layers_are_refused(
    name: str, shape: tuple[int, ...], culprit: str
) -> None:
    """One line says which, and what would do."""
    with pytest.raises(
        ConfigError, match=f"^model=one with {culprit}: must be made of"
    ):
        masked(build_model(name, shape, 10), 128, 8, 0)


# ---- probabilities, scores and masks ------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_levels_scores_and_probabilities_agree(bits: int) -> None:
    """A level's score has its probability; a half is 0; none is certain."""
    top = 2**bits
    levels = np.arange(1, top)
    table = score_table(bits)
    probabilities = torch.from_numpy(table[1:]).double().sigmoid().numpy()
    np.testing.assert_allclose(probabilities, levels / top, rtol=1e-6)
    assert table.dtype == np.float32 and table[top // 2] == 0 and table[0] == -INF
    assert (np.diff(table) > 0).all() and np.isfinite(table[1:]).all()
    assert_array_equal(to_levels(levels / top, bits), levels)
    assert to_levels(np.array([0.0, 1.0]), bits).tolist() == [1, top - 1]


@pytest.mark.parametrize("bits", BITS)
def test_both_sides_hold_the_same_scores(bits: int) -> None:
    """Every score that a server can have arrives as it was; no other can."""
    options = {"probability_bits": bits}
    federation = small([4], TrainingConfig(), "fedpm", options)
    node = federation.nodes[0]
    client, server = node.build(node.store), federation.strategy
    header = Header("fedpm", Kind.MODEL, 1, -1, server.dimension)
    writer = Writer(header)
    scores = score_table(bits)[1:]
    server.write_values(writer, scores)
    # Beside the levels, how they are coded and how many they are.
    assert 0 < writer.size - scores.size * bits // 8 <= 4
    reader = Reader(writer.payload(), "fedpm", server.dimension)
    assert_array_equal(client.read_values(reader, scores.size), scores)
    writer = Writer(header)
    writer.vector(np.array([3, 0, 4], f"u{bits // 8}"))
    with pytest.raises(WireError, match="a probability is 0"):
        client.read_values(Reader(writer.payload(), "fedpm", server.dimension), 3)


def test_masks_are_unbiased_and_follow_from_the_seed() -> None:
    """Of many bits, as many are set as should be; 0 and 1 are certain."""
    bits = 100_000
    for probability in (0.004, 0.1, 0.5, 0.9):
        mask = sample_mask(np.full(bits, probability, np.float32), 1)
        deviation = math.sqrt(probability * (1 - probability) / bits)
        assert abs(mask.mean() - probability) < 5 * deviation
        assert_array_equal(mask, sample_mask(np.full(bits, probability, "f4"), 1))
        assert (mask != sample_mask(np.full(bits, probability, "f4"), 2)).any()
    certain = np.tile(np.array([0, 1], np.float32), bits // 2)
    assert_array_equal(sample_mask(certain, 3), certain == 1)


@pytest.mark.parametrize("density", [0.5, 0.3, 0.1, 0.01])
def test_a_mask_costs_its_entropy(density: float) -> None:
    """Within 1 %: a bit a weight at most, and less for what is sparse."""
    mask = sample_mask(np.full(200_000, density, np.float32), 4)
    p = float(mask.mean())
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert 8 * len(encode_bitmap(mask)) <= 1.01 * entropy * mask.size


# ---- the server ---------------------------------------------------------------------


def _server(num_clients: int = 4, **options: Any) -> FedPMStrategy:
    model = masked(nn.Linear(12, 1), 128, 8, 0)
    config = FedPMConfig(**options)
    return FedPMStrategy(model, config=config, num_clients=num_clients)


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.sampled_from([1.0, 1.5, 3.0]),
    st.integers(1, 4),
    st.sampled_from(BITS),
    st.integers(0, 99),
)
def test_the_posterior_is_the_textbooks(
    answers: list[int], prior: float, reset_every: int, bits: int, seed: int
) -> None:
    """Client by client, coordinate by coordinate, whoever fails to answer."""
    server = _server(prior=prior, reset_every=reset_every, probability_bits=bits)
    rng = np.random.default_rng(seed)
    alpha, beta = [prior] * 12, [prior] * 12
    scores = [0.0] * 12
    for number, clients in enumerate(answers):
        if number % reset_every == 0:
            alpha, beta = [prior] * 12, [prior] * 12
        masks = rng.random((clients, 12)) < rng.random(12)
        server.messages.exchange += 1
        server.begin_exchange()
        server.reset_sums()
        for mask in masks:
            server.add_upload(mask, 1.0)
            for i, bit in enumerate(mask.tolist()):
                alpha[i] += bit
                beta[i] += not bit
        if not clients:
            continue
        before = list(scores)
        for i, (a, b) in enumerate(zip(alpha, beta, strict=True)):
            level = round(2**bits * (a - 1) / (a + b - 2))
            level = min(max(level, 1), 2**bits - 1)
            scores[i] = float(np.float32(math.log(level) - math.log(2**bits - level)))
        changed = server.finish_exchange(float(clients))
        assert server.weights.tolist() == pytest.approx(scores, rel=1e-6, abs=1e-9)
        pairs = zip(scores, before, strict=True)
        assert changed.tolist() == [new != old for new, old in pairs]
    assert 0 <= posterior_mode(np.array([0, 3]), 3, prior).min() <= 0.5


def test_a_checkpoint_holds_the_counts(tmp_path: Path) -> None:
    """A resumed server goes on within the window of its posterior."""
    server, other = _server(reset_every=3), _server(reset_every=3)
    rng = np.random.default_rng(0)
    server.messages.exchange = 1
    server.begin_exchange()
    server.reset_sums()
    server.add_upload(rng.random(12) < 0.5, 1.0)
    server.finish_exchange(1.0)
    save_state(tmp_path / "state", server.state())
    other.load_state(load_state(tmp_path / "state"))
    mask = rng.random(12) < 0.5
    for each in (server, other):
        each.messages.exchange = 2
        each.begin_exchange()
        each.reset_sums()
        each.add_upload(mask, 1.0)
        each.finish_exchange(1.0)
    assert torch.equal(server.weights, other.weights)
    assert other.masks == 2 and len(set(other.weights.tolist())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weighting": "examples"}, "weighting=examples: must be uniform for fedpm"),
        (
            {"server_optimizer": ServerOptimizerConfig("fedadam")},
            "server_optimizer=fedadam: must be fedavg for fedpm",
        ),
        (
            {"server_optimizer": ServerOptimizerConfig(lr=0.5)},
            "server_optimizer.lr=0.5: must be 1.0 for fedpm",
        ),
        (
            {"quantization": Quantization(bits=8)},
            "quantization.bits=8: must be 32 for fedpm",
        ),
        (
            {"quantization": Quantization(fp16=True)},
            "quantization.fp16=True: must be False for fedpm",
        ),
        ({"num_clients": 70_000}, "method.reset_every=1: must be at most 0 for so"),
    ],
)
def test_what_would_not_be_used_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    """Rather than left unsaid."""
    model = masked(nn.Linear(12, 1), 128, 8, 0)
    with pytest.raises(ConfigError) as caught:
        FedPMStrategy(
            model,
            config=FedPMConfig(),
            **{"num_clients": 2, "num_examples": [1, 1], **arguments},
        )
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("probability", [1e-6, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("bits", [8, 16])
def test_all_begin_at_one_probability(probability: float, bits: int) -> None:
    """One that can be sent; where fewer take part, each is larger."""
    config = FedPMConfig(initial_probability=probability, probability_bits=bits)
    layer: Any = adapt(nn.Linear(300, 40), config, 5)
    level = config.initial_level
    assert abs(level / 2**bits - probability) <= 0.5 / 2**bits or level == 1
    assert_array_equal(layer.weight.detach().numpy(), score_table(bits)[level])
    # The sum of those that take part has the variance of Kaiming's with half of them.
    assert_allclose(layer.fixed**2 * level / 2**bits, 1 / 300, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("prior", (0, 0.99, -1, INF, math.nan, None, True, "1")),
        ("reset_every", (0, -1, 1.5, None, True, "1")),
        ("probability_bits", (0, 4, 32, 8.0, None, True, "8")),
        ("initial_probability", (0, 1, -0.1, math.nan, None, True, "0.5")),
        ("mask_code", ("entropy", None, 1)),
        ("network", ("mean", None, 1)),
    ],
)
def test_a_wrong_value_is_named(key: str, values: tuple[Any, ...]) -> None:
    """One line says which."""
    for value in values:
        with pytest.raises(ConfigError, match=f"^method.{key}="):
            FedPMConfig(**{key: value})


# ---- a federation -------------------------------------------------------------------

ORIGIN = {
    "model": "conv4",
    "input_shape": [1, 8, 8],
    "num_classes": 10,
    "options": {"width": 16},
}
DIGITS = [
    *("method=fedpm", "model=conv4", "model.width=16", "dataset.image_size=8"),
    *("partition=iid", "num_clients=2", "batch_size=20", "local_steps=15"),
    *("optimizer=adam", "lr=0.5", "num_rounds=15", "eval_every=3"),
]


def _federation(*overrides: str) -> Federation:
    cfg = compose_config([*DIGITS, *overrides])
    return configured(cfg, callbacks=[Evaluation(Evaluator(cfg, workbench(cfg)))])


def test_digits_are_learned_at_a_bit_a_weight(tmp_path: Path) -> None:
    """The whole way: training, bytes, the sampled network and the file it leaves."""
    federation, again = _federation(), _federation()
    server = federation.strategy
    record = federation.play(15)
    assert record.test_accuracy is not None and record.test_accuracy > 0.5
    assert record.mean_accuracy is not None and record.mean_accuracy > 0.5
    header = 8 * 180 / server.dimension
    assert record.uplink_bits_per_parameter is not None
    # What the probabilities tell need not be sent: far less than a bit a weight.
    assert record.uplink_bits_per_parameter <= 0.6 + header
    assert record.failures == 0 and record.clients == 2
    # The same seed, the same run.
    repeated, original = again.play(3), server.records[2]
    assert repeated.test_accuracy == original.test_accuracy
    assert repeated.mean_accuracy == original.mean_accuracy
    assert repeated.cumulative_uplink_bytes == original.cumulative_uplink_bytes
    # By the mask's own density it costs more, and tells the same.
    dense = _federation("method.mask_code=density")
    assert dense.play(3).test_accuracy == original.test_accuracy
    assert dense.strategy.records[2].uplink_bytes > original.uplink_bytes
    # What the run leaves is what it has measured.
    server.export(tmp_path, ORIGIN)
    file = tmp_path / NETWORK_FILE
    assert 8 * file.stat().st_size < server.dimension
    data = workbench(compose_config(DIGITS)).data
    network = load_network(file)
    assert evaluate(FlatModel(network), data)[1] == record.test_accuracy
    assert torch.equal(parameters_to_vector(network), server.measured_weights())


def test_the_likeliest_network_is_measured_and_left(tmp_path: Path) -> None:
    """Of what takes part more probably than not; all else is as with draws."""
    federation, drawn = _federation("method.network=likeliest"), _federation()
    server = federation.strategy
    record, other = federation.play(6), drawn.play(6)
    assert torch.equal(server.weights, drawn.strategy.weights)
    assert record.uplink_bytes == other.uplink_bytes
    probabilities = server.weights.sigmoid()
    assert torch.equal(server.measured_weights() > 0, probabilities > 0.5)
    assert not torch.equal(server.measured_weights(), drawn.strategy.measured_weights())
    server.export(tmp_path, ORIGIN)
    network = load_network(tmp_path / NETWORK_FILE)
    data = workbench(compose_config(DIGITS)).data
    assert evaluate(FlatModel(network), data)[1] == record.test_accuracy


def test_clients_follow_the_scores_to_the_bit() -> None:
    """Whoever is not sampled, deaf or forgetful catches up with what changed."""
    training = TrainingConfig(local_steps=2, batch_size=8, optimizer="adam", lr=0.3)
    federation = small([40, 60, 50, 30], training, "fedpm", fraction_fit=0.75)
    server, rng = federation.strategy, np.random.default_rng(0)
    held = {0: server.weights.clone().numpy()}
    for _ in range(25):
        for node in federation.nodes:
            node.reachable = rng.random() < 0.8
            if rng.random() < 0.1:
                node.forget()
        federation.play()
        held[server.exchange] = server.weights.clone().numpy()
        for node in federation.nodes:
            weights = node.state.arrays.get("weights")
            if weights is not None:
                assert_array_equal(weights, held[node.state.version])
    assert server.measured_weights().isinf().all()
    assert torch.equal(server.mean_weights(), server.weights)


def test_every_client_draws_its_own_mask_and_each_time_another() -> None:
    """From scores that are alike: drawn alike, too, their mean would say nothing."""
    still, masks = TrainingConfig(local_steps=1, lr=1e-9), []
    federation = small([9] * 10, still, "fedpm")
    add = federation.strategy.add_upload

    def watched(mask: np.ndarray, weight: float) -> None:
        masks.append(mask.copy())
        add(mask, weight)

    federation.strategy.add_upload = watched
    federation.play(2)

    def agreement(one: int, other: int) -> float:
        return float(np.mean(masks[one] == masks[other]))

    # All begin at one half, where two draws agree on half of some 370 weights. Ten
    # masks then move the probabilities a little, each towards itself.
    assert len(masks) == 20
    for client in range(10):
        assert agreement(client, (client + 1) % 10) < 0.65
        assert agreement(client, 10 + client) < 0.75


def test_what_has_settled_is_not_sent_again() -> None:
    """A message holds the levels that changed, a byte each, not all of them."""
    federation = small([40], TrainingConfig(local_steps=1), "fedpm")
    server, node = federation.strategy, federation.nodes[0]
    federation.play()
    first = size(node.received[-1])
    # One client and a uniform prior: each probability goes to an end and stays there.
    federation.play()
    second = size(node.received[-1])
    federation.play(6)
    last = size(node.received[-1])
    assert first < last < second and second - first > server.dimension


# ---- the final network --------------------------------------------------------------


def _damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    description, rest = unpack_description(whole)
    if how == "absent":
        file.unlink()
    elif how in ("cut", "longer", "text", "bare"):
        wrong = {"cut": whole[:-5], "longer": whole + bytes(4), "bare": rest}
        file.write_bytes(wrong.get(how, b"no network"))
    elif how == "flipped":
        middle = len(rest) // 2
        flipped = rest[:middle] + bytes([rest[middle] ^ 1]) + rest[middle + 1 :]
        file.write_bytes(pack_description(description) + flipped)
    else:
        key, value = how.split("=")
        changed = {**description, key: int(value)}
        file.write_bytes(pack_description(changed) + rest)


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "absent", "text", "flipped", "longer", "bare"),
        *("seed=8", "model=0", "num_classes=11", "options=0", "input_shape=0"),
        *("checksum=1", "level=0", "level=129", "bits=4", "bits=100000"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, how: str) -> None:
    """One line says which, whatever is wrong with it."""
    model = masked(build_model("conv4", (1, 8, 8), 10, width=16), 128, 8, 0)
    server = FedPMStrategy(model, config=FedPMConfig(), num_clients=1)
    server.export(tmp_path, ORIGIN)
    file = tmp_path / NETWORK_FILE
    assert not load_network(file).training
    _damage(file, how)
    with pytest.raises(ConfigError, match="^network=.*network.mask: must be"):
        load_network(file)


@pytest.fixture(name="network_file", scope="module")
def _network_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    model = masked(build_model("conv4", (1, 8, 8), 10, width=4), 51, 8, 0)
    server = FedPMStrategy(model, config=FedPMConfig(0.2), num_clients=1)
    server.export(folder, {**ORIGIN, "options": {"width": 4}})
    return folder / NETWORK_FILE


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(max_examples=200)
def test_a_damaged_byte_never_makes_another_network(
    network_file: Path, place: float, flip: int
) -> None:
    """It is refused, or it was one that nothing follows from."""
    whole = bytearray(network_file.read_bytes())
    sound = parameters_to_vector(load_network(network_file))
    whole[int(place * len(whole))] ^= flip
    damaged = network_file.with_name("damaged")
    damaged.write_bytes(whole)
    try:
        network = load_network(damaged)
    except ConfigError:
        return
    assert torch.equal(parameters_to_vector(network), sound)


def test_statistics_are_in_the_file(tmp_path: Path) -> None:
    """A network with batch normalisation answers as it was measured."""
    model = masked(build_model("vgg11", (1, 28, 28), 10, width=4), 128, 8, 7)
    server = FedPMStrategy(model, config=FedPMConfig(), num_clients=1, seed=7)
    inputs = torch.randn(20, 1, 28, 28)
    model(inputs)
    server.buffers.copy_(buffers_to_vector(model))
    vgg11 = {"model": "vgg11", "input_shape": [1, 28, 28], "options": {"width": 4}}
    server.export(tmp_path, {**ORIGIN, **vgg11})
    FlatModel(model).load(server.measured_weights(), server.buffers)
    network = load_network(tmp_path / NETWORK_FILE)
    with torch.no_grad():
        answers = network(inputs)
        assert torch.equal(answers, model.eval()(inputs)) and answers.any()


def test_agreement_is_what_it_says() -> None:
    """By the slow sum; and a turned mask is as far against as the mask is for."""
    rng = np.random.default_rng(0)
    probabilities = rng.beta(0.5, 0.5, 3000).astype(np.float32)
    mask = sample_mask(probabilities, 1)
    leaning = probabilities.astype(float) - probabilities.astype(float).mean()
    summed = sum(
        lean * (1 if bit else -1) for lean, bit in zip(leaning, mask, strict=True)
    )
    expected = summed / np.sqrt(sum(leaning**2))
    assert agreement(mask, probabilities) == pytest.approx(expected)
    assert agreement(~mask, probabilities) == pytest.approx(-expected)
    coins = [agreement(rng.random(3000) < 0.5, probabilities) for _ in range(500)]
    assert abs(np.mean(coins)) < 0.2 and 0.9 < np.std(coins) < 1.1
    assert agreement(mask, np.full(3000, 0.3, np.float32)) == 0


def test_a_turned_mask_is_refused_and_no_honest_one() -> None:
    """From the second exchange on: in the first all probabilities are the same."""
    training = TrainingConfig(local_steps=2, batch_size=8, optimizer="adam", lr=0.3)
    federation = small([40, 60, 50, 30], training, "fedpm")
    server = federation.strategy

    def turn(answer: FitRes) -> FitRes:
        reader = Reader(
            from_parameters(answer.parameters), server.name, server.dimension
        )
        writer = Writer(reader.header)
        mask = reader.bitmap(server.dimension, server.expected, Part.VALUES)
        writer.bitmap(~mask, server.expected, Part.VALUES)
        writer.vector(reader.vector(server.buffers.numel(), part=Part.BUFFERS))
        reader.finish()
        return replace(answer, parameters=to_parameters(writer.payload()))

    assert federation.play(6).failures == 0
    federation.nodes[0].tamper = turn
    record = federation.play()
    assert (record.clients, record.failures) == (3, 1)
    server.update_bound.multiple = None
    assert federation.play().failures == 0
