"""Read a dataset wherever it lies and decode it into arrays, which happens once.

This needs libraries that take seconds to import; a process that finds the arrays in the
cache never loads this module.
"""

import glob
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import datasets
import librosa
import numpy as np
import pyarrow.parquet as pq
import soundfile
from flwr_datasets import FederatedDataset
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from sklearn.datasets import load_digits

from gwpf_baseline.data.settings import (
    FOLDERS,
    MEL_BANDS,
    AudioSettings,
    ImageSettings,
    Settings,
    TableSettings,
    TextSettings,
    patterns,
)
from gwpf_baseline.utils import ConfigError, one_line

# Recordings last a second; windows of 40 ms every 20 ms then make 49 frames.
_SAMPLE_RATE = 16_000
_WINDOW, _HOP = 640, 320
_FRAMES = 1 + (_SAMPLE_RATE - _WINDOW) // _HOP
# No recorder samples faster; a file could say anything.
_MOST_RATE = 768_000
# In WikiText, titles of sections within an article stand between more of these signs.
_TITLE = re.compile("= [^=].* =")
_UNKNOWN, _END_OF_LINE = "<unk>", "<eos>"
# Encoded files that are in memory at a time, each of which may be of many megabytes.
_BATCH = 100

_T = TypeVar("_T")
_Splits = dict[Path, "_Split"]  # by the file for a split's inputs
_Statistics = tuple[NDArray[np.float32], NDArray[np.float32]]  # mean, std


def decode(settings: Settings, folder: Path) -> None:
    """Write every array of the dataset into a folder."""
    datasets.disable_progress_bars()
    # What it logs of files that it cannot read stands in our own errors.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    arrays: dict[str, Any] = {}
    match settings:
        case ImageSettings():
            arrays = _decode_table(settings, folder, _decode_images)
        case AudioSettings():
            arrays = _decode_table(settings, folder, _decode_recordings)
        case TextSettings():
            arrays = _decode_text(settings)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


# ------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class _Split:
    """The examples of a split, and where in their source they lie."""

    settings: TableSettings
    source: str  # the source's own split, of which these may be a part
    examples: datasets.Dataset
    rows: NDArray[np.int64]  # there, from 0

    def refuse(
        self, key: str, column: str, wanted: str, i: int, why: str
    ) -> ConfigError:
        """Return the error that an example's cell is."""
        where = self.settings.path or self.settings.hub or self.settings.source
        return ConfigError(
            f"dataset.{key}",
            column,
            f"a column of {wanted}, unlike row {self.rows[i]} of {where}'s "
            f"{self.source} split ({why}): mend or remove it",
        )

    def select(self, rows: NDArray[np.int64]) -> "_Split":
        """Return some of the examples."""
        return replace(self, examples=self.examples.select(rows), rows=self.rows[rows])


def _decode_table(
    settings: TableSettings, folder: Path, decode_inputs: Callable[..., _Statistics]
) -> dict[str, Any]:
    """Write the inputs into the folder; return all other arrays."""
    arrays: dict[str, Any] = {}
    # The library's own copy of local files is needed only until they are decoded.
    with tempfile.TemporaryDirectory(dir=folder) as library_cache:
        train, test = _read_splits(settings, library_cache)
        label = _column("label", settings.label, train, datasets.ClassLabel)
        labels, arrays["num_classes"] = _encode_labels(train, test, label)
        arrays["train_targets"] = arrays["strata"] = labels[: len(train.rows)]
        arrays["test_targets"] = labels[len(train.rows) :]
        arrays["natural_ids"] = ()
        if settings.natural_id is not None:
            column = _column("natural_id", settings.natural_id, train)
            names = _values("natural_id", train, column)
            arrays["natural_ids"] = np.unique(names, return_inverse=True)[1]
        arrays["mean"], arrays["std"] = decode_inputs(
            settings,
            {folder / "train_inputs.npy": train, folder / "test_inputs.npy": test},
        )
    return arrays


