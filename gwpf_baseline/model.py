"""The model zoo: the models of GWPF's experiments and common baselines."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from torch import nn

from gwpf_baseline.utils import ConfigError, derive_seed, is_whole

Shape = tuple[int, ...]  # of one example


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


def _check_width(width: object) -> None:
    if not is_whole(width, 1):
        raise ConfigError("model.width", width, "a whole number >= 1")


def _vgg11(input_shape: Shape, num_classes: int, width: int = 32) -> nn.Module:
    """GWPF's E1: a narrow VGG-11 with batch normalisation."""
    _check_width(width)
    channels, rows, columns = input_shape
    x, y = _margin(columns), _margin(rows)
    layers: list[nn.Module] = [nn.ZeroPad2d((x, x, y, y))]  # five poolings need 32
    for block in ((1,), (2,), (4, 4), (4, 8), (8, 8)):
        for times in block:
            out_channels = times * width
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
        nn.Linear(channels, 128 * width),
        nn.ReLU(),
        nn.Linear(128 * width, 128 * width),
        nn.ReLU(),
        nn.Linear(128 * width, num_classes),
    )


def _conv(blocks: int) -> Callable[..., nn.Module]:
    """Return FedPM's Conv-4, 6 or 10: blocks of two 3x3 convolutions and a pooling."""

    def build(input_shape: Shape, num_classes: int, width: int = 64) -> nn.Module:
        _check_width(width)
        channels, rows, columns = input_shape
        layers: list[nn.Module] = []
        for block in range(blocks):
            for _ in range(2):
                out_channels = width << block
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU()]
                channels = out_channels
            # Rounding up lets an image of 28 or 16 pixels through five poolings.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(channels * rows * columns, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, num_classes),
        )

    return build


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


def _resnet20(input_shape: Shape, num_classes: int) -> nn.Module:
    """ResNet-20, section 4.2 of the ResNet paper, made of torchvision's blocks."""
    block = importlib.import_module("torchvision.models.resnet").BasicBlock
    channels = 16
    layers: list[nn.Module] = [
        nn.Conv2d(input_shape[0], channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]
    for out_channels, stride in ((16, 1), (32, 2), (64, 2)):
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(
                nn.Conv2d(channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        layers.append(block(channels, out_channels, stride, shortcut))
        layers += [block(out_channels, out_channels) for _ in range(2)]
        channels = out_channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


class _KeywordLstm(nn.Module):
    """Two layers that read a recording frame by frame and answer after the last."""

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_shape[-1], 64, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map features ``(B, 1, T, F)`` to logits ``(B, num_classes)``."""
        states, _ = self.lstm(features.squeeze(1))
        logits: torch.Tensor = self.classifier(states[:, -1])
        return logits


class _Transformer(nn.Module):
    """GWPF's W1: two causal encoder layers between an embedding and a decoder."""

    width, dropout = 200, 0.2

    def __init__(self, _: Shape, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, self.width)
        self.drop = nn.Dropout(self.dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width, 2, self.width, self.dropout, batch_first=True
            )
            for _ in range(2)
        )
        self.decoder = nn.Linear(self.width, num_classes)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(B, T)`` to logits ``(B, T, num_classes)`` of those that
        follow."""
        length, device = tokens.shape[1], tokens.device
        # Neither the positions nor the mask are buffers, which would be sent.
        positions = _sinusoids(length, self.width).to(device)
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=device)
        x = self.drop(self.embedding(tokens) * math.sqrt(self.width) + positions)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logits: torch.Tensor = self.decoder(x)
        return logits


def _sinusoids(length: int, width: int) -> torch.Tensor:
    """Return the positions' encodings ``(length, width)``: sine and cosine in turn."""
    wavelength = 10_000 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] / wavelength
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class Model(NamedTuple):
    """An entry of the model zoo.

    Parameters
    ----------
    build : callable
        Builds the model for an example's shape and a number of classes; its further
        arguments are the keys of the model's configuration.
    takes : callable
        Tells whether the model takes examples of a shape.
    """

    build: Callable[..., nn.Module]
    takes: Callable[[Shape], bool]


def _images(sides: Container[int]) -> Callable[[Shape], bool]:
    """Take images whose height and width in pixels are among the given."""
    return lambda shape: len(shape) == 3 and all(side in sides for side in shape[1:])


MODELS = {
    "lenet5": Model(_lenet5, _images((28, 32))),
    "mnist_cnn": Model(_mnist_cnn, _images(range(16, sys.maxsize))),
    "resnet18": Model(_resnet("resnet18"), _images(range(8, sys.maxsize))),
    "resnet20": Model(_resnet20, _images(range(8, sys.maxsize))),
    "resnet50": Model(_resnet("resnet50"), _images(range(8, sys.maxsize))),
    "vgg11": Model(_vgg11, _images((28, 32))),
    "conv4": Model(_conv(2), _images(range(4, sys.maxsize))),
    "conv6": Model(_conv(3), _images(range(8, sys.maxsize))),
    "conv10": Model(_conv(5), _images(range(16, sys.maxsize))),
    # An image of one channel is as good as a recording: its rows are the frames.
    "kws_lstm": Model(_KeywordLstm, lambda shape: len(shape) == 3 and shape[0] == 1),
    "transformer": Model(_Transformer, lambda shape: len(shape) == 1),
}


def build_model(
    name: str, input_shape: Shape, num_classes: int, /, **options: Any
) -> nn.Module:
    """Build a model whose weights are drawn from PyTorch's global generator.

    Parameters
    ----------
    name : str
        A key of ``MODELS``.
    input_shape : tuple of int
        Shape of an example: channels, height and width of an image; 1, frames and
        features of a recording; words of a text.
    num_classes : int
        Number of outputs; of a language model, of words in the vocabulary.
    **options : object
        The other keys of the configuration group ``model``.

    Returns
    -------
    nn.Module
        Maps float32 inputs ``(B, *input_shape)`` to float32 logits
        ``(B, num_classes)``, and tokens ``(B, T)`` to ``(B, T, num_classes)``.

    Raises
    ------
    ConfigError
        If there is no such model, or it does not take examples of this shape.
    """
    if name not in MODELS:
        raise ConfigError("model", name, f"one of {', '.join(MODELS)}")
    if not MODELS[name].takes(input_shape):
        fitting = [other for other, model in MODELS.items() if model.takes(input_shape)]
        raise ConfigError(
            "model",
            name,
            f"one of the models for {'x'.join(map(str, input_shape))} inputs: "
            f"{', '.join(fitting) or 'none, set a larger dataset.image_size'}",
        )
    build = MODELS[name].build
    known = list(inspect.signature(build).parameters)[2:]
    for key, value in options.items():
        if key not in known:
            raise ConfigError(f"model.{key}", value, f"left out for {name}")
    return build(input_shape, num_classes, **options)


def initial_model(
    name: str, input_shape: Shape, num_classes: int, seed: int, /, **options: Any
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
    **options : object
        As for `build_model`.

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
        return build_model(name, input_shape, num_classes, **options)
