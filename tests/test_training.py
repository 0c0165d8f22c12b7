"""Tests of the local loop: where it begins, goes on and ends."""

import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from federation import digits, small, small_net
from numpy.testing import assert_array_equal
from torch.nn import functional

from gwpf_baseline.data.task import TaskData
from gwpf_baseline.learning import training
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.training import Batches, TrainingConfig, evaluate, train
from gwpf_baseline.utils import ConfigError, derive_seed

DATA = digits()
ROWS = np.arange(100, 137)


def batches(seed: int = 0, client: int = 0) -> Batches:
    """Return the stream of a client with 37 examples."""
    return Batches(DATA, ROWS, seed, client)


def trained(config: TrainingConfig, rounds: int) -> torch.Tensor:
    """Run some rounds and return the weights."""
    model, moments = FlatModel(small_net()), None
    for number in range(rounds):
        cursor = number * config.local_steps * config.batch_size
        _, moments = train(model, batches(), config, cursor, moments)
    return model.vector.detach().clone()


# ---- the stream of samples ----------------------------------------------------------


def test_the_stream_is_one_permutation_an_epoch() -> None:
    """Each epoch holds every example once, in an order of its own."""
    epochs = batches().rows(0, 5 * len(ROWS)).reshape(5, -1)
    for epoch in epochs:
        assert_array_equal(np.sort(epoch), ROWS)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("sizes", [[1] * 150, [7] * 22, [37] * 4, [100, 3, 48]])
def test_the_stream_does_not_depend_on_how_it_is_cut(sizes: list[int]) -> None:
    """Into batches within, at and across the ends of epochs."""
    whole = batches().rows(0, sum(sizes))
    cut, stream, cursor = [], batches(), 0
    for size in sizes:
        cut.append(stream.rows(cursor, size))
        cursor += size
    assert_array_equal(np.concatenate(cut), whole)


def test_any_place_of_the_stream_can_be_read_at_once() -> None:
    """A position is all the state there is; going back is as good as going on."""
    whole = batches().rows(0, 200)
    stream = batches()
    for cursor in (170, 0, 36, 37, 73, 5):
        assert_array_equal(stream.rows(cursor, 30), whole[cursor : cursor + 30])


def test_clients_and_seeds_have_orders_of_their_own() -> None:
    """Even where they hold the same rows."""
    orders = [
        tuple(batches(seed, client).rows(0, 37))
        for seed, client in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(orders)) == 4


def test_a_batch_may_be_larger_than_the_data() -> None:
    """It wraps around as often as it has to."""
    rows = batches().rows(0, 100)
    assert_array_equal(np.unique(rows), ROWS)
    assert len(rows) == 100


