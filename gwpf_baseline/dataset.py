"""Load a dataset, decode it once, partition it among clients, feed it to a model.

Images are decoded a single time into uint8 arrays on disk, which every worker process
maps into memory. Normalisation and augmentation run batched, on the training device.
"""

import hashlib
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional

from gwpf_baseline.utils import ConfigError

SOURCES = ("digits", "hub", "parquet", "imagefolder")
PARTITIONS = ("iid", "dirichlet", "pathological", "natural_id")

_PARQUET = "an existing folder with train.parquet and, if there is one, test.parquet"
_FOLDERS = {
    "hub": _PARQUET,
    "parquet": _PARQUET,
    "imagefolder": "an existing folder with one subfolder of images a class",
}
_CACHE_VERSION = 1  # to be raised whenever the same source would decode differently
_CROP_PADDING = 4


@dataclass(frozen=True, eq=False)
class ImageData:
    """A decoded image classification dataset.

    Attributes
    ----------
    train_images : NDArray[np.uint8]
        Shape ``(N, C, H, W)``, a read-only memory map.
    train_labels : NDArray[np.int64]
        Shape ``(N,)``, values in ``[0, num_classes)``.
    test_images : NDArray[np.uint8]
        Shape ``(M, C, H, W)``, a read-only memory map.
    test_labels : NDArray[np.int64]
        Shape ``(M,)``.
    num_classes : int
        Number of classes.
    mean, std : NDArray[np.float32]
        Shape ``(C,)``, of the training pixels scaled to ``[0, 1]``; no std is 0.
    natural_ids : NDArray[np.int64] or None
        Shape ``(N,)``, which natural client (a writer, a speaker) a training image
        comes from, numbered in the sorted order of their names. (default: None)
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    natural_ids: NDArray[np.int64] | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


# ----------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class _Settings:
    """What, of the configuration group ``dataset``, determines the arrays."""

    source: str
    hub: str | None
    path: Path | None
    image: str | None
    label: str | None
    natural_id: str | None
    image_size: int | None
    test_fraction: float


def load_data(cfg: DictConfig) -> ImageData:
    """Load the configured dataset, decoding it only if no earlier run has.

    Parameters
    ----------
    cfg : DictConfig
        The configuration group ``dataset``:

        - ``name``: what the dataset is called;
        - ``source``: ``digits`` (built in), ``hub``, ``parquet`` or ``imagefolder``;
        - ``hub``: the name on the hub, or null;
        - ``path``: the folder on disk, or null. A hub dataset with a folder is read
          from its ``train*.parquet`` and ``test*.parquet`` instead. If null,
          ``$GWPF_DATA/<name>`` is taken where it exists;
        - ``image``, ``label``: column names, or null for the only one of that type;
        - ``natural_id``: the column naming each example's natural client, or null;
        - ``image_size``: pixels of the square that images are resized to, or null;
        - ``test_fraction``: share of the training split held out where the source
          has no test split, the same rows for every seed;
        - ``cache_dir``: where decoded arrays are kept, or null for the user's cache.

    Returns
    -------
    ImageData
        The same object for the same configuration, within a process.

    Raises
    ------
    ConfigError
        If the data cannot be found or read as configured.

    Notes
    -----
    The cache notices when files on disk change, not when a hub dataset does.
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache_dir = Path(cfg.cache_dir or user_cache / "gwpf_baseline").expanduser()
    return _load(_check_settings(cfg), cache_dir.resolve())


def _check_settings(cfg: DictConfig) -> _Settings:
    if cfg.source not in SOURCES:
        raise ConfigError("dataset.source", cfg.source, f"one of {', '.join(SOURCES)}")
    size, share = cfg.image_size, cfg.test_fraction
    if size is not None and not (isinstance(size, int) and size > 0):
        raise ConfigError("dataset.image_size", size, "a whole number > 0, or null")
    if not (isinstance(share, float) and 0 < share < 1):
        raise ConfigError("dataset.test_fraction", share, "a number between 0 and 1")
    return _Settings(
        source=cfg.source,
        hub=cfg.hub,
        path=_find_folder(cfg),
        image=cfg.image,
        label=cfg.label,
        natural_id=cfg.natural_id,
        image_size=size,
        test_fraction=share,
    )


