"""Where a dataset comes from: the configuration of each source, how its files lie."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from omegaconf import DictConfig

from gwpf_baseline.utils import ConfigError, is_number, is_whole

MOST_PIXELS = 1024  # of an image's side: all images are kept decoded
MEL_BANDS = 40  # of which a recording's cepstral coefficients are made

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


@dataclass(frozen=True)
class Settings:
    """What, of the configuration group ``dataset``, determines the arrays.

    Its kinds raise a `ConfigError` for a value that is not allowed.
    """

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
        size = self.image_size
        if size is not None and not (is_whole(size, 1) and size <= MOST_PIXELS):
            allowed = f"a whole number from 1 to {MOST_PIXELS}, or null"
            raise ConfigError("dataset.image_size", size, allowed)


@dataclass(frozen=True)
class AudioSettings(TableSettings):
    """The same of recordings."""

    audio: str | None
    features: int

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if not (is_whole(self.features, 1) and self.features <= MEL_BANDS):
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
        if self.vocabulary is not None and not is_whole(self.vocabulary, 1):
            allowed = "a whole number > 0, or null for all words"
            raise ConfigError("dataset.vocabulary", self.vocabulary, allowed)
        if not is_whole(self.sequence_length, 1):
            allowed = "a whole number > 0"
            raise ConfigError("dataset.sequence_length", self.sequence_length, allowed)


SOURCES: dict[str, type[Settings]] = {
    "digits": ImageSettings,
    "hub": ImageSettings,
    "parquet": ImageSettings,
    "imagefolder": ImageSettings,
    "audio": AudioSettings,
    "text": TextSettings,
}


def read_settings(cfg: DictConfig) -> Settings:
    """Take what determines the arrays from the configuration group ``dataset``.

    Parameters
    ----------
    cfg : DictConfig
        The group, see :func:`gwpf_baseline.dataset.load_data`.

    Returns
    -------
    Settings
        Of the source's kind, with the folder to read from as its path.

    Raises
    ------
    ConfigError
        A key too many or too few, a value that is not allowed, or no such folder.
    """
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
    for key in ("hub", "image", "audio", "label", "natural_id"):
        if cfg.get(key) is not None and not (isinstance(cfg[key], str) and cfg[key]):
            raise ConfigError(f"dataset.{key}", cfg[key], "a name, or null")
    if not isinstance(cfg.augment, bool):
        raise ConfigError("dataset.augment", cfg.augment, "true or false")
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
    if path is None and os.environ.get("GWPF_DATA"):
        shared = Path(os.path.expanduser(os.environ["GWPF_DATA"]))
        if not shared.is_dir():
            # Else who has mistyped it would wait for the hub, and be told of that.
            raise ConfigError("GWPF_DATA", shared, "a folder of data sets, or not set")
        named = shared / cfg.name
        path = named if named.is_dir() else None
    if path is None and cfg.get("hub") is not None:
        return None
    if path is None or not Path(str(path)).expanduser().is_dir():
        raise ConfigError("dataset.path", path or "null", FOLDERS[cfg.source])
    return Path(str(path)).expanduser().resolve()


def patterns(folder: Path, source: str) -> dict[str, str]:
    """Return, for each split in a folder, the pattern of its files' names."""
    for layout in _LAYOUTS[source]:
        found = {split: p for split, p in layout.items() if any(folder.glob(p))}
        if "train" in found:
            return found
    raise ConfigError("dataset.path", folder, FOLDERS[source])
