"""The model zoo: the small vision models of GWPF's experiments and common baselines."""

import importlib
import sys
from collections.abc import Callable, Container

import torch
from torch import nn

from gwpf_baseline.utils import ConfigError, derive_seed

Shape = tuple[int, int, int]  # channels, height, width


def _margin(side: int) -> int:
    """Pixels to add on both ends of a side of 28 or 32 to make it 32."""
    return (32 - side) // 2


def _lenet5(input_shape: Shape, num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; 61,706 parameters on MNIST."""
    channels, height, width = input_shape
    # The original saw its 28-pixel digits on a 32-pixel canvas.
    padding = (_margin(height), _margin(width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def _mnist_cnn(input_shape: Shape, num_classes: int) -> nn.Module:
    """GWPF's M1: two 5x5 convolutions and two linear layers."""
    channels, height, width = input_shape

    def after_convolutions(side: int) -> int:
        return ((side - 4) // 2 - 4) // 2

    features = 64 * after_convolutions(height) * after_convolutions(width)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )


def _vgg11(input_shape: Shape, num_classes: int) -> nn.Module:
    """GWPF's E1: a narrow VGG-11 with batch normalisation."""
    channels, height, width = input_shape
    x, y = _margin(width), _margin(height)
    layers: list[nn.Module] = [nn.ZeroPad2d((x, x, y, y))]  # five poolings need 32
    for block in ((32,), (64,), (128, 128), (128, 256), (256, 256)):
        for out_channels in block:
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(256, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, num_classes),
    )


def _resnet(name: str) -> Callable[[Shape, int], nn.Module]:
    """Turn one of torchvision's ResNets into its CIFAR variant: resolution is kept."""

    def build(input_shape: Shape, num_classes: int) -> nn.Module:
        # Takes seconds to import, which the other models need not wait for.
        zoo = importlib.import_module("torchvision.models")
        model: nn.Module = getattr(zoo, name)(num_classes=num_classes)
        model.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
        # As torchvision initialises every other convolution of the model.
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model

    return build


MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "lenet5": _lenet5,
    "mnist_cnn": _mnist_cnn,
    "resnet18": _resnet("resnet18"),
    "resnet50": _resnet("resnet50"),
    "vgg11": _vgg11,
}

# Heights and widths in pixels that a model takes.
_SIDES: dict[str, Container[int]] = {
    "lenet5": (28, 32),
    "mnist_cnn": range(16, sys.maxsize),
    "resnet18": range(8, sys.maxsize),
    "resnet50": range(8, sys.maxsize),
    "vgg11": (28, 32),
}


def build_model(name: str, input_shape: Shape, num_classes: int) -> nn.Module:
    """Build a model whose weights are drawn from PyTorch's global generator.

    Parameters
    ----------
    name : str
        A key of ``MODELS``.
    input_shape : tuple of int
        Channels, height and width of an image.
    num_classes : int
        Number of outputs.

    Returns
    -------
    nn.Module
        Maps float32 images ``(B, C, H, W)`` to float32 logits ``(B, num_classes)``.

    Raises
    ------
    ConfigError
        If there is no such model, or it does not take images of this size.
    """
    if name not in MODELS:
        raise ConfigError("model", name, f"one of {', '.join(MODELS)}")
    _, height, width = input_shape
    fitting = [
        other for other, sides in _SIDES.items() if height in sides and width in sides
    ]
    if name not in fitting:
        raise ConfigError(
            "model",
            name,
            f"one of the models for {height}x{width} images: "
            f"{', '.join(fitting) or 'none, set a larger dataset.image_size'}",
        )
    return MODELS[name](input_shape, num_classes)


def initial_model(
    name: str, input_shape: Shape, num_classes: int, seed: int
) -> nn.Module:
    """Build the model with which a run starts.

    The server and all clients derive identical weights from the run's seed, so that
    the first round need not send them. The global generator is left as it was.

    Parameters
    ----------
    name, input_shape, num_classes
        As for `build_model`.
    seed : int
        The run's seed.

    Returns
    -------
    nn.Module
        The model, on the CPU.

    Raises
    ------
    ConfigError
        As `build_model`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        return build_model(name, input_shape, num_classes)