# ---- rounds -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rounds", [2, 5, 10])
def test_ten_steps_are_ten_steps_however_many_rounds(
    optimizer: str, rounds: int
) -> None:
    """Data and moments go on where they stopped: the same weights to the bit."""
    config: dict[str, Any] = {
        "batch_size": 8,
        "optimizer": optimizer,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "lr": 0.01,
        "persist_optimizer": True,
    }
    at_once = trained(TrainingConfig(local_steps=10, **config), 1)
    split = trained(TrainingConfig(local_steps=10 // rounds, **config), rounds)
    assert torch.equal(split, at_once)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_persist_optimizer_each_round_begins_anew(optimizer: str) -> None:
    """Momentum then ends with the round, and there is nothing to keep."""
    config = TrainingConfig(
        local_steps=5, batch_size=8, optimizer=optimizer, momentum=0.9
    )
    model = FlatModel(small_net())
    _, moments = train(model, batches(), config, 0)
    assert moments == {}
    train(model, batches(), config, 40)
    split = trained(config, 2)
    assert torch.equal(split, model.vector)
    longer = TrainingConfig(
        local_steps=10, batch_size=8, optimizer=optimizer, momentum=0.9
    )
    assert not torch.equal(split, trained(longer, 1))


def test_a_round_follows_from_its_place_in_the_stream_alone() -> None:
    """Whatever the process drew before, dropout draws the same; elsewhere, others."""
    config = TrainingConfig(local_steps=3, batch_size=8)

    def run(cursor: int) -> tuple[torch.Tensor, torch.Tensor]:
        dropout, dropped = torch.nn.Dropout(0.5), []
        dropout.register_forward_hook(lambda *call: dropped.append(call[2] == 0))
        model = FlatModel(torch.nn.Sequential(dropout, small_net()))
        train(model, batches(), config, cursor)
        return model.vector.detach(), torch.stack(dropped)

    weights, dropped = run(40)
    torch.rand(5)
    again, dropped_again = run(40)
    assert torch.equal(weights, again) and torch.equal(dropped, dropped_again)
    assert not torch.equal(dropped, run(64)[1])


def test_every_step_is_shown() -> None:
    """The hook sees the vector after each one; the loss is their mean."""
    config = TrainingConfig(local_steps=4, batch_size=8)
    model, shown = FlatModel(small_net()), []
    loss, _ = train(
        model, batches(), config, 0, on_step=lambda v: shown.append(v.clone())
    )
    assert len(shown) == 4
    assert torch.equal(shown[-1], model.vector.detach())
    assert len({tuple(v.tolist()) for v in shown}) == 4
    single = TrainingConfig(local_steps=1, batch_size=8)
    model, losses = FlatModel(small_net()), []
    for step in range(4):
        losses.append(train(model, batches(), single, 8 * step)[0])
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("local_epochs", "batch_size", "steps"),
    [(1, 37, 1), (1, 10, 4), (2, 10, 8), (0.5, 10, 2), (0.01, 10, 1), (1, 100, 1)],
)
def test_local_epochs_are_whole_batches(
    local_epochs: float, batch_size: int, steps: int
) -> None:
    """Rounded up, and instead of `local_steps`."""
    config = TrainingConfig(
        local_steps=99, local_epochs=local_epochs, batch_size=batch_size
    )
    assert config.steps(len(ROWS)) == steps


def test_half_precision_is_of_the_model_and_not_of_the_weights() -> None:
    """Its products are in half precision, and so it learns a little otherwise."""
    weights, products = {}, {}
    for precision in ("fp32", "bf16"):
        module = small_net()
        seen: list[torch.dtype] = []
        module[1].register_forward_hook(lambda *call, to=seen: to.append(call[2].dtype))
        model = FlatModel(module)
        train(model, batches(), TrainingConfig(3, precision=precision), 0)
        weights[precision], products[precision] = model.vector.detach(), set(seen)
    assert products == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert weights["bf16"].dtype == torch.float32
    assert not torch.equal(weights["bf16"], weights["fp32"])
    assert torch.allclose(weights["bf16"], weights["fp32"], atol=0.01)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_tensor_cores_round_only_where_they_may(precision: str) -> None:
    """Whatever the last round of this process was in."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "tf32"
    train(FlatModel(small_net()), batches(), TrainingConfig(1, precision=precision), 0)
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_batches_are_augmented_where_that_is_asked_for() -> None:
    """The same examples, moved or mirrored, by the generator's draws alone."""

    def drawn(augment: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator()
        generator.manual_seed(seed)
        stream = Batches(DATA, ROWS, 0, 0, augment)
        [batch] = stream.draw(0, 37, 1, torch.device("cpu"), generator)
        return batch

    plain, moved, again = drawn(False, 0), drawn(True, 0), drawn(True, 0)
    assert torch.equal(plain[0], drawn(False, 1)[0])
    assert torch.equal(moved[0], again[0]) and torch.equal(moved[1], plain[1])
    assert not torch.equal(moved[0], plain[0])
    assert not torch.equal(moved[0], drawn(True, 1)[0])


def test_evaluation_is_in_full_precision() -> None:
    """Also in a process that has never trained, or has in another one."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = False
    evaluate(FlatModel(small_net()), DATA)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic


def test_training_learns_and_evaluation_measures() -> None:
    """Real digits, from guessing to mostly right; batches of any size agree."""
    model = FlatModel(small_net())
    before, guessing = evaluate(model, DATA)
    stream = Batches(DATA, np.arange(1500), 0, 0)
    config = TrainingConfig(local_steps=300, batch_size=50, lr=0.1)
    loss, _ = train(model, stream, config, 0)
    after, accuracy = evaluate(model, DATA)
    assert guessing < 0.3 and accuracy > 0.8
    assert loss < before and after < before
    assert evaluate(model, DATA, batch_size=7) == pytest.approx((after, accuracy))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_learning_rate_falls_after_its_milestones(optimizer: str) -> None:
    """A round's steps are those of the rate that counts in it."""
    config = TrainingConfig(
        local_steps=2, lr=0.1, lr_milestones=(2, 4), lr_decay=0.5, optimizer=optimizer
    )
    rates = [config.lr_in(number) for number in range(1, 7)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    for number, rate in enumerate(rates, start=1):
        plain = TrainingConfig(local_steps=2, lr=rate, optimizer=optimizer)
        one, other = FlatModel(small_net()), FlatModel(small_net())
        train(one, batches(), config, 0, server_round=number)
        train(other, batches(), plain, 0)
        assert torch.equal(one.vector, other.vector)


def test_clients_know_the_round() -> None:
    """Also after a resume: their rate follows the server's count."""
    config = TrainingConfig(local_steps=1, lr=0.1, lr_milestones=(2,), lr_decay=1e-6)
    federation = small([20, 30], config, "fedavg")
    moved = []
    for _ in range(4):
        before = federation.strategy.weights.clone()
        assert federation.play().failures == 0
        moved.append(float((federation.strategy.weights - before).norm()))
    assert min(moved[:2]) > 1e3 * max(moved[2:])


def test_long_gradients_are_scaled_to_the_limit() -> None:
    """As a whole and in their direction; short ones stay as they are, to the bit."""

    def step(grad_clip: float | None) -> torch.Tensor:
        config = TrainingConfig(
            local_steps=1, batch_size=8, lr=1.0, grad_clip=grad_clip
        )
        model = FlatModel(small_net())
        before = model.vector.detach().clone()
        train(model, batches(), config, 0)
        return model.vector.detach() - before

    free = step(None)
    assert free.norm() > 0.1
    clipped = step(0.1)
    torch.testing.assert_close(clipped, free * (0.1 / free.norm()))
    assert torch.equal(step(1e6), free)


def test_draws_are_seeded_as_by_pytorch_and_nothing_is_put_off() -> None:
    """What other devices would be seeded with once they wake up is not kept."""
    model = FlatModel(torch.nn.Sequential(torch.nn.Dropout(), small_net()))
    put_off = len(torch.cuda._queued_calls)
    train(model, batches(), TrainingConfig(local_steps=1), 0)
    drawn = torch.rand(3)
    assert len(torch.cuda._queued_calls) == put_off
    model = FlatModel(torch.nn.Sequential(torch.nn.Dropout(), small_net()))
    stream = batches()
    torch.manual_seed(derive_seed(stream.seed, "model", stream.client, 0))
    config = TrainingConfig(local_steps=1)
    x, _ = next(stream.draw(0, config.batch_size, 1, model.device, torch.Generator()))
    model.module(x)
    assert torch.equal(torch.rand(3), drawn)


# ---- text ---------------------------------------------------------------------------


def sentences() -> TaskData:
    """Return random sequences of six tokens out of eleven."""
    tokens = np.random.default_rng(0).integers(0, 11, (30, 7))
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:]
    articles = np.arange(20) // 5
    return TaskData(
        inputs[:20], targets[:20], inputs[20:], targets[20:], 11, None, None, articles
    )


def language_model() -> FlatModel:
    """Return a model that looks at the last token alone."""
    torch.manual_seed(0)
    return FlatModel(torch.nn.Sequential(torch.nn.Embedding(11, 11)))


@pytest.mark.parametrize("limit", [1 << 24, 2 * 6 * 11, 1])
def test_perplexity_equals_a_slow_reference(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Each token counts once, however few sequences are looked at together."""
    monkeypatch.setattr(training, "_MAX_LOGITS", limit)
    data, model = sentences(), language_model()
    chunks: list[int] = []
    model.module.register_forward_hook(lambda *call: chunks.append(len(call[2])))
    loss, accuracy = evaluate(model, data)
    assert max(chunks) == {1 << 24: 10, 2 * 6 * 11: 2, 1: 1}[limit]
    table = torch.log_softmax(model.vector.detach().reshape(11, 11), dim=1)
    pairs = list(zip(data.test_inputs.flat, data.test_targets.flat, strict=True))
    likelihoods = [float(table[token, following]) for token, following in pairs]
    assert math.exp(loss) == pytest.approx(np.prod(np.exp(likelihoods)) ** (-1 / 60))
    right = [int(table[token].argmax()) == following for token, following in pairs]
    assert accuracy == np.mean(right)


def test_training_averages_over_tokens() -> None:
    """The loss of a batch is its sequences' mean, and falls."""
    data, model = sentences(), language_model()
    stream = Batches(data, np.arange(20), 0, 0)
    x, y = data.train_inputs[stream.rows(0, 4)], data.train_targets[stream.rows(0, 4)]
    logits = model.module(torch.from_numpy(x)).detach()
    table = torch.log_softmax(logits, dim=2).numpy()
    expected = -np.mean([table[i, j, y[i, j]] for i in range(4) for j in range(6)])
    one = TrainingConfig(local_steps=1, batch_size=4)
    assert train(model, stream, one, 0)[0] == pytest.approx(expected, rel=1e-5)
    many = TrainingConfig(local_steps=200, batch_size=20, lr=1.0)
    assert train(model, stream, many, 0)[0] < 0.9 * expected


# ---- configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("local_steps", [0, -1, 1.5, True, "5", None]),
        ("batch_size", [0, -1, 1.5, True, "5", None]),
        ("local_epochs", [0, -1, math.nan, math.inf, True, "1"]),
        ("lr", [0, -0.1, math.nan, math.inf, True, "0.1", None]),
        ("momentum", [-0.1, 1, math.nan, True, "0.9", None]),
        ("weight_decay", [-0.1, math.nan, math.inf, True, "0", None]),
        ("grad_clip", [0, -1, math.nan, math.inf, True, "1"]),
        ("optimizer", ["SGD", "rmsprop", None, 1]),
        ("precision", ["fp16", "", None]),
    ],
)
def test_a_value_that_cannot_be_used_is_named(key: str, values: list[object]) -> None:
    """The message begins with the key and the value, as the user wrote them."""
    for value in values:
        with pytest.raises(ConfigError) as caught:
            TrainingConfig(**{key: value})  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"{key}={value}: must be ")


