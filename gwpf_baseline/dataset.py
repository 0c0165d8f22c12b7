"""Load a dataset, decode it once, partition it among clients, feed it to a model.

Images are decoded a single time into uint8 arrays on disk, which every worker process
maps into memory. Normalisation and augmentation run batched, on the training device.
"""

import hashlib
import importlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch.nn import functional

from gwpf_baseline.utils import ConfigError

SOURCES = ("digits", "hub", "parquet", "imagefolder")
PARTITIONS = ("iid", "dirichlet", "pathological", "natural_id")

_PARQUET = "an existing folder with train.parquet and, if there is one, test.parquet"
FOLDERS = {
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
    folder : Path or None
        The cache folder that holds the arrays. (default: None)
    """

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    natural_ids: NDArray[np.int64] | None = None
    folder: Path | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


# ----------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Settings:
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


def _check_settings(cfg: DictConfig) -> Settings:
    if cfg.source not in SOURCES:
        raise ConfigError("dataset.source", cfg.source, f"one of {', '.join(SOURCES)}")
    size, share = cfg.image_size, cfg.test_fraction
    if size is not None and not (isinstance(size, int) and size > 0):
        raise ConfigError("dataset.image_size", size, "a whole number > 0, or null")
    if not (isinstance(share, float) and 0 < share < 1):
        raise ConfigError("dataset.test_fraction", share, "a number between 0 and 1")
    return Settings(
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
        raise ConfigError("dataset.path", path or "null", FOLDERS[cfg.source])
    return Path(str(path)).expanduser().resolve()


@lru_cache(maxsize=4)
def _load(settings: Settings, cache_dir: Path) -> ImageData:
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
        importlib.import_module("gwpf_baseline.decoding").decode(settings, fresh)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return _map_arrays(folder, has_ids)


def _fingerprint(settings: Settings) -> str:
    """Digest everything that determines the arrays."""
    files = []
    if settings.path is not None:
        for pattern in patterns(settings.path, settings.source).values():
            for file in sorted(settings.path.glob(pattern)):
                stat = file.stat()
                files.append((str(file), stat.st_size, stat.st_mtime_ns))
    text = repr((_CACHE_VERSION, settings, files))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def patterns(folder: Path, source: str) -> dict[str, str]:
    """Return, for each split in a folder, the pattern of its files' names."""
    if source != "imagefolder":
        known = {"train": "train*.parquet", "test": "test*.parquet"}
    elif (folder / "train").is_dir():
        known = {"train": "train/**/*", "test": "test/**/*"}
    else:
        known = {"train": "**/*"}
    found = {split: p for split, p in known.items() if any(folder.glob(p))}
    if "train" not in found:
        raise ConfigError("dataset.path", folder, FOLDERS[source])
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
        folder=folder,
    )


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
    # One array of all rows and one of the bounds between clients, cached like the data.
    file = None
    if data.folder is not None:
        text = repr((sorted(cfg), num_clients, seed))
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        file = data.folder / f"partition-{name}.npz"
        with suppress(OSError, ValueError, EOFError, KeyError, BadZipFile):
            with np.load(file) as saved:
                return _cut(saved["rows"], saved["bounds"])
    partitioning = importlib.import_module("gwpf_baseline.partitioning")
    parts = partitioning.divide(data, dict(cfg), num_clients, seed)
    rows = np.concatenate(parts)
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    if file is not None:
        fresh = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(fresh, rows=rows, bounds=bounds)
        os.replace(fresh, file)
    return _cut(rows, bounds)


def _cut(
    rows: NDArray[np.int64], bounds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    rows.flags.writeable = False
    return tuple(np.split(rows, bounds))


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
