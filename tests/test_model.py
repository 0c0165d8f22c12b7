"""Tests of the model zoo."""

import pytest
import torch

from gwpf_baseline.model import MODELS, build_model, initial_model
from gwpf_baseline.utils import ConfigError

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "input_shape", "parameters"),
    [
        ("lenet5", MNIST, 61_706),
        ("lenet5", (1, 32, 32), 61_706),
        ("mnist_cnn", MNIST, 582_026),
        ("resnet18", CIFAR, 11_173_962),
        ("resnet50", CIFAR, 23_520_842),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, input_shape: tuple[int, int, int], parameters: int
) -> None:
    """A count off by one layer or bias is another architecture."""
    model = build_model(name, input_shape, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vgg11_has_gwpfs_layers() -> None:
    """E1 is eight convolutions and three linear layers of these widths."""
    weights = [p for p in build_model("vgg11", MNIST, 47).parameters() if p.ndim > 1]
    widths = [len(p) for p in weights]
    assert widths == [32, 64, 128, 128, 128, 256, 256, 256, 4096, 4096, 47]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("input_shape", [MNIST, (3, 28, 28), (1, 32, 32), CIFAR])
@pytest.mark.parametrize("num_classes", [2, 62])
def test_models_follow_the_dataset(
    name: str, input_shape: tuple[int, int, int], num_classes: int
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
    ("name", "side", "alternatives"),
    [
        ("lenet5", 64, "mnist_cnn, resnet18, resnet50"),
        ("vgg11", 8, "resnet18, resnet50"),
        ("mnist_cnn", 15, "resnet18, resnet50"),
        ("resnet18", 4, "none, set a larger dataset.image_size"),
    ],
)
def test_a_model_that_does_not_fit_names_those_that_do(
    name: str, side: int, alternatives: str
) -> None:
    """The message is one line that says what to choose instead."""
    with pytest.raises(ConfigError) as caught:
        build_model(name, (1, side, side), 10)
    assert str(caught.value) == (
        f"model={name}: must be one of the models for {side}x{side} images: "
        f"{alternatives}"
    )


def test_an_unknown_model_names_the_known() -> None:
    """A misspelt model lists all models."""
    with pytest.raises(
        ConfigError, match="^model=lenet: must be one of lenet5, mnist_"
    ):
        build_model("lenet", MNIST, 10)


def test_initial_model_follows_from_the_seed_alone() -> None:
    """Server and clients agree on the weights, whatever they drew before."""
    first = initial_model("lenet5", MNIST, 10, seed=1).state_dict()
    torch.rand(7)
    again = initial_model("lenet5", MNIST, 10, seed=1).state_dict()
    other = initial_model("lenet5", MNIST, 10, seed=2).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_initial_model_leaves_the_global_generator_alone() -> None:
    """Building a model must not shift anybody else's draws."""
    before = torch.get_rng_state()
    initial_model("lenet5", MNIST, 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