def _read_splits(settings: TableSettings, library_cache: str) -> tuple[_Split, _Split]:
    """Read the training and the test split, with the inputs still encoded."""
    if settings.source == "digits":
        found = {"train": _digits()}
    else:
        found = _federated_splits(settings, library_cache)
    train, *others = (
        _Split(settings, name, examples, np.arange(len(examples)))
        for name, examples in found.items()
    )
    if others:
        return train, others[0]
    numbers = datasets.Dataset.from_dict({"row": train.rows})
    try:
        parts = numbers.train_test_split(settings.test_fraction, seed=0)
    except ValueError as error:
        raise ConfigError(
            "dataset.test_fraction",
            settings.test_fraction,
            f"a share that leaves some of {len(numbers)} rows on both sides",
        ) from error
    rows = parts.with_format("numpy")
    return train.select(rows["train"]["row"][:]), train.select(rows["test"]["row"][:])


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
    settings: TableSettings, library_cache: str
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
            "data_dir": glob.escape(str(settings.path)),
            "data_files": patterns(settings.path, settings.source),
            "cache_dir": library_cache,
        }
        if settings.source == "imagefolder":
            where["drop_labels"] = False  # not even where there is but one class
    federated = FederatedDataset(partitioners={}, shuffle=False, **where)
    refused = ConfigError("dataset.path", settings.path or "null", allowed)
    try:
        splits = {"train": federated.load_split("train")}
    except Exception as error:  # the library's parsers raise whatever they stumble over
        if settings.path is None:
            raise refused from error
        cause = one_line(error.__cause__ or error)
        allowed += f", which can be read ({cause})"
        raise ConfigError("dataset.path", settings.path, allowed) from error
    with suppress(ValueError):  # there is no such split
        splits["test"] = federated.load_split("test")
    if not all(splits.values()):
        raise refused
    return splits


def _column(key: str, given: str | None, split: _Split, kind: type = object) -> str:
    """Return the given column, or the only one of its kind."""
    features = split.examples.features
    found = [name for name, f in features.items() if isinstance(f, kind)]
    if given is None and len(found) == 1:
        return found[0]
    if given is not None and given in features:
        return given
    columns = ", ".join(features)
    raise ConfigError(
        f"dataset.{key}", given or "null", f"one of the columns {columns}"
    )


def _values(key: str, split: _Split, column: str) -> NDArray[Any]:
    """Read a column of numbers or names, of which none is missing."""
    feature = split.examples.features[column]
    wanted = "numbers or names"
    if not isinstance(feature, datasets.ClassLabel | datasets.Value) or (
        "binary" in feature.dtype  # as images are, where no schema says so
    ):
        raise ConfigError(f"dataset.{key}", column, f"a column of {wanted}")
    table = split.examples.select_columns(column).with_format("arrow")[:]
    missing = table[column].is_null(nan_is_null=True).to_numpy()
    if missing.any():
        raise split.refuse(key, column, wanted, int(missing.argmax()), "an empty cell")
    try:
        return np.asarray(table[column].to_numpy())
    except ValueError as error:  # names that are no UTF-8
        raise ConfigError(f"dataset.{key}", column, f"a column of {wanted}") from error


def _encode_labels(
    train: _Split, test: _Split, column: str
) -> tuple[NDArray[np.int64], int]:
    """Return the labels of both splits, one after the other, and how many there are."""
    labels = [_values("label", split, column) for split in (train, test)]
    feature = train.examples.features[column]
    if not isinstance(feature, datasets.ClassLabel):  # bare numbers, or names
        classes, encoded = np.unique(np.concatenate(labels), return_inverse=True)
        return encoded.astype(np.int64), len(classes)
    _check_classes(train.settings, column, feature)
    count = feature.num_classes
    for split, values in zip((train, test), labels, strict=True):
        wrong = (values < 0) | (values >= count)
        if wrong.any():
            i = int(wrong.argmax())
            wanted = f"classes from 0 to {count - 1}, without unlabelled rows"
            raise split.refuse("label", column, wanted, i, f"class {values[i]}")
    return np.concatenate(labels).astype(np.int64), count


def _check_classes(
    settings: TableSettings, column: str, classes: datasets.ClassLabel
) -> None:
    """Check that all files of a table call its classes alike.

    The library takes the names of the first, and no notice of the others'.
    """
    if settings.path is None or settings.source == "imagefolder":
        return
    for pattern in patterns(settings.path, settings.source).values():
        for file in sorted(settings.path.glob(pattern)):
            own = None
            with suppress(Exception):  # what cannot be read names no classes
                schema = datasets.Features.from_arrow_schema(pq.read_schema(file))
                own = schema.get(column)
            if isinstance(own, datasets.ClassLabel) and own.names != classes.names:
                allowed = f"the same classes in all files, unlike in {file.name}"
                raise ConfigError("dataset.label", column, allowed)


