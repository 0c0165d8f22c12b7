"""Load a dataset, decode it once, partition it among clients, feed it to a model.

Images, recordings and text are decoded a single time into arrays on disk, which every
worker process maps into memory. Normalisation and augmentation run batched, on the
training device.
"""

import hashlib
import importlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch.nn import functional

from gwpf_baseline.utils import ConfigError, is_number

PARTITIONS = ("iid", "dirichlet", "pathological", "natural_id")
MEL_BANDS = 40

_PARQUET = "an existing folder with train.parquet and, if there is one, test.parquet"
FOLDERS = {
    "hub": _PARQUET,
    "parquet": _PARQUET,
    "imagefolder": "an existing folder with one subfolder of images a class",
    "audio": _PARQUET,
    "text": "an existing folder with train.txt, or else valid.txt, and test.txt",
}
# How the splits' files may be named; the first with files to train on is taken.
_TABLES = ({"train": "train*.parquet", "test": "test*.parquet"},)
_LAYOUTS: dict[str, tuple[dict[str, str], ...]] = {
    "hub": _TABLES,
    "parquet": _TABLES,
    "imagefolder": (
        {"train": "train/**/*", "test": "test/**/*"},
        {"train": "**/*"},
    ),
    "audio": _TABLES,
    "text": (
        {"train": "train*.txt", "test": "test*.txt"},
        {"train": "valid*.txt", "test": "test*.txt"},
    ),
}
_CACHE_VERSION = 2  # to be raised whenever the same source would decode differently
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


# ----------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Settings:
    """What, of the configuration group ``dataset``, determines the arrays."""

    source: str
    path: Path | None

    metric: ClassVar[str] = "accuracy"


@dataclass(frozen=True)
class TableSettings(Settings):
    """The same of examples that lie, each with its label, in the rows of a table."""

    hub: str | None
    label: str | None
    natural_id: str | None
    test_fraction: float

    def __post_init__(self) -> None:
        """Check the values."""
        share = self.test_fraction
        if not (is_number(share) and 0 < share < 1):
            allowed = "a number between 0 and 1"
            raise ConfigError("dataset.test_fraction", share, allowed)


@dataclass(frozen=True)
class ImageSettings(TableSettings):
    """The same of images."""

    image: str | None
    image_size: int | None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.image_size is not None and not _is_whole(self.image_size):
            allowed = "a whole number > 0, or null"
            raise ConfigError("dataset.image_size", self.image_size, allowed)


@dataclass(frozen=True)
class AudioSettings(TableSettings):
    """The same of recordings."""

    audio: str | None
    features: int

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not (_is_whole(self.features) and self.features <= MEL_BANDS):
            allowed = f"a whole number from 1 to {MEL_BANDS}"
            raise ConfigError("dataset.features", self.features, allowed)


@dataclass(frozen=True)
class TextSettings(Settings):
    """The same of text."""

    vocabulary: int | None
    sequence_length: int

    metric: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.vocabulary is not None and not _is_whole(self.vocabulary):
            allowed = "a whole number > 0, or null for all words"
            raise ConfigError("dataset.vocabulary", self.vocabulary, allowed)
        if not _is_whole(self.sequence_length):
            allowed = "a whole number > 0"
            raise ConfigError("dataset.sequence_length", self.sequence_length, allowed)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


SOURCES: dict[str, type[Settings]] = {
    "digits": ImageSettings,
    "hub": ImageSettings,
    "parquet": ImageSettings,
    "imagefolder": ImageSettings,
    "audio": AudioSettings,
    "text": TextSettings,
}


def load_data(cfg: DictConfig) -> TaskData:
    """Load the configured dataset, decoding it only if no earlier run has.

    Parameters
    ----------
    cfg : DictConfig
        The configuration group ``dataset``:

        - ``name``: what the dataset is called;
        - ``source``: images are ``digits`` (built in), ``hub``, ``parquet`` or
          ``imagefolder``; recordings are ``audio``, in a table like the hub's; a
          language model's words are ``text``;
        - ``path``: the folder on disk, or null. A hub dataset with a folder is read
          from its ``train*.parquet`` and ``test*.parquet`` instead. If null,
          ``$GWPF_DATA/<name>`` is taken where it exists;
        - ``cache_dir``: where decoded arrays are kept, or null for the user's cache;
        - ``augment``: whether clients augment, which only images can be;

        of images and recordings

        - ``hub``: the name on the hub, or null;
        - ``image`` or ``audio``, and ``label``: column names, or null for the only one
          of that type;
        - ``natural_id``: the column naming each example's natural client, or null;
        - ``test_fraction``: share of the training split held out where the source
          has no test split, the same rows for every seed;
        - ``image_size``: pixels of the square that images are resized to, or null;
        - ``features``: cepstral coefficients for each 20 ms of a recording;

        and of text

        - ``vocabulary``: how many words are told apart, the most frequent of the
          training text, or null for all of them;
        - ``sequence_length``: words of an example.

    Returns
    -------
    TaskData
        The same object for the same configuration, within a process.

    Raises
    ------
    ConfigError
        If the data cannot be found or read as configured.

    Notes
    -----
    The cache notices when files on disk change, not when a hub dataset does.
    """
    settings = _check_settings(cfg)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache_dir = Path(cfg.cache_dir or user_cache / "gwpf_baseline").expanduser()
    return _load(settings, cache_dir.resolve())


