"""Tests of ZeroFL and of the sparse training in it, against obvious references."""

import copy
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from federation import small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from gwpf_baseline.learning.flat_model import Layer, layers, parameters_to_vector
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.shared.sparse import SparseUpload
from gwpf_baseline.methods.shared.swat import SparseConv2d, SparseLinear, active
from gwpf_baseline.methods.zerofl import (
    UPLOADS,
    ZeroFLConfig,
    adapt,
    csr_bytes,
    sent,
)
from gwpf_baseline.model import MODELS, build_model
from gwpf_baseline.utils import ConfigError

VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    elements=st.sampled_from([0.0, -0.0, 0.25, -0.5, 0.5, 1.0, -8.0]),
)


def _count(keep: float, total: int) -> int:
    return math.ceil(Fraction(str(keep)) * total)


@given(VALUES, st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 0.95]))
def test_active_keeps_exactly_the_largest(values: np.ndarray, sparsity: float) -> None:
    """By sorting; of ties so many as there is room for, and always the same."""
    tensor = torch.from_numpy(values)
    kept = active(tensor, sparsity).numpy()
    count = _count(round(1 - sparsity, 2), values.size)
    largest = sorted(np.abs(values).flat, reverse=True)[:count]
    rest = [0.0] * (values.size - count)
    assert sorted(np.abs(kept).flat, reverse=True) == largest + rest
    assert ((kept == values) | (kept == 0)).all()
    assert_array_equal(active(tensor, sparsity).numpy(), kept)


def _derivatives(output: torch.Tensor, *of: torch.Tensor | None) -> list[torch.Tensor]:
    wanted = [tensor for tensor in of if tensor is not None]
    weights = torch.arange(output.numel(), dtype=output.dtype).cos()
    return list(torch.autograd.grad(output.flatten() @ weights, wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": (2, 0), "dilation": (1, 2)},
        {"groups": 2, "stride": (1, 2), "padding": 1},
    ],
)
def test_convolution_is_what_swat_says(geometry: dict[str, Any], bias: bool) -> None:
    """Active weights forward and for the input, active inputs for all weights."""
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, 3, bias=bias, **geometry).double()
    sparse = adapt(copy.deepcopy(dense), ZeroFLConfig(0.8, 0, dense_ends=False), 0)
    inputs = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    output = sparse(inputs)
    found = _derivatives(output, inputs, sparse.weight, sparse.bias)

    weight = active(dense.weight, 0.8).detach()
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **geometry}
    forward = functional.conv2d(inputs, weight, dense.bias, **options)
    assert_close(output, forward)
    backward = functional.conv2d(
        active(inputs, 0.8).detach(), dense.weight, dense.bias, **options
    )
    expected = _derivatives(forward, inputs)
    expected += _derivatives(backward, dense.weight, dense.bias)
    assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_linear_is_what_swat_says(shape: tuple[int, ...], bias: bool) -> None:
    """The same, for inputs of any number of dimensions."""
    torch.manual_seed(0)
    dense = nn.Linear(7, 4, bias=bias).double()
    sparse = adapt(copy.deepcopy(dense), ZeroFLConfig(0.7, 0, dense_ends=False), 0)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = sparse(inputs)
    found = _derivatives(output, inputs, sparse.weight, sparse.bias)

    weight = active(dense.weight, 0.7).detach()
    forward = functional.linear(inputs, weight, dense.bias)
    assert_close(output, forward)
    backward = functional.linear(active(inputs, 0.7).detach(), dense.weight, dense.bias)
    expected = _derivatives(forward, inputs)
    expected += _derivatives(backward, dense.weight, dense.bias)
    assert_close(found, expected)