def _read_files(
    split: _Split,
    column: str,
    kind: type[datasets.Image | datasets.Audio],
    read: Callable[[Any], _T],
) -> Iterator[_T]:
    """Read, with the given function, one encoded file after the other."""
    key = kind.__name__.lower()
    wanted = f"readable {key} files"
    try:
        encoded = split.examples.select_columns(column)
        encoded = encoded.cast_column(column, kind(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"dataset.{key}", column, f"a column of {wanted}") from error
    items = (item for batch in encoded.iter(_BATCH) for item in batch[column])
    for i, item in enumerate(items):
        try:
            content = read(_open_file(item, split.settings))
        # Decoders of somebody's bytes raise whatever they stumble over.
        except Exception as error:
            name = item and item["path"]
            why = f"{name or 'no name'}: {type(error).__name__}: {error}"
            raise split.refuse(key, column, wanted, i, one_line(why, 300)) from error
        yield content


def _open_file(item: dict[str, Any] | None, settings: TableSettings) -> Any:
    """Return an encoded file's bytes, or its name in the folder of the images."""
    if item is not None and item["bytes"]:
        return BytesIO(item["bytes"])
    if item is None or not item["path"]:
        raise ValueError("an empty cell")
    # A table that names files could name any of this machine.
    file = Path(os.path.normpath(item["path"]))
    if settings.source != "imagefolder" or settings.path not in file.parents:
        raise ValueError("only a path, no bytes")
    return file


def _create(file: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """Create an array on disk that is written row by row."""
    # A memory map beyond the disk's end kills the process that writes to it.
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        size = "x".join(map(str, shape))
        allowed = f"on a disk with {needed:,} bytes free, not {free:,}, to hold {size}"
        raise ConfigError("dataset.cache_dir", file.parent, allowed)
    return open_memmap(file, mode="w+", dtype=dtype, shape=shape)


# ------------------------------------------------------------------------------ images


def _decode_images(settings: ImageSettings, splits: _Splits) -> _Statistics:
    """Write the images of all splits; return the mean and std of the first's."""
    train_file, train = next(iter(splits.items()))
    image = _column("image", settings.image, train, datasets.Image)
    with warnings.catch_warnings():
        # Of an image that is so large that only its being a bomb explains it.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        size, mode = _common_format(settings.image_size, image, *splits.values())
        for file, split in splits.items():
            _write_images(file, split, image, size, mode)
    return _mean_and_std(train_file)


def _read_format(file: Any) -> tuple[tuple[int, int], str]:
    """Return an image's (width, height) and base mode, without decoding it."""
    with Image.open(file) as image:
        if image.format == "EPS":  # a program, which Pillow would have Ghostscript run
            raise ValueError("EPS is no image")
        if image.mode in ("I", "F") and image.format != "PNG":
            raise ValueError("32 bits a pixel, where 8 or 16 are expected")
        return image.size, Image.getmodebase(image.mode)


def _common_format(
    image_size: int | None, column: str, *splits: _Split
) -> tuple[tuple[int, int], str]:
    """Find the (width, height) and the mode, grey or colour, that all images get."""
    formats = {
        found
        for split in splits
        for found in _read_files(split, column, datasets.Image, _read_format)
    }
    sizes = {size for size, _ in formats}
    mode = "L" if all(mode == "L" for _, mode in formats) else "RGB"
    if image_size is not None:
        return (image_size, image_size), mode
    if len(sizes) > 1:
        some = ", ".join(f"{w}x{h}" for w, h in sorted(sizes)[:3])
        raise ConfigError(
            "dataset.image_size", "null", f"a number of pixels, as sizes differ: {some}"
        )
    return sizes.pop(), mode


def _write_images(
    file: Path, split: _Split, column: str, size: tuple[int, int], mode: str
) -> None:
    """Decode a split into a uint8 array of shape ``(N, C, H, W)`` on disk."""
    width, height = size
    channels = len(mode)  # a mode has a letter per channel
    array = _create(file, np.uint8, (len(split.rows), channels, height, width))
    read = partial(_read_pixels, size=size, mode=mode)
    for i, pixels in enumerate(_read_files(split, column, datasets.Image, read)):
        array[i] = pixels
    array.flush()


def _read_pixels(file: Any, size: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    """Decode an image, ``(C, H, W)``."""
    with Image.open(file) as encoded:
        image: Image.Image = encoded
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = image.convert(mode)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    width, height = size
    return np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)


def _mean_and_std(file: Path) -> _Statistics:
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
    shape = (-1, 1, 1)
    return mean.astype(np.float32).reshape(shape), std.astype(np.float32).reshape(shape)


# -------------------------------------------------------------------------- recordings


def _decode_recordings(settings: AudioSettings, splits: _Splits) -> _Statistics:
    """Write the features of all splits; return the mean and std of the first's."""
    train_file, train = next(iter(splits.items()))
    audio = _column("audio", settings.audio, train, datasets.Audio)
    read = partial(_read_features, count=settings.features)
    for file, split in splits.items():
        shape = (len(split.rows), 1, _FRAMES, settings.features)
        array = _create(file, np.float16, shape)
        for i, features in enumerate(_read_files(split, audio, datasets.Audio, read)):
            array[i, 0] = features
        array.flush()
    frames = np.load(train_file, mmap_mode="r").reshape(-1, settings.features)
    mean = frames.mean(axis=0, dtype=np.float64)
    std = frames.std(axis=0, dtype=np.float64)
    std[np.ptp(frames, axis=0) == 0] = 1  # a constant coefficient
    mean, std = (values.astype(np.float32).reshape(1, 1, -1) for values in (mean, std))
    return mean, std


def _read_features(file: Any, count: int) -> NDArray[np.float16]:
    """Compute the mel-frequency cepstra of a recording's first second, ``(T, F)``."""
    with soundfile.SoundFile(file) as recording:
        rate = recording.samplerate
        if rate > _MOST_RATE:
            raise ValueError(f"{rate} samples a second")
        # Resampling looks ahead of the second, by less than another one.
        sound = recording.read(2 * rate, dtype="float32", always_2d=True)
    sound = sound.mean(axis=1)  # of the channels
    sound = librosa.resample(sound, orig_sr=rate, target_sr=_SAMPLE_RATE)
    with np.errstate(over="ignore", invalid="ignore"):  # as is checked below
        cepstra = librosa.feature.mfcc(
            y=librosa.util.fix_length(sound, size=_SAMPLE_RATE),
            sr=_SAMPLE_RATE,
            n_mfcc=count,
            n_mels=MEL_BANDS,
            n_fft=_WINDOW,
            hop_length=_HOP,
            center=False,
        )
        features: NDArray[np.float16] = cepstra.T.astype(np.float16)
    if not np.isfinite(features).all():
        raise ValueError("not a finite sound")
    return features


# -------------------------------------------------------------------------------- text


def _decode_text(settings: TextSettings) -> dict[str, Any]:
    """Turn the articles of a text into sequences of numbered words."""
    assert settings.path is not None
    files = patterns(settings.path, settings.source)
    if "test" not in files:
        raise ConfigError("dataset.path", settings.path, FOLDERS[settings.source])
    counts: Counter[str] = Counter()
    for words in _articles(settings.path, files["train"]):
        counts.update(words)
    del counts[_UNKNOWN]  # which is number 0, however frequent
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    if settings.vocabulary is not None:
        frequent = frequent[: settings.vocabulary - 1]
    numbers = {word: i for i, word in enumerate([_UNKNOWN, *frequent])}
    arrays: dict[str, Any] = {"num_classes": len(numbers), "mean": (), "std": ()}
    for split in ("train", "test"):
        tokens = [
            np.array([numbers.get(word, 0) for word in words], np.int32)
            for words in _articles(settings.path, files[split])
        ]
        inputs, targets, articles = _sequences(tokens, settings.sequence_length)
        arrays |= {f"{split}_inputs": inputs, f"{split}_targets": targets}
        if split == "train":
            arrays["strata"] = arrays["natural_ids"] = articles
    return arrays


def _articles(folder: Path, pattern: str) -> Iterator[list[str]]:
    """Yield the words of one article after the other."""
    words: list[str] = []
    try:
        for file in sorted(folder.glob(pattern)):
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    if _TITLE.fullmatch(line.strip()):
                        yield words
                        words = []
                    words += [*line.split(), _END_OF_LINE]
    except UnicodeDecodeError as error:
        allowed = f"a folder of texts in UTF-8, unlike {file.name}"
        raise ConfigError("dataset.path", folder, allowed) from error
    except OSError as error:
        allowed = f"a folder of readable texts, unlike {file.name} ({error.strerror})"
        raise ConfigError("dataset.path", folder, allowed) from error
    yield words


def _sequences(
    articles: list[NDArray[np.int32]], length: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Cut articles into inputs and targets; return also each row's article."""
    # A sequence needs one word more than its length: the last one's target.
    counts = np.array([max(len(tokens) - 1, 0) // length for tokens in articles])
    if not counts.any():
        allowed = "smaller than the number of words of an article"
        raise ConfigError("dataset.sequence_length", length, allowed)
    inputs, targets = (
        np.concatenate(
            [
                tokens[shift : shift + count * length]
                for tokens, count in zip(articles, counts, strict=True)
            ]
        ).reshape(-1, length)
        for shift in (0, 1)
    )
    kept = counts[counts > 0]  # an article that is too short gets no number
    return inputs, targets.astype(np.int64), np.repeat(np.arange(len(kept)), kept)