def _find_folder(cfg: DictConfig) -> Path | None:
    """Find the folder to read from; None for built-in data and for the hub."""
    path = cfg.path
    if cfg.source == "digits":
        if path is not None:
            # Else who forgets to name the dataset would train on digits unawares.
            raise ConfigError("dataset.path", path, f"null, as {cfg.name} is built in")
        return None
    if path is None and "GWPF_DATA" in os.environ:
        shared = Path(os.environ["GWPF_DATA"], cfg.name)
        path = shared if shared.is_dir() else None
    if path is None and cfg.hub is not None:
        return None
    if path is None or not Path(str(path)).expanduser().is_dir():
        raise ConfigError("dataset.path", path or "null", _FOLDERS[cfg.source])
    return Path(str(path)).expanduser().resolve()


@lru_cache(maxsize=4)
def _load(settings: _Settings, cache_dir: Path) -> ImageData:
    """Map the cached arrays, decoding them first if need be."""
    folder = cache_dir / _fingerprint(settings)
    has_ids = settings.natural_id is not None
    existed = folder.is_dir()  # asked first: another process may be about to finish
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return _map_arrays(folder, has_ids)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            "dataset.cache_dir", cache_dir, "a folder that can be written to"
        ) from error
    # Only a whole cache is given its name: whoever is killed leaves but a temporary
    # folder behind, and of several processes at once the first to finish wins.
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache_dir) as scratch:
        if existed:
            with suppress(FileNotFoundError):
                os.rename(folder, Path(scratch, "damaged"))
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        _decode(settings, fresh)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return _map_arrays(folder, has_ids)


def _fingerprint(settings: _Settings) -> str:
    """Digest everything that determines the arrays."""
    files = []
    if settings.path is not None:
        for pattern in _patterns(settings.path, settings.source).values():
            for file in sorted(settings.path.glob(pattern)):
                stat = file.stat()
                files.append((str(file), stat.st_size, stat.st_mtime_ns))
    text = repr((_CACHE_VERSION, settings, files))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _patterns(folder: Path, source: str) -> dict[str, str]:
    """Return, for each split in a folder, the pattern of its files' names."""
    if source != "imagefolder":
        patterns = {"train": "train*.parquet", "test": "test*.parquet"}
    elif (folder / "train").is_dir():
        patterns = {"train": "train/**/*", "test": "test/**/*"}
    else:
        patterns = {"train": "**/*"}
    found = {split: p for split, p in patterns.items() if any(folder.glob(p))}
    if "train" not in found:
        raise ConfigError("dataset.path", folder, _FOLDERS[source])
    return found


