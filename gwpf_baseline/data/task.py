"""What a model sees: decoded examples, normalised and augmented a batch at a time."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

_CROP_PADDING = 4


@dataclass(frozen=True, eq=False)
class TaskData:
    """A decoded dataset: what a model sees and what it is to answer.

    Attributes
    ----------
    train_inputs : NDArray
        Shape ``(N, ...)``, a read-only memory map: uint8 images ``(C, H, W)``, float16
        features of recordings ``(1, T, F)``, or int32 tokens ``(T,)``.
    train_targets : NDArray[np.int64]
        Values in ``[0, num_classes)``, a read-only memory map: shape ``(N,)``, one for
        each example, or ``(N, T)``, one for each token.
    test_inputs, test_targets : NDArray
        The same of the test set.
    num_classes : int
        Number of classes; of text, of words in the vocabulary.
    mean, std : NDArray[np.float32] or None
        Of the training inputs, those of images scaled to ``[0, 1]``, in a shape that
        broadcasts against one example; no std is 0. None for tokens.
    strata : NDArray[np.int64]
        Shape ``(N,)``, what label-skewed partitions divide by: the class; of text, the
        article.
    natural_ids : NDArray[np.int64] or None
        Shape ``(N,)``, which natural client (a writer, a speaker, an article) a
        training example comes from, numbered in the sorted order of their names, or of
        the text. (default: None)
    folder : Path or None
        The cache folder that holds the arrays. (default: None)
    metric : str
        What tells how good a model is: ``accuracy``, or for text ``perplexity``.
        (default: accuracy)
    """

    train_inputs: NDArray[Any]
    train_targets: NDArray[np.int64]
    test_inputs: NDArray[Any]
    test_targets: NDArray[np.int64]
    num_classes: int
    mean: NDArray[np.float32] | None
    std: NDArray[np.float32] | None
    strata: NDArray[np.int64]
    natural_ids: NDArray[np.int64] | None = None
    folder: Path | None = None
    metric: str = "accuracy"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.train_inputs.shape[1:]


def check(data: TaskData) -> None:
    """Refuse arrays that are not what :class:`TaskData` says: a damaged cache's.

    Parameters
    ----------
    data : TaskData
        The dataset. Its targets and tokens are read once, its images and features are
        not.

    Raises
    ------
    ValueError
        A wrong type or shape, or a target that is no class.
    """
    text = data.metric == "perplexity"
    train, test, one = data.train_inputs, data.test_inputs, data.input_shape
    counted = [data.train_targets, data.test_targets, *([train, test] if text else [])]
    kinds = (np.int32,) if text else (np.uint8, np.float16)
    if not (
        train.dtype in kinds
        and len(one) == (1 if text else 3)
        and (test.dtype, test.shape[1:]) == (train.dtype, one)
        and isinstance(data.num_classes, int)
        and all(0 <= x.min() and x.max() < data.num_classes for x in counted)
        and _are(data.train_targets, np.int64, train.shape if text else train.shape[:1])
        and _are(data.test_targets, np.int64, test.shape if text else test.shape[:1])
        and _are(data.strata, np.int64, train.shape[:1])
        and (
            data.natural_ids is None
            or _are(data.natural_ids, np.int64, train.shape[:1])
        )
        and _are_statistics(data, None if text else train.dtype)
    ):
        raise ValueError("no decoded dataset")


def _are(values: NDArray[Any], kind: type, shape: tuple[int, ...]) -> bool:
    return values.dtype == kind and values.shape == shape


def _are_statistics(data: TaskData, kind: np.dtype[Any] | None) -> bool:
    """Tell whether mean and std are those of such inputs, or None for tokens."""
    if kind is None or data.mean is None or data.std is None:
        return kind is None and data.mean is None and data.std is None
    channels, _, features = data.input_shape
    shape = (channels, 1, 1) if kind == np.uint8 else (1, 1, features)
    numbers = np.isfinite(data.mean).all() and np.isfinite(data.std).all()
    return bool(
        _are(data.mean, np.float32, shape)
        and _are(data.std, np.float32, shape)
        and numbers
        and (data.std > 0).all()
    )


def prepare(
    inputs: torch.Tensor,
    data: TaskData,
    augment: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Turn a batch of stored inputs into a model's input.

    Parameters
    ----------
    inputs : torch.Tensor
        uint8 images ``(B, C, H, W)``, float16 features or integer tokens, on any
        device.
    data : TaskData
        The dataset, whose mean and standard deviation normalise the inputs.
    augment : bool
        Whether each image is first shifted by up to 4 pixels, zeros moving in, and
        flipped horizontally half the time. (default: False)
    generator : torch.Generator or None
        A CPU generator for the augmentation's draws, which are thus the same on every
        device; None is PyTorch's global one. (default: None)

    Returns
    -------
    torch.Tensor
        float32 in the same shape, on the device of ``inputs``; tokens as they are.
    """
    if augment:
        inputs = _augment(inputs, generator)
    if data.mean is None or data.std is None:
        return inputs
    mean, std = _statistics(data, inputs.device)
    values = inputs.to(torch.float32)
    if inputs.dtype == torch.uint8:
        values.div_(255)
    return values.sub_(mean).div_(std)


@functools.lru_cache(maxsize=1)
def _statistics(data: TaskData, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Keep mean and std where they are needed: a GPU would wait for them each time."""
    return tuple(torch.tensor(x, device=device) for x in (data.mean, data.std))


def _augment(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Crop at random from the zero-padded images, and flip half of them."""
    batch, channels, height, width = images.shape
    device, offsets = images.device, 2 * _CROP_PADDING + 1
    top, left = torch.randint(offsets, (2, batch, 1), generator=generator).to(device)
    flip = (torch.rand((batch, 1), generator=generator) < 0.5).to(device)
    across = torch.arange(width, device=device)
    rows = top + torch.arange(height, device=device)  # (B, H)
    columns = left + torch.where(flip, across.flip(0), across)  # (B, W)
    padded = functional.pad(images, [_CROP_PADDING] * 4)
    # One gather for the whole batch: the four indices broadcast to (B, C, H, W).
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
