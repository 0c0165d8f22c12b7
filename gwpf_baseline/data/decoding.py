"""Read a dataset wherever it lies and decode it into arrays, which happens once.

This needs libraries that take seconds to import; a process that finds the arrays in the
cache never loads this module.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import datasets
import librosa
import numpy as np
import soundfile
from datasets.exceptions import DatasetsError
from flwr_datasets import FederatedDataset
from librosa.util.exceptions import LibrosaError
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from soundfile import SoundFileError

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
from gwpf_baseline.utils import ConfigError

# Recordings last a second; windows of 40 ms every 20 ms then make 49 frames.
_SAMPLE_RATE = 16_000
_WINDOW, _HOP = 640, 320
_FRAMES = 1 + (_SAMPLE_RATE - _WINDOW) // _HOP
# In WikiText, titles of sections within an article stand between more of these signs.
_TITLE = re.compile("= [^=].* =")
_UNREADABLE = (TypeError, OSError, SoundFileError, LibrosaError)
_UNKNOWN, _END_OF_LINE = "<unk>", "<eos>"

_T = TypeVar("_T")
_Splits = dict[Path, datasets.Dataset]  # by the file for a split's inputs
_Statistics = tuple[NDArray[np.float32], NDArray[np.float32]]  # mean, std


def decode(settings: Settings, folder: Path) -> None:
    """Write every array of the dataset into a folder."""
    datasets.disable_progress_bars()
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
        arrays["train_targets"] = arrays["strata"] = labels[: len(train)]
        arrays["test_targets"] = labels[len(train) :]
        arrays["natural_ids"] = ()
        if settings.natural_id is not None:
            names = _values(train, _column("natural_id", settings.natural_id, train))
            arrays["natural_ids"] = np.unique(names, return_inverse=True)[1]
        arrays["mean"], arrays["std"] = decode_inputs(
            settings,
            {folder / "train_inputs.npy": train, folder / "test_inputs.npy": test},
        )
    return arrays


def _read_splits(
    settings: TableSettings, library_cache: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Read the training and the test split, with the inputs still encoded."""
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


def _read_files(
    split: datasets.Dataset,
    column: str,
    kind: type[datasets.Image | datasets.Audio],
    read: Callable[[Any], _T],
) -> Iterator[_T]:
    """Read, with the given function, one encoded file after the other."""
    key = kind.__name__.lower()
    mend = ConfigError(f"dataset.{key}", column, f"a column of readable {key} files")
    try:
        encoded = split.select_columns(column).cast_column(column, kind(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise mend from error
    for batch in encoded.iter(1000):
        for item in batch[column]:
            try:
                content = read(
                    BytesIO(item["bytes"]) if item["bytes"] else item["path"]
                )
            except _UNREADABLE as error:
                raise mend from error
            yield content


# ------------------------------------------------------------------------------ images


def _decode_images(settings: ImageSettings, splits: _Splits) -> _Statistics:
    """Write the images of all splits; return the mean and std of the first's."""
    train_file, train = next(iter(splits.items()))
    image = _column("image", settings.image, train, datasets.Image)
    size, mode = _common_format(settings.image_size, image, *splits.values())
    for file, split in splits.items():
        _write_images(file, split, image, size, mode)
    return _mean_and_std(train_file)


def _open_images(split: datasets.Dataset, column: str) -> Iterator[Image.Image]:
    """Open, but do not yet decode, one image after the other."""
    for image in _read_files(split, column, datasets.Image, Image.open):
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
    shape = (-1, 1, 1)
    return mean.astype(np.float32).reshape(shape), std.astype(np.float32).reshape(shape)


# -------------------------------------------------------------------------- recordings


def _decode_recordings(settings: AudioSettings, splits: _Splits) -> _Statistics:
    """Write the features of all splits; return the mean and std of the first's."""
    train_file, train = next(iter(splits.items()))
    audio = _column("audio", settings.audio, train, datasets.Audio)
    read = partial(_read_features, count=settings.features)
    for file, split in splits.items():
        shape = (len(split), 1, _FRAMES, settings.features)
        array = open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
        for row, features in enumerate(_read_files(split, audio, datasets.Audio, read)):
            array[row, 0] = features
        array.flush()
    frames = np.load(train_file, mmap_mode="r").reshape(-1, settings.features)
    mean = frames.mean(axis=0, dtype=np.float64)
    std = frames.std(axis=0, dtype=np.float64)
    std[np.ptp(frames, axis=0) == 0] = 1  # a constant coefficient
    mean, std = (values.astype(np.float32).reshape(1, 1, -1) for values in (mean, std))
    return mean, std


def _read_features(file: Any, count: int) -> NDArray[np.float32]:
    """Compute the mel-frequency cepstra of a recording's first second, ``(T, F)``."""
    sound, rate = soundfile.read(file, dtype="float32", always_2d=True)
    sound = sound.mean(axis=1)  # of the channels
    sound = librosa.resample(sound, orig_sr=rate, target_sr=_SAMPLE_RATE)
    cepstra: NDArray[np.float32] = librosa.feature.mfcc(
        y=librosa.util.fix_length(sound, size=_SAMPLE_RATE),
        sr=_SAMPLE_RATE,
        n_mfcc=count,
        n_mels=MEL_BANDS,
        n_fft=_WINDOW,
        hop_length=_HOP,
        center=False,
    )
    return cepstra.T


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
        raise ConfigError("dataset.path", folder, FOLDERS["text"]) from error
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