def _map_arrays(folder: Path, has_ids: bool) -> ImageData:
    """Open a whole cache folder; raise if it is not one."""

    def array(name: str, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
        return np.load(folder / f"{name}.npy", mmap_mode=mmap_mode)

    return ImageData(
        train_images=array("train_images", "r"),
        train_labels=array("train_labels"),
        test_images=array("test_images", "r"),
        test_labels=array("test_labels"),
        num_classes=int(array("num_classes")),
        mean=array("mean"),
        std=array("std"),
        natural_ids=array("natural_ids") if has_ids else None,
    )


# ---------------------------------------------------------------------------- decoding


def _decode(settings: _Settings, folder: Path) -> None:
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
    settings: _Settings, library_cache: str
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
    settings: _Settings, library_cache: str
) -> dict[str, datasets.Dataset]:
    """Read the splits from the hub or from disk through Flower Datasets."""
    where: dict[str, Any]
    allowed = _FOLDERS[settings.source]
    if settings.path is None:
        where = {"dataset": settings.hub}
        allowed += f"; {settings.hub} could not be loaded from the hub"
    else:
        where = {
            "dataset": "imagefolder" if settings.source == "imagefolder" else "parquet",
            "data_dir": str(settings.path),
            "data_files": _patterns(settings.path, settings.source),
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


# ------------------------------------------------------------------------ partitioning


def partition_indices(
    data: ImageData, cfg: DictConfig, num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Divide the training set among clients.

    Parameters
    ----------
    data : ImageData
        The dataset.
    cfg : DictConfig
        The configuration group ``partition``, told apart by ``name``:

        - ``iid``: shuffled and cut into equal parts;
        - ``dirichlet``: each class is divided in proportions drawn from a symmetric
          Dirichlet distribution of concentration ``alpha``. A client left without data
          is given one example of whoever has most;
        - ``pathological``: each client has ``classes_per_client`` classes, the first
          in turn, the others at random; a class that nobody drew goes unused;
        - ``natural_id``: client i holds the examples of the i-th natural id.
    num_clients : int
        Number of clients.
    seed : int
        The run's seed.

    Returns
    -------
    list of NDArray[np.int64]
        Per client its rows of ``data.train_images``, sorted, never none; no row is with
        two clients. The arrays are shared between calls and read-only.

    Raises
    ------
    ConfigError
        If the training set cannot be divided like this.
    """
    return list(_partition(data, tuple(cfg.items()), num_clients, seed))


@lru_cache(maxsize=4)
def _partition(
    data: ImageData, cfg: tuple[tuple[str, Any], ...], num_clients: int, seed: int
) -> tuple[NDArray[np.int64], ...]:
    partitioner = _partitioner(data, dict(cfg), num_clients, seed)
    # Partitioners see labels and row numbers only, so that no image is touched.
    table = {"label": data.train_labels, "row": np.arange(len(data.train_labels))}
    if data.natural_ids is not None:
        table["natural_id"] = data.natural_ids
    rows = datasets.Dataset.from_dict(table)
    if isinstance(partitioner, IidPartitioner):  # which cuts without shuffling
        rows = rows.shuffle(seed=seed)
    partitioner.dataset = rows
    # One of them warns about what is documented here, another shows a progress bar.
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            partitions = [
                np.sort(_values(partitioner.load_partition(client), "row"))
                for client in range(num_clients)
            ]
        except ValueError as error:
            raise ConfigError(
                "num_clients", num_clients, f"smaller for this partition: {error}"
            ) from error
    _fill_empty(partitions)
    for partition in partitions:
        partition.flags.writeable = False
    return tuple(partitions)


def _partitioner(
    data: ImageData, cfg: dict[str, Any], num_clients: int, seed: int
) -> Partitioner:
    """Check the configuration and choose Flower's partitioner for it."""
    rows = len(data.train_labels)
    if not (isinstance(num_clients, int) and 1 <= num_clients <= rows):
        allowed = f"a whole number from 1 to {rows}, the number of training examples"
        raise ConfigError("num_clients", num_clients, allowed)
    match cfg["name"]:
        case "iid":
            return IidPartitioner(num_clients)
        case "dirichlet":
            alpha = cfg["alpha"]
            if not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
                raise ConfigError("partition.alpha", alpha, "a number > 0")
            # Empty clients are mended afterwards: redrawing until there are none, the
            # partitioner's way, hardly ever ends for a small alpha.
            return DirichletPartitioner(
                num_clients, "label", alpha, 0, shuffle=False, seed=seed
            )
        case "pathological":
            count = cfg["classes_per_client"]
            classes = len(np.unique(data.train_labels))
            if not (isinstance(count, int) and 1 <= count <= classes):
                allowed = f"a whole number from 1 to {classes}, the number of classes"
                raise ConfigError("partition.classes_per_client", count, allowed)
            return PathologicalPartitioner(
                num_clients, "label", count, "first-deterministic", False, seed
            )
        case "natural_id":
            if data.natural_ids is None:
                allowed = "another, or the dataset femnist or with natural_id set"
                raise ConfigError("partition", "natural_id", allowed)
            ids = len(np.unique(data.natural_ids))
            if num_clients > ids:
                allowed = f"at most {ids}, the number of natural ids"
                raise ConfigError("num_clients", num_clients, allowed)
            return NaturalIdPartitioner("natural_id")
        case name:
            raise ConfigError("partition", name, f"one of {', '.join(PARTITIONS)}")


def _fill_empty(partitions: list[NDArray[np.int64]]) -> None:
    """Give every client without data one row of whoever has most at that moment."""
    for client, partition in enumerate(partitions):
        if len(partition) == 0:
            donor = max(range(len(partitions)), key=lambda i: len(partitions[i]))
            partitions[client] = partitions[donor][:1]
            partitions[donor] = partitions[donor][1:]


# --------------------------------------------------------------------- feeding a model


def prepare(
    images: torch.Tensor,
    data: ImageData,
    augment: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Turn raw images into a model's input.

    Parameters
    ----------
    images : torch.Tensor
        uint8, shape ``(B, C, H, W)``, on any device.
    data : ImageData
        The dataset, whose mean and standard deviation normalise the images.
    augment : bool
        Whether each image is first shifted by up to 4 pixels, zeros moving in, and
        flipped horizontally half the time. (default: False)
    generator : torch.Generator or None
        A CPU generator for the augmentation's draws, which are thus the same on every
        device; None is PyTorch's global one. (default: None)

    Returns
    -------
    torch.Tensor
        float32, shape ``(B, C, H, W)``, on the device of ``images``.
    """
    if augment:
        images = _augment(images, generator)
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (data.mean, data.std)
    )
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


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