def test_autocast_derives_in_full_precision() -> None:
    """Whatever type it computes in, the parameters get gradients of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    adapt(model, ZeroFLConfig(0.5, 0, dense_ends=False), 0)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(5, 1, 4, 4))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


SHAPES = {"kws_lstm": (1, 9, 8), "transformer": (6,)}


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_parameters_and_compute_sparsely(name: str) -> None:
    """Every layer is swapped, none is renamed; so it stays for inference."""
    torch.manual_seed(0)
    shape = SHAPES.get(name, (1, 28, 28))
    model = build_model(name, shape, 10)
    dense = copy.deepcopy(model)
    assert adapt(model, ZeroFLConfig(0.9, 0, dense_ends=False), 0) is model
    assert list(model.state_dict()) == list(dense.state_dict())
    assert torch.equal(parameters_to_vector(model), parameters_to_vector(dense))
    for path, layer in dense.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            swapped = isinstance(model.get_submodule(path), SparseConv2d | SparseLinear)
            # Attention has no use for its projection but the weights.
            assert swapped != path.endswith("self_attn.out_proj")
            if swapped:
                layer.weight.data = active(layer.weight.data, 0.9)
    inputs = torch.rand(2, *shape)
    if name == "transformer":
        inputs = torch.randint(0, 10, (2, *shape))
    with torch.no_grad():
        assert_close(model.eval()(inputs), dense.eval()(inputs))
    model.train()(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_ends_stay_dense() -> None:
    """Of ResNet-18 the first convolution and the classifier, and nothing else."""
    model = adapt(build_model("resnet18", (3, 32, 32), 10), ZeroFLConfig(), 0)
    layer_types = nn.Conv2d | nn.Linear
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, layer_types)]
    dense = [n for n, m in found if not isinstance(m, SparseConv2d | SparseLinear)]
    assert dense == ["conv1", "fc"] and len(found) == 21


@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.7])
def test_sent_are_the_largest_of_each_layer(upload: str, mask_ratio: float) -> None:
    """By sorting, layer by layer; what has one dimension is sent whole."""
    rng = np.random.default_rng(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3))
    spans = layers(model)
    update, weights = rng.normal(size=(2, spans[-1].span.stop)).astype(np.float32)
    mask = sent(update, weights, spans, ZeroFLConfig(0.7, mask_ratio, upload))
    for span, shape in spans:
        size = np.abs((update if upload == "top_k_diff" else weights)[span])
        count = size.size
        if len(shape) > 1:
            count = _count(round(0.3 + mask_ratio, 2), count)
        expected = np.zeros(size.size, np.bool_)
        expected[np.argsort(-size)[:count]] = True
        assert_array_equal(mask[span], expected)


LAYERS = [Layer(slice(0, 12), (3, 4)), Layer(slice(12, 15), (3,))]
LAYERS += [Layer(slice(15, 20), (5, 1))]


@given(hnp.arrays(np.bool_, 20))
def test_csr_is_what_scipy_would_store(mask: np.ndarray) -> None:
    """Four bytes a value, a column and a row's end; whole tensors as they are."""
    expected = 0
    for span, shape in LAYERS:
        part = mask[span]
        if len(shape) == 1 or part.all():
            expected += 4 * part.size
        else:
            expected += 8 * sum(part.tolist()) + 4 * (shape[0] + 1)
    assert csr_bytes(mask, LAYERS) == expected


TRAINING = TrainingConfig(local_steps=3, batch_size=8, lr=0.2)


@pytest.mark.parametrize("upload", UPLOADS)
def test_the_server_averages_what_clients_send(upload: str) -> None:
    """Weights or updates, 0 where a client sent none, by the clients' weights."""
    options = {"sparsity": 0.8, "mask_ratio": 0.1, "upload": upload}
    federation = small([40, 80, 60], TRAINING, "zerofl", options, weighting="examples")
    server, seen = federation.strategy, []
    add = server.add_upload

    def watched(sparse: SparseUpload, weight: float) -> None:
        seen.append((sparse, weight))
        add(sparse, weight)

    server.add_upload = watched
    for _ in range(3):
        seen.clear()
        before = server.weights.numpy().copy()
        record = federation.play()
        mean = np.zeros(before.size)
        for sparse, weight in seen:
            mean[sparse.mask] += weight / 180 * sparse.values.astype(np.float64)
        expected = mean if upload == "top_k_weights" else before + mean
        after = server.weights.numpy()
        assert_allclose(after, expected, rtol=1e-4, atol=1e-6)
        nobody = ~np.logical_or.reduce([sparse.mask for sparse, _ in seen])
        stays = 0 if upload == "top_k_weights" else before[nobody]
        assert nobody.any() and (after[nobody] == stays).all()
        # 96 of 320, 15 of 50, and 25 that are sent whole.
        assert record.sent_fraction == pytest.approx(136 / 395)
        # Of five rows and of ten, from each of three clients.
        assert record.csr_bytes == 3 * (8 * 96 + 4 * 6 + 8 * 15 + 4 * 11 + 4 * 25)
    assert all("residual" not in node.state.arrays for node in federation.nodes)


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_everything_sent_is_plain_averaging(sparsity: float) -> None:
    """Then it does not matter what is sent; and if nothing is sparse, it is FedAvg."""
    models = []
    for upload in UPLOADS:
        options = {"sparsity": sparsity, "mask_ratio": sparsity, "upload": upload}
        options["dense_ends"] = False
        federation = small([40, 60], TRAINING, "zerofl", options)
        federation.play(4)
        models.append(federation.strategy.weights.numpy())
    dense = small([40, 60], TRAINING, "fedavg")
    dense.play(4)
    averaged = dense.strategy.weights.numpy()
    for weights in models:
        assert_allclose(weights, models[0], atol=1e-5)
        assert np.allclose(weights, averaged, atol=1e-5) == (sparsity == 0)


def test_it_learns_with_few_weights_and_bytes() -> None:
    """Of real training: a fifth of the weights, of which few more ever travel."""
    options = {"sparsity": 0.8, "mask_ratio": 0.1}
    federation = small([60, 60, 60], TRAINING, "zerofl", options)
    first = federation.play()
    last = federation.play(40)
    assert last.train_loss is not None and first.train_loss is not None
    assert last.train_loss < 0.7 * first.train_loss and last.failures == 0
    assert last.cumulative_uplink_bytes < 0.5 * last.dense_bytes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sparsity", value) for value in (-0.1, 1, math.nan, None, True, "0.9")),
        *(("mask_ratio", value) for value in (-0.1, 0.91, math.nan, None, "0")),
        *(("upload", value) for value in ("top_k", None, 1)),
        *(("dense_ends", value) for value in (0, None, "true")),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any) -> None:
    """One line says which."""
    with pytest.raises(ConfigError, match=f"method.{key}="):
        ZeroFLConfig(**{key: value})