def test_the_ends_of_the_ranges_can_be_used() -> None:
    """The smallest of everything."""
    config = TrainingConfig(
        local_steps=1,
        local_epochs=1e-9,
        batch_size=1,
        lr=1e-12,
        momentum=0,
        weight_decay=0,
        grad_clip=1e-12,
    )
    assert config.steps(1) == 1


@pytest.mark.parametrize(
    ("local_epochs", "batch_size", "examples", "steps"),
    [(0.28, 1, 25, 7), (1.1, 5, 50, 11)],
)
def test_what_floats_make_of_a_share_is_no_batch_more(
    local_epochs: float, batch_size: int, examples: int, steps: int
) -> None:
    """Though 0.28 times 25 is 7.000000000000001."""
    config = TrainingConfig(local_epochs=local_epochs, batch_size=batch_size)
    assert config.steps(examples) == steps


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.01},
    ],
)
def test_steps_are_those_of_pytorchs_optimisers(settings: dict[str, Any]) -> None:
    """To the bit, also with the moments of the round before."""
    config = TrainingConfig(
        local_steps=4, batch_size=8, persist_optimizer=True, **settings
    )
    model, twin = FlatModel(small_net()), FlatModel(small_net())
    moments: dict[str, np.ndarray] = {}
    weight_decay, lr = config.weight_decay, config.lr
    reference: torch.optim.Optimizer
    if config.optimizer == "adam":
        reference = torch.optim.Adam([twin.vector], lr, weight_decay=weight_decay)
    else:
        momentum = config.momentum
        reference = torch.optim.SGD(
            [twin.vector], lr, momentum, weight_decay=weight_decay
        )
    twin.module.train()
    drawn = batches().draw(0, 8, 12, torch.device("cpu"), torch.Generator())
    for number in range(3):
        _, moments = train(model, batches(), config, 32 * number, moments)
        for x, y in itertools.islice(drawn, 4):
            twin.zero_grad()
            functional.cross_entropy(twin.module(x), y).backward()
            reference.step()
        assert torch.equal(model.vector, twin.vector)


def test_training_imports_no_compiler() -> None:
    """It would take every process that trains some seconds."""
    code = (
        "import sys; from gwpf_baseline.config import checked, compose_config; "
        "from gwpf_baseline.local import federation; "
        "federation(checked(compose_config(['num_clients=2']))).play(); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
