"""Tests of the model zoo."""

import math
from typing import Any

import pytest
import torch

from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.model import MODELS, build_model, initial_model
from gwpf_baseline.utils import ConfigError

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
SPEECH, TEXT = (1, 49, 20), (35,)
VISION = [name for name, model in MODELS.items() if model.takes(CIFAR)]


@pytest.mark.parametrize(
    ("name", "input_shape", "parameters"),
    [
        ("lenet5", MNIST, 61_706),
        ("lenet5", (1, 32, 32), 61_706),
        ("mnist_cnn", MNIST, 582_026),
        ("resnet18", CIFAR, 11_173_962),
        ("resnet20", CIFAR, 272_474),
        ("resnet50", CIFAR, 23_520_842),
        ("kws_lstm", SPEECH, 55_946),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, input_shape: tuple[int, ...], parameters: int
) -> None:
    """A count off by one layer or bias is another architecture."""
    model = build_model(name, input_shape, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vgg11_has_gwpfs_layers() -> None:
    """E1 is eight convolutions and three linear layers of these widths."""
    weights = [p for p in build_model("vgg11", MNIST, 47).parameters() if p.ndim > 1]
    widths = [len(p) for p in weights]
    assert widths == [32, 64, 128, 128, 128, 256, 256, 256, 4096, 4096, 47]


def test_vgg11_is_as_wide_as_configured() -> None:
    """All layers but the last follow the first; 64 channels are the original's."""
    model = build_model("vgg11", CIFAR, 47, width=4)
    widths = [len(p) for p in model.parameters() if p.ndim > 1]
    assert widths == [4, 8, 16, 16, 16, 32, 32, 32, 512, 512, 47]
    original = build_model("vgg11", CIFAR, 10, width=64)
    convolutions = [len(p) for p in original.parameters() if p.ndim == 4]
    assert convolutions == [64, 128, 256, 256, 256, 512, 512, 512]


@pytest.mark.parametrize(
    ("name", "input_shape", "convolutions", "features"),
    [
        ("conv4", MNIST, [1, 1, 2, 2], 6272),
        ("conv6", CIFAR, [1, 1, 2, 2, 4, 4], 4096),
        ("conv10", CIFAR, [1, 1, 2, 2, 4, 4, 8, 8, 16, 16], 1024),
    ],
)
def test_fedpms_models_have_its_layers(
    name: str, input_shape: tuple[int, ...], convolutions: list[int], features: int
) -> None:
    """The authors' widths and numbers of features; all of them follow the first."""
    for width in (64, 8):
        model = build_model(name, input_shape, 10, width=width)
        weights = [p for p in model.parameters() if p.ndim > 1]
        widths = [*(times * width for times in convolutions), 4 * width, 4 * width, 10]
        assert [len(p) for p in weights] == widths
        assert weights[-3].shape[1] == features * width // 64
        assert all(p.shape[2:] == (3, 3) for p in weights[:-3])


@pytest.mark.parametrize(
    ("name", "side", "last"),
    [("conv4", 4, 1), ("conv6", 8, 1), ("conv10", 16, 1), ("conv6", 28, 4)],
)
def test_fedpms_models_take_small_images(name: str, side: int, last: int) -> None:
    """A pooling that leaves half a pixel keeps it."""
    model = build_model(name, (1, side, side), 10, width=2).eval()
    shapes: list[tuple[int, ...]] = []
    for module in model:
        if isinstance(module, torch.nn.MaxPool2d):
            module.register_forward_hook(lambda *call: shapes.append(call[2].shape[2:]))
    with torch.no_grad():
        assert model(torch.randn(2, 1, side, side)).shape == (2, 10)
    assert shapes[-1] == (last, last)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet5", {"width": 8}, "model.width=8: must be left out for lenet5"),
        ("resnet20", {"depth": 3}, "model.depth=3: must be left out for resnet20"),
        ("vgg11", {"depth": 3}, "model.depth=3: must be left out for vgg11"),
        *(
            ("vgg11", {key: 3}, f"model.{key}=3: must be left out for vgg11")
            for key in ("name", "input_shape", "num_classes", "seed")
        ),
        *(
            (name, {"width": width}, f"model.width={width}: must be a whole number")
            for name in ("vgg11", "conv4")
            for width in (0, -1, 1.5, True, "8", None)
        ),
    ],
)
def test_an_option_that_a_model_does_not_take_is_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    """Whether the model lacks it or the value is wrong."""
    with pytest.raises(ConfigError) as caught:
        build_model(name, CIFAR, 10, **options)
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match="model"):
        initial_model(name, CIFAR, 10, 1, **options)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_resnet20_halves_the_resolution_twice(side: int) -> None:
    """Three stages of three blocks with 16, 32 and 64 channels, on any image."""
    model = build_model("resnet20", (3, side, side), 10).eval()
    shapes: list[tuple[int, ...]] = []
    for module in model:
        if type(module).__name__ == "BasicBlock":
            module.register_forward_hook(lambda *call: shapes.append(call[2].shape[1:]))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, side, side))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    stages = [(16, side), (32, side // 2), (64, side // 4)]
    assert shapes == [(c, x, x) for c, x in stages for _ in range(3)]
    convolutions = [p for p in model.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    assert len(convolutions) == 19  # and the linear layer


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("input_shape", [MNIST, (3, 28, 28), (1, 32, 32), CIFAR])
@pytest.mark.parametrize("num_classes", [2, 62])
def test_models_follow_the_dataset(
    name: str, input_shape: tuple[int, ...], num_classes: int
) -> None:
    """Every model takes grey and colour images of both common sizes."""
    model = build_model(name, input_shape, num_classes).eval()
    with torch.no_grad():
        logits = model(torch.randn(3, *input_shape))
    assert logits.shape == (3, num_classes)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_resnet_keeps_the_resolution_of_small_images() -> None:
    """The CIFAR stem neither strides nor pools: 32 pixels reach the last block as 4."""
    model = build_model("resnet18", CIFAR, 10).eval()
    shapes = []
    model.layer4.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    model(torch.zeros(1, *CIFAR))
    assert shapes == [(1, 512, 4, 4)]


@pytest.mark.parametrize(
    ("name", "input_shape", "alternatives"),
    [
        (
            "lenet5",
            (3, 64, 64),
            "mnist_cnn, resnet18, resnet20, resnet50, conv4, conv6, conv10",
        ),
        (
            "vgg11",
            (1, 8, 8),
            "resnet18, resnet20, resnet50, conv4, conv6, kws_lstm",
        ),
        ("mnist_cnn", (3, 32, 15), "resnet18, resnet20, resnet50, conv4, conv6"),
        ("conv6", (3, 7, 9), "conv4"),
        ("resnet18", (3, 3, 4), "none, set a larger dataset.image_size"),
        (
            "kws_lstm",
            (3, 28, 28),
            (
                "lenet5, mnist_cnn, resnet18, resnet20, resnet50, vgg11, "
                "conv4, conv6, conv10"
            ),
        ),
        (
            "lenet5",
            SPEECH,
            "mnist_cnn, resnet18, resnet20, resnet50, conv4, conv6, conv10, kws_lstm",
        ),
        ("lenet5", TEXT, "transformer"),
        (
            "transformer",
            SPEECH,
            "mnist_cnn, resnet18, resnet20, resnet50, conv4, conv6, conv10, kws_lstm",
        ),
    ],
)
def test_a_model_that_does_not_fit_names_those_that_do(
    name: str, input_shape: tuple[int, ...], alternatives: str
) -> None:
    """The message is one line that says what to choose instead."""
    with pytest.raises(ConfigError) as caught:
        build_model(name, input_shape, 10)
    shape = "x".join(str(side) for side in input_shape)
    assert str(caught.value) == (
        f"model={name}: must be one of the models for {shape} inputs: {alternatives}"
    )


def test_transformer_has_gwpfs_layers() -> None:
    """W1: an embedding of 200, two layers with 200 hidden units, nothing beside."""
    model = build_model("transformer", TEXT, 1000)
    layer = 4 * 200 * 200 + 4 * 200 + 2 * (200 * 200 + 200) + 4 * 200
    parameters = 1000 * 200 + 2 * layer + 1000 * 200 + 1000
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not list(model.buffers())


@pytest.mark.parametrize("training", [True, False])
def test_transformer_looks_at_what_came_before_alone(training: bool) -> None:
    """A later word changes nothing before it, an earlier one everything after it."""
    model = build_model("transformer", (8,), 50).train(training)

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same dropout
        with torch.no_grad():
            logits: torch.Tensor = model(tokens)
        return logits

    tokens = torch.randint(50, (3, 8), dtype=torch.int32)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = answer(tokens), answer(changed)
    assert before.shape == (3, 8, 50)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert ((after[:, 5:] - before[:, 5:]).abs().amax(2) > 1e-4).all()


def test_transformer_knows_the_order_of_words() -> None:
    """Positions are sine and cosine of ever longer waves."""
    model = build_model("transformer", (4,), 50).eval()
    seen: list[torch.Tensor] = []
    model.drop.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(torch.full((1, 4), 7))
    embedding = model.embedding.weight[7].detach() * 200**0.5
    for place in range(4):
        for pair in (0, 1, 99):
            angle = place / 10_000 ** (2 * pair / 200)
            expected = [math.sin(angle), math.cos(angle)]
            given = (seen[0][0, place] - embedding)[2 * pair : 2 * pair + 2]
            assert given.tolist() == pytest.approx(expected, abs=1e-5)


def test_kws_lstm_answers_after_the_last_frame() -> None:
    """Every frame counts, in its order, whatever their number."""
    model = build_model("kws_lstm", SPEECH, 12).eval()
    features = torch.randn(3, *SPEECH)
    with torch.no_grad():
        logits = model(features)
        assert logits.shape == (3, 12)
        assert not torch.allclose(model(features.flip(2)), logits, atol=1e-3)
        assert model(features[:, :, :7]).shape == (3, 12)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("kws_lstm", torch.randn(2, *SPEECH)), ("transformer", torch.ones(2, 35).int())],
)
def test_models_live_in_a_flat_vector(name: str, inputs: torch.Tensor) -> None:
    """Also those whose layers keep references to weights of their own."""
    model = FlatModel(build_model(name, tuple(inputs.shape[1:]), 10).eval())
    before = model.module(inputs)
    before.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.module.parameters()])
    assert model.vector.grad is not None
    assert torch.equal(model.vector.grad, gradient) and gradient.any()
    with torch.no_grad():
        model.vector.zero_()
        assert not model.module(inputs).any() and before.any()


def test_an_unknown_model_names_the_known() -> None:
    """A misspelt model lists all models."""
    with pytest.raises(
        ConfigError, match="^model=lenet: must be one of lenet5, mnist_"
    ):
        build_model("lenet", MNIST, 10)


def test_initial_model_follows_from_the_seed_alone() -> None:
    """Server and clients agree on the weights, whatever they drew before."""
    first = initial_model("lenet5", MNIST, 10, 1).state_dict()
    torch.rand(7)
    again = initial_model("lenet5", MNIST, 10, 1).state_dict()
    other = initial_model("lenet5", MNIST, 10, 2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_initial_model_leaves_the_global_generator_alone() -> None:
    """Building a model must not shift anybody else's draws."""
    before = torch.get_rng_state()
    initial_model("lenet5", MNIST, 10, 1)
    assert torch.equal(torch.get_rng_state(), before)
