"""Read a dataset wherever it lies and decode it into arrays, which happens once.

This needs libraries that take seconds to import; a process that finds the arrays in the
cache never loads this module.
"""

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from flwr_datasets import FederatedDataset
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from gwpf_baseline.dataset import FOLDERS, Settings, patterns
from gwpf_baseline.utils import ConfigError


def decode(settings: Settings, folder: Path) -> None:
    """Write every array of the dataset into a folder."""
    datasets.disable_progress_bars()
    arrays: dict[str, Any] = {}
    # The library's own copy of local files is needed only until they are decoded.
    with tempfile.TemporaryDirectory(dir=folder) as library_cache:
        train, test = _read_splits(settings, library_cache)
        label = _column("label", settings.label, train, datasets.ClassLabel)
        labels, arrays["num_classes"] = _encode_labels(train, test, label)
        arrays["train_labels"] = labels[: len(train)]
        arrays["test_labels"] = labels[len(train) :]
        if settings.natural_id is not None:
            names = _values(train, _column("natural_id", settings.natural_id, train))
            arrays["natural_ids"] = np.unique(names, return_inverse=True)[1]
        image = _column("image", settings.image, train, datasets.Image)
        size, mode = _common_format(settings.image_size, image, train, test)
        for name, split in (("train_images", train), ("test_images", test)):
            _write_images(folder / f"{name}.npy", split, image, size, mode)
    arrays["mean"], arrays["std"] = _mean_and_std(folder / "train_images.npy")
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def _read_splits(
    settings: Settings, library_cache: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read the training and the test split, with the images still encoded."""
    if settings.source == "digits":
        splits = {"train": _digits()}
    else:
        splits = _federated_splits(settings, library_cache)
    if "test" not in splits:
        splits = splits["train"].train_test_split(settings.test_fraction, seed=0)
    return splits["train"], splits["test"]


def _digits() -> datasets.Dataset:
    """Bring scikit-learn's digits into the form of the hub's datasets."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # from 0..16
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in pixels], "label": digits.target},
        datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(num_classes=10)
        ),
    )


def _federated_splits(
    settings: Settings, library_cache: str
) -> dict[str, datasets.Dataset]:
    """Read the splits from the hub or from disk through Flower Datasets."""
    where: dict[str, Any]
    allowed = FOLDERS[settings.source]
    if settings.path is None:
        where = {"dataset": settings.hub}
        allowed += f"; {settings.hub} could not be loaded from the hub"
    else:
        where = {
            "dataset": "imagefolder" if settings.source == "imagefolder" else "parquet",
            "data_dir": str(settings.path),
            "data_files": patterns(settings.path, settings.source),
            "cache_dir": library_cache,
        }
        if settings.source == "imagefolder":
            where["drop_labels"] = False  # not even where there is but one class
    federated = FederatedDataset(partitioners={}, shuffle=False, **where)
    try:
        splits = {"train": federated.load_split("train")}
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError("dataset.path", settings.path or "null", allowed) from error
    with suppress(ValueError):  # there is no such split
        splits["test"] = federated.load_split("test")
    return splits


def _column(
    key: str, given: str | None, split: datasets.Dataset, kind: type = object
) -> str:
    """Return the given column, or the only one of its kind."""
    found = [name for name, f in split.features.items() if isinstance(f, kind)]
    if given is None and len(found) == 1:
        return found[0]
    if given is not None and given in split.column_names:
        return given
    columns = ", ".join(split.column_names)
    raise ConfigError(
        f"dataset.{key}", given or "null", f"one of the columns {columns}"
    )


def _values(split: datasets.Dataset, column: str) -> NDArray[Any]:
    return split.with_format("numpy")[column][:]


def _encode_labels(
    train: datasets.Dataset, test: datasets.Dataset, column: str
) -> tuple[NDArray[np.int64], int]:
    """Return the labels of both splits, one after the other, and how many there are."""
    labels = np.concatenate([_values(train, column), _values(test, column)])
    feature = train.features[column]
    if not isinstance(feature, datasets.ClassLabel):  # bare numbers, or names
        classes, labels = np.unique(labels, return_inverse=True)
        return labels.astype(np.int64), len(classes)
    labels = labels.astype(np.int64)
    if labels.min() < 0:
        raise ConfigError("dataset.label", column, "a column without unlabelled rows")
    return labels, feature.num_classes


def _open_images(split: datasets.Dataset, column: str) -> Iterator[Image.Image]:
    """Open, but do not yet decode, one image after the other."""
    mend = ConfigError("dataset.image", column, "a column of readable images")
    try:
        encoded = split.select_columns(column).cast_column(
            column, datasets.Image(decode=False)
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise mend from error
    for batch in encoded.iter(1000):
        for item in batch[column]:
            try:
                image = Image.open(
                    BytesIO(item["bytes"]) if item["bytes"] else item["path"]
                )
            except (TypeError, OSError) as error:
                raise mend from error
            with image:
                yield image


def _common_format(
    image_size: int | None, column: str, *splits: datasets.Dataset
) -> tuple[tuple[int, int], str]:
    """Find the (width, height) and the mode, grey or colour, that all images get."""
    sizes, modes = set(), set()
    for split in splits:
        for image in _open_images(split, column):
            sizes.add(image.size)
            modes.add(Image.getmodebase(image.mode))
    mode = "L" if modes == {"L"} else "RGB"
    if image_size is not None:
        return (image_size, image_size), mode
    if len(sizes) > 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        raise ConfigError(
            "dataset.image_size", "null", f"a number of pixels, as sizes differ: {some}"
        )
    return sizes.pop(), mode


def _write_images(
    file: Path,
    split: datasets.Dataset,
    column: str,
    size: tuple[int, int],
    mode: str,
) -> None:
    """Decode a split into a uint8 array of shape ``(N, C, H, W)`` on disk."""
    width, height = size
    shape = (len(split), len(mode), height, width)  # a mode has a letter per channel
    array = open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    for row, image in enumerate(_open_images(split, column)):
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(mode)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        array[row] = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)
    array.flush()


def _mean_and_std(file: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute each channel's statistics, for pixels scaled to ``[0, 1]``."""
    images = np.load(file, mmap_mode="r")
    # Counting the 256 levels is exact and needs no float copy of the images.
    counts = np.zeros((images.shape[1], 256), np.int64)
    for start in range(0, len(images), 1000):
        chunk = images[start : start + 1000]
        for channel, count in enumerate(counts):
            count += np.bincount(chunk[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt(np.maximum(share @ levels**2 - mean**2, 0))
    std[np.count_nonzero(counts, axis=1) == 1] = 1  # a constant channel
    return mean.astype(np.float32), std.astype(np.float32)