def _check_settings(cfg: DictConfig) -> Settings:
    source = cfg.get("source")
    if source not in SOURCES:
        raise ConfigError("dataset.source", source, f"one of {', '.join(SOURCES)}")
    kind = SOURCES[source]
    names = [field.name for field in fields(kind)]
    keys = ["name", *names, "cache_dir", "augment"]
    for key, value in cfg.items():
        if key not in keys:
            allowed = f"one of {', '.join(keys)}"
            raise ConfigError(f"dataset.{key!s}", value, allowed)
    for key in keys:
        if key not in cfg:
            allowed = f"given for the source {source}"
            raise ConfigError(f"dataset.{key}", "nothing", allowed)
    if cfg.augment and kind is not ImageSettings:
        allowed = "false, as only images are augmented"
        raise ConfigError("dataset.augment", cfg.augment, allowed)
    return kind(**{name: cfg[name] for name in names} | {"path": _find_folder(cfg)})


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
    if path is None and cfg.get("hub") is not None:
        return None
    if path is None or not Path(str(path)).expanduser().is_dir():
        raise ConfigError("dataset.path", path or "null", FOLDERS[cfg.source])
    return Path(str(path)).expanduser().resolve()


@lru_cache(maxsize=4)
def _load(settings: Settings, cache_dir: Path) -> TaskData:
    """Map the cached arrays, decoding them first if need be."""
    folder = cache_dir / _fingerprint(settings)
    existed = folder.is_dir()  # asked first: another process may be about to finish
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return _map_arrays(folder, settings.metric)
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
        importlib.import_module("gwpf_baseline.data.decoding").decode(settings, fresh)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise
    return _map_arrays(folder, settings.metric)


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
    for layout in _LAYOUTS[source]:
        found = {split: p for split, p in layout.items() if any(folder.glob(p))}
        if "train" in found:
            return found
    raise ConfigError("dataset.path", folder, FOLDERS[source])


def _map_arrays(folder: Path, metric: str) -> TaskData:
    """Open a whole cache folder; raise if it is not one."""

    def array(name: str, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
        return np.load(folder / f"{name}.npy", mmap_mode=mmap_mode)

    def array_or_none(name: str) -> NDArray[Any] | None:
        # An empty file, not a missing one, so that a file that got lost is noticed.
        values = array(name)
        return values if values.size else None

    return TaskData(
        train_inputs=array("train_inputs", "r"),
        train_targets=array("train_targets", "r"),
        test_inputs=array("test_inputs", "r"),
        test_targets=array("test_targets", "r"),
        num_classes=int(array("num_classes")),
        mean=array_or_none("mean"),
        std=array_or_none("std"),
        strata=array("strata"),
        natural_ids=array_or_none("natural_ids"),
        folder=folder,
        metric=metric,
    )


# ------------------------------------------------------------------------ partitioning


def partition_indices(
    data: TaskData, cfg: DictConfig, num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Divide the training set among clients.

    Parameters
    ----------
    data : TaskData
        The dataset.
    cfg : DictConfig
        The configuration group ``partition``, told apart by ``name``:

        - ``iid``: shuffled and cut into equal parts;
        - ``dirichlet``: each class is divided in proportions drawn from a symmetric
          Dirichlet distribution of concentration ``alpha``. A client left without data
          is given one example of whoever has most;
        - ``pathological``: each client has ``classes_per_client`` classes, the first
          in turn, the others at random; a class that nobody drew goes unused;
        - ``natural_id``: the natural ids are shuffled and dealt out one by one until
          none is left; clients are in the order of the first id that each holds. With
          as many clients as ids, client i thus holds the i-th.

        The classes of text are its articles.
    num_clients : int
        Number of clients.
    seed : int
        The run's seed.

    Returns
    -------
    list of NDArray[np.int64]
        Per client its rows of ``data.train_inputs``, sorted, never none; no row is with
        two clients. The arrays are shared between calls and read-only.

    Raises
    ------
    ConfigError
        If the training set cannot be divided like this.
    """
    return list(_partition(data, tuple(cfg.items()), num_clients, seed))


@lru_cache(maxsize=4)
def _partition(
    data: TaskData, cfg: tuple[tuple[str, Any], ...], num_clients: int, seed: int
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
    partitioning = importlib.import_module("gwpf_baseline.data.partitioning")
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
    mean, std = (
        torch.tensor(values, device=inputs.device) for values in (data.mean, data.std)
    )
    values = inputs.to(torch.float32)
    if inputs.dtype == torch.uint8:
        values.div_(255)
    return values.sub_(mean).div_(std)


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
