"""Tests of the flat vectors: they are the model, not a copy of it."""

import copy
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from federation import small_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gwpf_baseline.coordinates import ScatteredSum, gather, scatter
from gwpf_baseline.learning.flat_model import (
    FlatModel,
    buffers_to_vector,
    parameters_to_vector,
    to_ndarrays,
    vector_to_buffers,
)

MakeOptimizer = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw batches that `small_net` takes."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(16, 1, 8, 8, generator=generator),
            torch.randint(10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    ],
    ids=["sgd", "adam"],
)
def test_training_the_vector_is_training_the_model(make: MakeOptimizer) -> None:
    """As PyTorch trains it tensor by tensor, batch statistics included."""
    ordinary = small_net()
    flat = FlatModel(small_net())
    optimizer, flat_optimizer = make(ordinary.parameters()), make([flat.vector])
    for x, y in batches(20):
        optimizer.zero_grad()
        functional.cross_entropy(ordinary(x), y).backward()
        optimizer.step()
        flat.zero_grad()
        functional.cross_entropy(flat.module(x), y).backward()
        flat_optimizer.step()
    torch.testing.assert_close(
        flat.vector.detach(), parameters_to_vector(ordinary), rtol=0, atol=1e-6
    )
    for name, value in ordinary.state_dict().items():
        torch.testing.assert_close(flat.module.state_dict()[name], value)
    assert not torch.equal(parameters_to_vector(small_net()), flat.vector.detach())


def test_parameters_and_gradients_are_views() -> None:
    """Both ways: the layers see the vector change, the vector the layers."""
    flat = FlatModel(small_net())
    parameters = list(flat.module.parameters())
    with torch.no_grad():
        flat.vector.copy_(torch.arange(float(flat.vector.numel())))
        parameters[-1].fill_(-1)
    assert parameters[0].flatten()[:3].tolist() == [0, 1, 2]
    assert torch.all(flat.vector[-10:] == -1)
    x, y = batches(1)[0]
    functional.cross_entropy(flat.module(x), y).backward()
    assert flat.vector.grad is not None
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    assert torch.equal(flat.vector.grad, torch.cat(gradients))
    assert flat.vector.grad.abs().sum() > 0
    flat.zero_grad()
    assert all(not p.grad.any() for p in parameters if p.grad is not None)


def test_parameters_that_need_no_gradient_are_left_out() -> None:
    """They are part of the model but not of what is trained and exchanged."""
    model = small_net()
    first = next(model.parameters()).requires_grad_(False)
    before = first.clone()
    flat = FlatModel(model)
    assert flat.vector.numel() == parameters_to_vector(small_net()).numel() - 320
    with torch.no_grad():
        flat.vector.zero_()
    assert torch.equal(next(flat.module.parameters()), before)


def test_buffers_survive_and_counters_stay_whole() -> None:
    """A mean of counters need not be whole; it is rounded."""
    model, other = small_net(), small_net()
    for x, _ in batches(7):
        model(x)
    vector = buffers_to_vector(model)
    assert vector.dtype == torch.float32
    vector_to_buffers(other, vector)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    counter = other.get_buffer("2.num_batches_tracked")
    assert counter.dtype == torch.int64 and counter.item() == 7
    vector_to_buffers(other, torch.where(vector == 7, 7.6, vector))
    assert counter.item() == 8


def test_a_model_without_buffers_has_an_empty_vector() -> None:
    """It can be loaded all the same."""
    flat = FlatModel(nn.Linear(2, 1))
    assert buffers_to_vector(flat.module).shape == (0,)
    flat.load(torch.ones(3), torch.zeros(0))
    assert flat.vector.tolist() == [1, 1, 1]


def test_load_brings_weights_and_buffers() -> None:
    """What the model held before does not matter."""
    source, flat = small_net(), FlatModel(small_net())
    for x, _ in batches(3):
        source(x)
    with torch.no_grad():
        flat.vector.fill_(9)
    flat.load(parameters_to_vector(source), buffers_to_vector(source))
    for name, value in source.state_dict().items():
        assert torch.equal(flat.module.state_dict()[name], value)


def test_to_ndarrays_loads_back_as_a_state_dict() -> None:
    """In the order, the shapes and the types of the model's own."""
    model = small_net()
    next(model.parameters()).requires_grad_(False)
    trained = copy.deepcopy(model)
    for x, _ in batches(2):
        trained(x)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    arrays = to_ndarrays(
        model, parameters_to_vector(trained), buffers_to_vector(trained)
    )
    names = list(model.state_dict())
    state = dict(zip(names, map(torch.from_numpy, arrays), strict=True))
    restored = small_net()
    restored.load_state_dict(state)
    for name, value in trained.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)
        assert state[name].dtype == value.dtype


def test_a_mean_of_counters_is_rounded_as_the_measured_model_rounds_it() -> None:
    """Clients that take different numbers of steps count differently."""
    model = small_net()
    flat = FlatModel(copy.deepcopy(model))
    buffers = torch.full_like(buffers_to_vector(model), 8 / 3)
    weights = parameters_to_vector(model)
    flat.load(weights, buffers)
    names = list(model.state_dict())
    saved = dict(zip(names, to_ndarrays(model, weights, buffers), strict=True))
    counters = [name for name in names if name.endswith("num_batches_tracked")]
    assert counters
    for name in counters:
        assert saved[name] == flat.module.state_dict()[name] == 3


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def test_shared_parameters_are_exchanged_once_and_returned_twice() -> None:
    """Both of a shared parameter's names get the new value, not the model's own."""
    model = Tied()
    vector = torch.arange(9.0)
    assert parameters_to_vector(model).numel() == 9
    first, second = to_ndarrays(model, vector, torch.zeros(0))
    np.testing.assert_array_equal(first, vector.reshape(3, 3))
    np.testing.assert_array_equal(second, vector.reshape(3, 3))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.6, 1.0])
def test_gather_and_scatter_are_what_a_mask_chooses(share: float) -> None:
    """Over more coordinates than are worked on at a time."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000).astype(np.float32)
    mask = rng.random(100_000) < share
    chosen = gather(values, mask)
    assert chosen.dtype == np.float32
    np.testing.assert_array_equal(chosen, values[mask])
    target = np.zeros_like(values)
    scatter(chosen, mask, target)
    np.testing.assert_array_equal(target, np.where(mask, values, 0))


@given(
    st.sampled_from([1, 1000, 2**17, 2**17 + 1, 300_000]),
    st.lists(st.sampled_from([0, 0.001, 0.04, 0.6, 1]), max_size=12),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_a_scattered_sum_has_the_bits_of_one_vector_after_the_other(
    dimension: int, shares: list[float], seed: int
) -> None:
    """However many blocks there are, and however often memory has run out."""
    rng = np.random.default_rng(seed)
    total = ScatteredSum(dimension)
    for _ in range(2):
        total.reset()
        expected = np.zeros(dimension, np.float32)
        for share in shares:
            index = np.flatnonzero(rng.random(dimension) < share)
            values = rng.normal(size=index.size).astype(np.float32)
            total.add(index, values)
            expected[index] += values
        found = np.full(dimension, np.nan, np.float32)
        for span, values in total.blocks():
            found[span] = values
            values.fill(7)  # it may be overwritten
        np.testing.assert_array_equal(found, expected)
