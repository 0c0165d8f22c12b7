"""Tests of loading, caching, partitioning and preparing data."""

# The caches of the process must be forgotten between tests.
# pylint: disable=protected-access

import itertools
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import librosa
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gwpf_baseline import dataset as module
from gwpf_baseline.data import decoding, partitioning
from gwpf_baseline.data.settings import (
    SOURCES,
    AudioSettings,
    ImageSettings,
    TextSettings,
)
from gwpf_baseline.data.task import TaskData, prepare
from gwpf_baseline.dataset import load_data, partition_indices
from gwpf_baseline.utils import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
DATASETS = sorted(f.stem for f in (REPOSITORY / "conf" / "dataset").glob("*.yaml"))


@pytest.fixture(name="cache", autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test a cache of its own, and forget what this process has loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("GWPF_DATA", raising=False)
    module._load.cache_clear()
    return tmp_path / "xdg" / "gwpf_baseline"


def config(dataset: str, **changes: Any) -> DictConfig:
    """Return a shipped dataset configuration with some values changed."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in changes.items()}
    return _shipped("dataset", dataset, plain)


def scheme(name: str, **changes: Any) -> DictConfig:
    """Return a shipped partition configuration with some values changed."""
    return _shipped("partition", name, changes)


def _shipped(group: str, name: str, changes: dict[str, Any]) -> DictConfig:
    cfg = OmegaConf.load(REPOSITORY / "conf" / group / f"{name}.yaml")
    merged = OmegaConf.merge(cfg, changes)
    assert isinstance(merged, DictConfig)
    return merged


def labelled(labels: Any, natural_ids: Any = None) -> TaskData:
    """Return a dataset of which only labels and ids matter."""
    labels = np.asarray(labels, np.int64)
    ids = None if natural_ids is None else np.asarray(natural_ids, np.int64)
    images = np.zeros((len(labels), 1, 1, 1), np.uint8)
    one = np.ones((1, 1, 1), np.float32)
    count = int(labels.max()) + 1
    return TaskData(images, labels, images, labels, count, one, one, labels, ids)


def random_images(count: int, mode: str = "RGB", side: int = 8) -> list[Image.Image]:
    """Return images of noise."""
    rng = np.random.default_rng(count)
    shape = (count, side, side, 3)[: 4 if mode == "RGB" else 3]
    return [Image.fromarray(p) for p in rng.integers(0, 256, shape, dtype=np.uint8)]


def png(image: Image.Image) -> bytes:
    """Return an encoded image."""
    buffer = BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_parquet(file: Path, **columns: tuple[Any, list[Any]]) -> None:
    """Write a parquet file in the hub's schema: a feature and its values per column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    values = {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(values, features).to_parquet(file)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail when anything is decoded."""

    def fail(*_: Any) -> None:
        pytest.fail("decoded again")

    monkeypatch.setattr(decoding, "decode", fail)


# --------------------------------------------------------------------------- sources


def test_dataset_configurations_hold_the_keys_of_their_kind_of_data() -> None:
    """Code may rely on each key, whatever the dataset of that kind."""
    assert set(DATASETS) >= {"digits", "mnist", "emnist", "cifar10", "cifar100"}
    keys: dict[type, Any] = {
        ImageSettings: config("digits").keys(),
        AudioSettings: config("speech_commands").keys(),
        TextSettings: config("wikitext-2").keys(),
    }
    for name in DATASETS:
        assert config(name).keys() == keys[SOURCES[config(name).source]]
        assert config(name).name == name


@pytest.mark.parametrize("name", ["digits", "speech_commands", "wikitext-2"])
def test_unknown_and_missing_keys_are_named(name: str) -> None:
    """A key of another kind of data is as wrong as none."""
    cfg = config(name, colour="red")
    with pytest.raises(ConfigError, match="^dataset.colour=red: must be one of name, "):
        load_data(cfg)
    cfg = config(name)
    del cfg["cache_dir"]
    with pytest.raises(ConfigError, match="^dataset.cache_dir=nothing: must be given"):
        load_data(cfg)
    with pytest.raises(ConfigError, match="^dataset.source=None: must be one of digit"):
        load_data(OmegaConf.create({"name": name}))


def test_digits_need_nothing_but_the_package() -> None:
    """The built-in dataset is scaled to uint8, enlarged and split 80 to 20."""
    data = load_data(config("digits"))
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == 10
    assert (len(data.train_inputs), len(data.test_inputs)) == (1437, 360)
    assert data.train_inputs.dtype == np.uint8
    assert data.train_inputs.max() == 255
    assert data.train_targets.dtype == np.int64
    assert data.natural_ids is None
    assert set(data.test_targets) == set(range(10))
    pixels = data.train_inputs / 255
    assert data.mean is not None and data.std is not None
    np.testing.assert_allclose(data.mean, pixels.mean(), rtol=1e-5)
    np.testing.assert_allclose(data.std, pixels.std(), rtol=1e-5)
    assert data.mean.dtype == data.std.dtype == np.float32
    assert data.mean.shape == data.std.shape == (1, 1, 1)
    assert_array_equal(data.strata, data.train_targets)
    assert data.metric == "accuracy"


def test_images_are_mapped_and_read_only() -> None:
    """Workers share the pages of one file and cannot spoil them."""
    data = load_data(config("digits"))
    assert isinstance(data.train_inputs, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        data.train_inputs[0] = 0


@pytest.mark.parametrize(
    ("name", "shape", "classes", "rows"),
    [
        ("mnist", (1, 28, 28), 10, (60_000, 10_000)),
        ("emnist", (1, 28, 28), 47, (40_650, 8_123)),
        ("cifar10", (3, 32, 32), 10, (50_000, 10_000)),
    ],
)
def test_real_data(
    data_root: Path,
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    rows: tuple[int, int],
) -> None:
    """The real datasets decode to what is known of them."""
    if not (data_root / name).is_dir():
        pytest.skip(f"no real data: {data_root / name} does not exist")
    data = load_data(config(name, path=data_root / name))
    assert data.input_shape == shape
    assert data.num_classes == classes
    assert (len(data.train_targets), len(data.test_targets)) == rows
    assert set(data.train_targets) == set(data.test_targets) == set(range(classes))
    if name == "mnist":
        assert data.mean is not None and data.std is not None
        np.testing.assert_allclose(data.mean, 0.1307, atol=1e-4)
        np.testing.assert_allclose(data.std, 0.3081, atol=1e-4)


def test_parquet_like_cifar100(tmp_path: Path) -> None:
    """Pixels survive; of two label columns the configured one is read."""
    images = random_images(12)
    fine = [(7 * i) % 100 for i in range(12)]
    for split, part in (("train", slice(0, 9)), ("test", slice(9, 12))):
        write_parquet(
            tmp_path / "data" / f"{split}.parquet",
            img=(datasets.Image(), images[part]),
            fine_label=(datasets.ClassLabel(num_classes=100), fine[part]),
            coarse_label=(datasets.ClassLabel(num_classes=20), [0] * len(fine[part])),
        )
    data = load_data(config("cifar100", path=tmp_path / "data"))
    expected = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    assert_array_equal(data.train_inputs, expected[:9])
    assert_array_equal(data.test_inputs, expected[9:])
    assert_array_equal(data.train_targets, fine[:9])
    assert_array_equal(data.test_targets, fine[9:])
    assert data.num_classes == 100


def test_datasets_are_found_under_gwpf_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment variable names the folder of all datasets."""
    write_parquet(
        tmp_path / "mnist" / "train.parquet",
        image=(datasets.Image(), random_images(5, "L")),
        label=(datasets.ClassLabel(num_classes=10), list(range(5))),
    )
    monkeypatch.setenv("GWPF_DATA", str(tmp_path))
    assert load_data(config("mnist")).input_shape == (1, 8, 8)
    assert load_data(config("digits")).input_shape == (1, 28, 28)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("GWPF_DATA", f"~/{tmp_path.name}")
    assert load_data(config("mnist")).input_shape == (1, 8, 8)
    monkeypatch.setenv("GWPF_DATA", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="GWPF_DATA=.*gone: must be a folder"):
        load_data(config("mnist"))


def test_who_cannot_write_to_the_cache(tmp_path: Path) -> None:
    """Is told where data have to be decoded, and divides them anew where they are."""
    with pytest.raises(ConfigError, match="dataset.cache_dir=/proc: must be"):
        load_data(config("digits", cache_dir="/proc"))
    data = load_data(config("digits"))
    gone = replace(data, folder=tmp_path / "gone")
    iid = scheme("iid")
    assert_array_equal(
        np.concatenate(partition_indices(gone, iid, 3, 0)),
        np.concatenate(partition_indices(data, iid, 3, 0)),
    )


def test_parquet_like_femnist(tmp_path: Path) -> None:
    """Ids number the sorted writers, a test set is held out, shards are joined."""
    writers = ["f0010_02", "f0000_14", "f0005_03", "f0010_02", "f0000_14"] * 4
    for shard, part in enumerate((slice(0, 12), slice(12, 20))):
        write_parquet(
            tmp_path / "data" / f"train-0000{shard}-of-00002.parquet",
            image=(datasets.Image(), random_images(20, "L")[part]),
            writer_id=(datasets.Value("string"), writers[part]),
            character=(datasets.ClassLabel(num_classes=62), list(range(20))[part]),
        )
    data = load_data(config("femnist", path=tmp_path / "data"))
    assert data.num_classes == 62
    assert (len(data.train_targets), len(data.test_targets)) == (16, 4)
    assert set(data.train_targets) | set(data.test_targets) == set(range(20))
    assert data.natural_ids is not None
    assert data.natural_ids.dtype == np.int64
    # Each label occurs once, so it tells which row of the source an example was.
    names = sorted(set(writers))
    assert [names[i] for i in data.natural_ids] == [
        writers[label] for label in data.train_targets
    ]


def test_parquet_from_elsewhere(tmp_path: Path) -> None:
    """Named columns need no types of the hub: bare bytes and class names will do."""
    rows = {
        "picture": [png(image) for image in random_images(4)],
        "animal": ["dog", "cat", "eel", "cat"],
    }
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "train.parquet")
    cfg = config("parquet", path=tmp_path / "data", image="picture", label="animal")
    data = load_data(cfg)
    assert data.num_classes == 3
    assert sorted([*data.train_targets, *data.test_targets]) == [0, 0, 1, 2]
    assert data.input_shape == (3, 8, 8)


@pytest.mark.parametrize("split", [True, False])
def test_imagefolder(tmp_path: Path, split: bool) -> None:
    """Subfolders are classes, with or without folders for the splits above them."""
    for part, kind in itertools.product(("train", "test"), ("cat", "dog")):
        folder = tmp_path / "data" / (part if split else "") / kind
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            level = 200 if kind == "dog" else 100
            Image.new("L", (8, 6), level).save(folder / f"{part}{i}.png")
    data = load_data(config("imagefolder", path=tmp_path / "data"))
    assert data.input_shape == (1, 6, 8)
    assert data.num_classes == 2
    assert len(data.train_targets) == (8 if split else 12)
    assert_array_equal(data.train_inputs[:, 0, 0, 0], 100 + 100 * data.train_targets)
    assert_array_equal(data.test_inputs[:, 0, 0, 0], 100 + 100 * data.test_targets)


def test_every_mode_is_converted(tmp_path: Path) -> None:
    """One colour image makes all of them RGB; 16 bits are scaled, not clipped."""
    grey = Image.new("L", (4, 4), 100)
    deep = Image.fromarray(np.full((4, 4), 100 << 8, np.uint16))
    palette = Image.new("RGB", (4, 4), (1, 2, 3)).quantize()
    images = [grey, deep, palette, grey.convert("RGBA"), grey.convert("LA")]
    for i, image in enumerate(images):
        (tmp_path / "data" / "train" / "x").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / "train" / "x" / f"{i}.png")
    (tmp_path / "data" / "test" / "x").mkdir(parents=True)
    grey.convert("CMYK").save(tmp_path / "data" / "test" / "x" / "0.tif")
    data = load_data(config("imagefolder", path=tmp_path / "data"))
    assert_array_equal(
        data.train_inputs[:, :, 0, 0],
        [[100] * 3, [100] * 3, [1, 2, 3], [100] * 3, [100] * 3],
    )
    assert_array_equal(data.test_inputs[:, :, 0, 0], [[100] * 3])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_a_pixel_are_refused(dtype: Any, tmp_path: Path) -> None:
    """Whether they are meant to be of 255 or of 1, they do not say."""
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(np.ones((8, 8), dtype)).save(folder / f"{i}.tif")
    with pytest.raises(ConfigError, match="32 bits a pixel, where 8 or 16 are"):
        load_data(config("imagefolder", path=tmp_path / "data"))


def test_a_folders_name_is_no_pattern(tmp_path: Path) -> None:
    """Else another one whose name fits it would be read as well."""
    for name in ("a*[1]", "ab1"):
        for i in range(5):
            file = tmp_path / name / "x" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i).save(file)
        images = (datasets.Image(), random_images(4))
        label = (datasets.ClassLabel(num_classes=2), [0, 1, 0, 1])
        write_parquet(tmp_path / name / "train.parquet", image=images, label=label)
    for source, rows in (("parquet", 4), ("imagefolder", 5)):
        name = "mnist" if source == "parquet" else source
        data = load_data(config(name, path=tmp_path / "a*[1]"))
        assert len(data.train_targets) + len(data.test_targets) == rows


def test_files_that_call_their_classes_otherwise_are_refused(tmp_path: Path) -> None:
    """The library would take the first one's names for all."""
    for name, classes in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        images = (datasets.Image(), random_images(4))
        label = (datasets.ClassLabel(names=classes), [0, 1, 0, 1])
        write_parquet(tmp_path / f"{name}.parquet", image=images, label=label)
    with pytest.raises(ConfigError, match="the same classes .* unlike in test.parquet"):
        load_data(config("mnist", path=tmp_path))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    """A link to nowhere, what waits for whoever writes to it, and a folder."""
    cfg = texts(tmp_path / "data")
    odd = tmp_path / "data" / "train-x.txt"
    odd.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="without train-x.txt, which is no file"):
        load_data(cfg)
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(ConfigError, match="without train-x.txt, which is no file"):
        load_data(cfg)
    odd.unlink()
    odd.mkdir()
    with pytest.raises(ConfigError, match="readable texts, unlike train-x.txt"):
        load_data(cfg)


def test_image_size_makes_unequal_images_square(tmp_path: Path) -> None:
    """Without it, images of different sizes are refused with the key to set."""
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    for side in (8, 12, 10):
        Image.new("RGB", (side, 8), (side, 0, 0)).save(folder / f"{side}.png")
    with pytest.raises(
        ConfigError, match="dataset.image_size=null: .* 8x8, 10x8, 12x8"
    ):
        load_data(config("imagefolder", path=tmp_path / "data"))
    data = load_data(config("imagefolder", path=tmp_path / "data", image_size=16))
    assert data.input_shape == (3, 16, 16)
    reds = [*data.train_inputs[:, 0, 5, 5], *data.test_inputs[:, 0, 5, 5]]
    assert sorted(reds) == [8, 10, 12]


def test_a_constant_channel_has_a_standard_deviation_of_one(tmp_path: Path) -> None:
    """Normalising must not divide by zero, nor by rounding noise."""
    folder = tmp_path / "data" / "x"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (4, 4), (250, 77, 0)).save(folder / f"{i}.png")
    data = load_data(config("imagefolder", path=tmp_path / "data", test_fraction=0.5))
    assert data.std is not None
    assert_array_equal(data.std, np.ones((3, 1, 1)))
    assert data.std.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mnist", {"path": "/no/such"}, "dataset.path=/no/such: must be an existing f"),
        ("mnist", {"path": "."}, "dataset.path=.*: must be .* with train.parquet"),
        ("mnist", {}, "dataset.path=null: must be .* ylecun/mnist could not be loaded"),
        ("emnist", {}, "dataset.path=null: must be an existing folder with train.par"),
        ("parquet", {}, "dataset.path=null: must be an existing folder with train.pa"),
        ("imagefolder", {}, "dataset.path=null: must be .* one subfolder of images a"),
        ("imagefolder", {"path": "."}, "dataset.path=.*: must be .* subfolder of ima"),
        ("digits", {"path": "x"}, "dataset.path=x: must be null, as digits is built"),
        ("digits", {"source": "web"}, "dataset.source=web: must be one of digits, hub"),
        ("digits", {"image": "pic"}, "dataset.image=pic: must be one of .* image, lab"),
        ("digits", {"image": "label"}, "dataset.image=label: .* readable image"),
        ("digits", {"label": "y"}, "dataset.label=y: must be one of the columns image"),
        ("digits", {"natural_id": "w"}, "dataset.natural_id=w: must be one of the co"),
        ("digits", {"image_size": 0}, "dataset.image_size=0: must be a whole number"),
        ("digits", {"test_fraction": 1.0}, "dataset.test_fraction=1.0: must be a num"),
        ("speech_commands", {}, "dataset.path=null: must be an existing folder with t"),
        (
            "speech_commands",
            {"path": ".", "features": 0},
            "dataset.features=0: must be .* 1 to 40",
        ),
        (
            "speech_commands",
            {"path": ".", "features": 41},
            "dataset.features=41: must be .* to 40",
        ),
        ("speech_commands", {"augment": True}, "dataset.augment=True: must be false, "),
        (
            "wikitext-2",
            {},
            "dataset.path=null: must be an existing folder with train.t",
        ),
        ("wikitext-2", {"path": "."}, "dataset.path=.*: must be .* and test.txt$"),
        (
            "wikitext-2",
            {"path": ".", "vocabulary": 0},
            "dataset.vocabulary=0: must be a whole numb",
        ),
        (
            "wikitext-2",
            {"path": ".", "sequence_length": None},
            "dataset.sequence_length=None: must",
        ),
        ("wikitext-2", {"augment": True}, "dataset.augment=True: must be false, as on"),
    ],
)
def test_wrong_configurations_name_the_key_and_the_mend(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    """Every mistake ends in one line, and leaves no cache behind."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        load_data(config(name, cache_dir=tmp_path / "cache", **changes))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_ambiguous_columns_are_asked_for(tmp_path: Path) -> None:
    """With two label columns there is no only one."""
    write_parquet(
        tmp_path / "data" / "train.parquet",
        img=(datasets.Image(), random_images(3)),
        a=(datasets.ClassLabel(num_classes=3), [0, 1, 2]),
        b=(datasets.ClassLabel(num_classes=3), [0, 1, -1]),
    )
    cfg = config("parquet", path=tmp_path / "data")
    with pytest.raises(ConfigError, match="^dataset.label=null: .* columns img, a, b$"):
        load_data(cfg)
    with pytest.raises(ConfigError, match="^dataset.label=b: .* without unlabelled"):
        load_data(config("parquet", path=tmp_path / "data", label="b"))


def test_broken_files_are_the_users_to_mend(tmp_path: Path) -> None:
    """Neither a bad parquet file nor a bad image ends in a stack of library errors."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"not parquet")
    match = (
        "^dataset.path=.*/data: must be an existing folder .*, which can be read .*t"
    )
    with pytest.raises(ConfigError, match=match):
        load_data(config("mnist", path=tmp_path / "data"))
    (tmp_path / "images" / "x").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / "x" / f"{i}.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match="^dataset.image=image: .* readable image"):
        load_data(config("imagefolder", path=tmp_path / "images"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file in the cache folder's place is reported as such."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^dataset.cache_dir=.*/file: must be a fold"):
        load_data(config("digits", cache_dir=tmp_path / "file"))


# ------------------------------------------------------------------ hostile sources


IMAGES = [png(image) for image in random_images(6)]
LABELLED = (datasets.ClassLabel(num_classes=3), [0, 1, 2, 0, 1, 2])


def cells(contents: list[Any], path: Any = None) -> tuple[Any, list[Any]]:
    """Return a column of encoded files as the hub has them; None is an empty cell."""
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return kind, [c if c is None else {"bytes": c, "path": path} for c in contents]


def bomb(side: int) -> bytes:
    """Return a PNG of some hundred bytes that declares so many pixels a side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + pixels + chunk(b"IEND", b"")


def eps() -> bytes:
    """Return a program in PostScript that draws an image."""
    buffer = BytesIO()
    random_images(1)[0].save(buffer, "eps")
    return buffer.getvalue()


def declare(file: Path, classes: int) -> None:
    """Let a table's schema say that its labels are of so many classes."""
    label = {"names": [str(i) for i in range(classes)], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    schema = json.dumps({"info": {"features": features}}).encode()
    table = pq.ParquetFile(file).read()
    pq.write_table(table.replace_schema_metadata({b"huggingface": schema}), file)


def refusal(cfg: DictConfig, cache: Path) -> str:
    """Return the one line by which a source is refused, which leaves no cache."""
    with pytest.raises(ConfigError) as caught:
        load_data(cfg)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        (IMAGES[5][:-40], "image file is truncated"),
        (IMAGES[5][:20], "Error"),
        (b"no image", "cannot identify image"),
        (b"", "no bytes"),
        (None, "an empty cell"),
        (bomb(13_000), "decompression bomb"),
        (bomb(60_000), "decompression bomb"),
        (eps(), "EPS is no image"),
    ],
    ids=["cut", "head", "other", "empty", "null", "bomb", "large-bomb", "program"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_cannot_be_read_is_named(
    tmp_path: Path, cache: Path, split: str, spoilt: bytes | None, why: str
) -> None:
    """By data set, split, column and row."""
    for part in ("train", "test"):
        contents = [*IMAGES[:5], spoilt] if part == split else IMAGES
        file = tmp_path / "data" / f"{part}.parquet"
        write_parquet(file, image=cells(contents, "6.png"), label=LABELLED)
    cfg = config("parquet", path=tmp_path / "data", image="image", image_size=8)
    line = refusal(cfg, cache)
    assert line.startswith("dataset.image=image: must be a column of readable image")
    assert f"row 5 of {tmp_path / 'data'}'s {split} split" in line and why in line


def test_a_row_is_named_as_in_its_source(tmp_path: Path, cache: Path) -> None:
    """Though a test set is held out, so that rows change their places."""
    for spoilt in range(6):
        contents: list[Any] = [*IMAGES]
        contents[spoilt] = b"spoilt"
        write_parquet(
            tmp_path / "data" / "train.parquet", image=cells(contents), label=LABELLED
        )
        cfg = config("parquet", path=tmp_path / "data", image="image")
        assert f" row {spoilt} of " in refusal(cfg, cache)


def test_a_spoilt_file_in_a_folder_is_named(tmp_path: Path, cache: Path) -> None:
    """By its path."""
    for i, content in enumerate([*IMAGES[:5], IMAGES[5][:-40]]):
        file = tmp_path / "data" / "cat" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    cfg = config("imagefolder", path=tmp_path / "data")
    assert f"{file}: OSError: image file is truncated" in refusal(cfg, cache)


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_image_is_refused_or_read(
    tmp_path: Path, place: float, flip: int
) -> None:
    """No byte of it ends in a stack of library errors."""
    spoilt = bytearray(IMAGES[5])
    spoilt[int(place * len(spoilt))] ^= flip
    write_parquet(
        tmp_path / "data" / "train.parquet",
        image=cells([*IMAGES[:5], bytes(spoilt)]),
        label=LABELLED,
    )
    module._load.cache_clear()
    try:
        data = load_data(config("parquet", path=tmp_path / "data", image="image"))
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert data.input_shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["image", "string", "audio"])
def test_a_table_reads_no_file_of_this_machine(
    tmp_path: Path, cache: Path, kind: str
) -> None:
    """A path in a cell could name any of them; only bytes count."""
    secret = tmp_path / "data" / "secret.png"
    secret.parent.mkdir()
    secret.write_bytes(IMAGES[0])
    (tmp_path / "data" / "secret.flac").write_bytes(recording(noise(1)))
    names = [str(secret)] * 6
    if kind == "audio":
        cfg = spoken(tmp_path / "data", [None] * 6, str(secret.with_suffix(".flac")))
    else:
        cfg = config("parquet", path=tmp_path / "data", image="image")
        column = cells([b""] * 6, str(secret))
        if kind == "string":
            column = (datasets.Value("string"), names)
        file = tmp_path / "data" / "train.parquet"
        write_parquet(file, image=column, label=LABELLED)
    assert "only a path, no bytes" in refusal(cfg, cache)


def test_a_folders_list_names_no_file_outside(tmp_path: Path, cache: Path) -> None:
    """Though the library reads lists of files that lie beside them."""
    (tmp_path / "secret.png").write_bytes(IMAGES[0])
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for i, content in enumerate(IMAGES):
        (tmp_path / "data" / "cat" / f"{i}.png").write_bytes(content)
    cfg = config("imagefolder", path=tmp_path / "data", label="label")
    listed = tmp_path / "data" / "metadata.csv"
    names = [f"cat/{i}.png" for i in range(6)]
    listed.write_text("\n".join(["file_name,label", *(f"{n},1" for n in names)]))
    assert load_data(cfg).input_shape == (3, 8, 8)
    names[3] = "../secret.png"
    listed.write_text("\n".join(["file_name,label", *(f"{n},1" for n in names)]))
    module._load.cache_clear()
    for folder in cache.iterdir():
        shutil.rmtree(folder)
    assert "only a path, no bytes" in refusal(cfg, cache)


NAN = float("nan")
INTEGER, FLOAT, STRING = (datasets.Value(v) for v in ("int64", "float64", "string"))


@pytest.mark.parametrize(
    ("key", "column", "line"),
    [
        ("label", (LABELLED[0], [0, 1, 2, 0, 1, None]), "numbers or names, .*an empty"),
        ("label", (LABELLED[0], [0, 1, 2, 0, 1, -1]), "0 to 2, .*row 5 .*class -1"),
        ("label", (INTEGER, [0, 1, 2, 0, 1, None]), "numbers or names, .*an empty"),
        ("label", (FLOAT, [0, 1, 2, 0, 1, NAN]), "numbers or names, .*row 5 .*an empt"),
        ("label", (FLOAT, [0, 1, 2, 0, 1, None]), "numbers or names, .*row 5 .*an emp"),
        ("label", (STRING, [*"abcab", None]), "numbers or names, .*row 5 .*an empty"),
        ("label", (datasets.Value("binary"), IMAGES), "numbers or names$"),
        ("label", (datasets.Image(), random_images(6)), "numbers or names$"),
        ("label", cells(IMAGES), "numbers or names$"),
        ("label", (datasets.List(INTEGER), [[1]] * 6), "numbers or names$"),
        ("natural_id", (STRING, [*"abcab", None]), "numbers or names, .*an empty cell"),
        ("natural_id", (FLOAT, [0, 1, 2, 0, 1, NAN]), "numbers or names, .*an empty"),
        ("natural_id", (datasets.Image(), random_images(6)), "numbers or names$"),
    ],
)
def test_labels_and_ids_are_numbers_or_names(
    tmp_path: Path, cache: Path, key: str, column: tuple[Any, list[Any]], line: str
) -> None:
    """Nothing that is missing counts as a class of its own, and no image as a name."""
    columns = {"image": cells(IMAGES), "label": LABELLED, key: column}
    write_parquet(tmp_path / "data" / "train.parquet", **columns)
    cfg = config("parquet", path=tmp_path / "data", image="image", **{"label": "label"})
    cfg[key] = key
    assert re.search(f"^dataset.{key}={key}: .*{line}", refusal(cfg, cache))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_outside_the_declared_classes_is_named(
    tmp_path: Path, cache: Path, split: str
) -> None:
    """Else no logit would be its own, and the evaluation end the run."""
    for part in ("train", "test"):
        labels = [0, 1, 2, 3, 1, 2] if part == split else [0, 1, 2, 0, 1, 2]
        file = tmp_path / "data" / f"{part}.parquet"
        write_parquet(file, image=cells(IMAGES), label=(INTEGER, labels))
        declare(file, 3)
    line = refusal(config("parquet", path=tmp_path / "data"), cache)
    assert line.startswith("dataset.label=label: must be a column of classes from 0 to")
    assert f"row 3 of {tmp_path / 'data'}'s {split} split (class 3)" in line


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_are_refused(tmp_path: Path, cache: Path, rows: int) -> None:
    """A table needs at least one to train on, and one to test on."""
    file = tmp_path / "data" / "train.parquet"
    label = (LABELLED[0], LABELLED[1][:rows])
    write_parquet(file, image=cells(IMAGES[:rows]), label=label)
    line = refusal(config("parquet", path=tmp_path / "data", image="image"), cache)
    assert line.startswith(("dataset.path=", "dataset.test_fraction=0.2: must be a sh"))


def test_what_no_disk_can_hold_is_not_begun(tmp_path: Path) -> None:
    """A memory map beyond the disk's end would kill the process."""
    file = tmp_path / "train_inputs.npy"
    with pytest.raises(ConfigError, match="^dataset.cache_dir=.*: must be on a disk w"):
        decoding._create(file, np.uint8, (10**9, 3, 1024, 1024))
    assert not file.exists()
    assert decoding._create(file, np.uint8, (2, 3)).shape == (2, 3)


def test_a_columns_name_forges_no_line(tmp_path: Path, cache: Path) -> None:
    """Of a log, or of what a terminal shows."""
    name = "label\nINFO: all is well\x1b[2J"
    file = tmp_path / "data" / "train.parquet"
    write_parquet(file, image=cells(IMAGES), **{name: LABELLED, "other": LABELLED})
    line = refusal(config("parquet", path=tmp_path / "data"), cache)
    assert line.endswith(r"columns image, label\nINFO: all is well\x1b[2J, other")


# ----------------------------------------------------------------------------- cache


def test_a_second_load_decodes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the same process nor another one decodes again."""
    first = load_data(config("digits"))
    assert len(list(cache.iterdir())) == 1
    forbid_decoding(monkeypatch)
    assert load_data(config("digits")) is first
    module._load.cache_clear()
    again = load_data(config("digits"))
    assert again is not first
    assert_array_equal(again.train_inputs, first.train_inputs)
    assert_array_equal(again.test_targets, first.test_targets)


def test_whatever_determines_the_arrays_renews_them(tmp_path: Path) -> None:
    """A changed setting or a rewritten file is another cache."""
    assert load_data(config("digits", image_size=32)).input_shape == (1, 32, 32)
    assert load_data(config("digits")).input_shape == (1, 28, 28)
    for rows in (5, 10):
        write_parquet(
            tmp_path / "data" / "train.parquet",
            img=(datasets.Image(), random_images(rows)),
            label=(datasets.ClassLabel(num_classes=2), [0] * rows),
        )
        module._load.cache_clear()
        data = load_data(config("parquet", path=tmp_path / "data"))
        assert len(data.train_targets) + len(data.test_targets) == rows


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage"])
@pytest.mark.parametrize("name", ["train_inputs", "test_targets"])
def test_a_damaged_cache_is_rebuilt(cache: Path, name: str, damage: str) -> None:
    """What cannot be opened is decoded once more, and replaced."""
    expected = np.array(load_data(config("digits")).train_inputs)
    file = next(cache.iterdir()) / f"{name}.npy"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        spoilt = {"empty": b"", "truncated": content[:-1], "garbage": b"x" * 999}
        file.write_bytes(spoilt[damage])
    module._load.cache_clear()
    assert_array_equal(load_data(config("digits")).train_inputs, expected)
    assert file.read_bytes() == content
    assert len(list(cache.iterdir())) == 1


class Unpickled:
    """What leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        """Let unpickling create a file."""
        return Path.touch, (self.trace,)


def spoil(file: Path, how: str) -> None:
    """Put something else in an array's place, or in one of an archive's."""
    values = np.load(file)
    if how == "archive":
        with file.open("wb") as opened:
            np.savez(opened, values)
    elif how == "objects":
        np.save(file, np.array([Unpickled(file.parent / "trace")], dtype=object))
    elif how == "pickle":
        file.write_bytes(pickle.dumps(Unpickled(file.parent / "trace")))
    elif how == "claim":  # of exabytes
        content = file.read_bytes()
        shape = str(values.shape).encode()
        longer = content[:128].replace(shape, b"(%d,)" % 10**17)[:127]
        file.write_bytes(longer.ljust(127) + b"\n" + content[128:])
    else:
        np.save(
            file,
            {
                "dtype": lambda: values.astype(np.float64),
                "shape": lambda: values[..., None],
                "short": lambda: values[:-1],
                "large": lambda: np.where(values == values.max(), 99, values),
                "negative": lambda: np.where(values == values.max(), -1, values),
                "nan": lambda: np.full_like(values, np.nan),
                "zero": lambda: np.zeros_like(values),
                "scalar": lambda: values.ravel()[0],
            }[how](),
        )


DAMAGES = [
    *itertools.product(
        ("train_inputs", "train_targets", "test_inputs", "test_targets", "strata"),
        ("archive", "objects", "pickle", "claim", "dtype", "shape", "short", "scalar"),
    ),
    *itertools.product(("train_targets", "test_targets"), ("large", "negative")),
    *itertools.product(("mean", "std"), ("archive", "pickle", "dtype", "shape", "nan")),
    *itertools.product(("num_classes",), ("pickle", "dtype", "zero", "archive")),
    *(("std", "zero"), ("natural_ids", "pickle"), ("natural_ids", "archive")),
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_cache_that_no_decoding_leaves_is_rebuilt(
    cache: Path, tmp_path: Path, name: str, how: str
) -> None:
    """Wrong types and shapes, targets that are no class, files of another kind."""
    write_parquet(
        tmp_path / "data" / "train.parquet", image=cells(IMAGES), label=LABELLED
    )
    cfg = config("parquet", path=tmp_path / "data", image="image")
    load_data(cfg)
    (folder,) = cache.iterdir()
    content = (folder / f"{name}.npy").read_bytes()
    spoil(folder / f"{name}.npy", how)
    assert (folder / f"{name}.npy").read_bytes() != content
    module._load.cache_clear()
    data = load_data(cfg)
    assert (folder / f"{name}.npy").read_bytes() == content
    assert list(cache.iterdir()) == [folder]
    assert not (folder / "trace").exists()
    assert data.num_classes == 3


@pytest.mark.parametrize("name", ["train_inputs", "train_targets", "test_inputs"])
@pytest.mark.parametrize("value", [-1, 14])
def test_a_cached_word_that_is_none_is_noticed(
    cache: Path, tmp_path: Path, name: str, value: int
) -> None:
    """It would be looked up beyond the embedding's end."""
    cfg = texts(tmp_path / "data")
    assert load_data(cfg).num_classes == 14
    file = next(cache.iterdir()) / f"{name}.npy"
    content, tokens = file.read_bytes(), np.load(file)
    tokens[0, 0] = value
    np.save(file, tokens)
    module._load.cache_clear()
    load_data(cfg)
    assert file.read_bytes() == content


def test_something_else_in_the_caches_place_is_replaced(cache: Path) -> None:
    """A file, or a link to nowhere, where the folder should be."""
    load_data(config("digits"))
    (folder,) = cache.iterdir()
    shutil.rmtree(folder)
    for other in (folder.touch, lambda: folder.symlink_to("nowhere")):
        other()
        module._load.cache_clear()
        assert load_data(config("digits")).num_classes == 10
        assert list(cache.iterdir()) == [folder] and not folder.is_symlink()
        shutil.rmtree(folder)


def test_a_kill_while_decoding_leaves_no_half_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files get their final place only once all of them are written."""
    seen: list[str] = []

    def die(_: Path) -> None:
        seen.extend(folder.name for folder in cache.iterdir())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_mean_and_std", die)
        with pytest.raises(KeyboardInterrupt):
            load_data(config("digits"))
    name = seen.pop()
    assert not seen
    assert name.startswith("tmp-")
    (cache / name / "fresh").mkdir(parents=True)  # as a kill without clean-up leaves it
    assert len(load_data(config("digits")).train_targets) == 1437


def test_a_lost_race_takes_the_winners_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that finishes first is no error, and nothing is left over."""
    decode = decoding.decode

    def overtaken(*args: Any) -> None:
        monkeypatch.setattr(decoding, "decode", decode)
        load_data(config("digits"))  # the other process, start to end
        decode(*args)

    monkeypatch.setattr(decoding, "decode", overtaken)
    assert len(load_data(config("digits")).train_targets) == 1437
    assert len(list(cache.iterdir())) == 1


def test_concurrent_processes_agree(cache: Path) -> None:
    """Processes that start at once all end up with the same whole cache."""
    program = (
        "from omegaconf import OmegaConf\n"
        "from gwpf_baseline.dataset import load_data\n"
        "data = load_data(OmegaConf.load('conf/dataset/digits.yaml'))\n"
        "print(len(data.train_inputs), int(data.train_inputs[:].sum(dtype='int64')))"
    )
    command = [sys.executable, "-c", program]
    with ThreadPoolExecutor() as pool:
        outputs = list(
            pool.map(
                lambda _: subprocess.check_output(command, cwd=REPOSITORY), range(2)
            )
        )
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(b"1437 ")
    assert len(list(cache.iterdir())) == 1


def test_who_finds_the_cache_waits_for_no_slow_import(cache: Path) -> None:
    """A worker that maps data and partition loads no library that only makes them."""
    program = (
        "import sys\n"
        "from omegaconf import OmegaConf\n"
        "from gwpf_baseline.dataset import load_data, partition_indices\n"
        "data = load_data(OmegaConf.load('conf/dataset/digits.yaml'))\n"
        "partition_indices(data, OmegaConf.load('conf/partition/iid.yaml'), 3, 1)\n"
        "slow = {'datasets', 'flwr_datasets', 'librosa', 'sklearn'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    partition_indices(load_data(config("digits")), scheme("iid"), 3, seed=1)
    assert len(list(cache.glob("*/partition-*.npz"))) == 1
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, cwd=REPOSITORY) == b"[]\n"


# ---------------------------------------------------------------------- partitioning


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
PARTITIONS = [
    scheme("iid"),
    scheme("dirichlet", alpha=0.3),
    scheme("pathological"),
    scheme("disjoint"),
    scheme("natural_id"),
]


@pytest.mark.parametrize("cfg", PARTITIONS, ids=lambda cfg: cfg.name)
def test_partitions_are_disjoint_complete_and_never_empty(cfg: DictConfig) -> None:
    """With clients enough for all classes and ids, every example has one owner."""
    parts = partition_indices(labelled(LABELS, LABELS // 2), cfg, 5, seed=1)
    if cfg.name == "pathological":
        parts = partition_indices(labelled(LABELS), cfg, 12, seed=1)
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


@pytest.mark.parametrize("cfg", PARTITIONS, ids=lambda cfg: cfg.name)
def test_partitions_follow_from_the_seed(cfg: DictConfig) -> None:
    """Two processes agree; another seed divides otherwise, except by natural id."""

    def parts(seed: int) -> list[list[int]]:
        module._partition.cache_clear()
        data = labelled(LABELS, LABELS)
        return [p.tolist() for p in partition_indices(data, cfg, 10, seed)]

    assert parts(1) == parts(1)
    assert (parts(1) == parts(2)) == (cfg.name == "natural_id")


def test_partitions_are_computed_once_and_read_only() -> None:
    """A client asks every round, and must not change what the others get."""
    data = labelled(LABELS)
    first = partition_indices(data, scheme("iid"), 3, 1)
    assert partition_indices(data, scheme("iid"), 3, 1)[0] is first[0]
    with pytest.raises(ValueError, match="read-only"):
        first[0][0] = 1
    first.clear()
    assert len(partition_indices(data, scheme("iid"), 3, 1)) == 3


def test_a_cached_partition_is_not_computed_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process reads it from beside the data; a damaged file is rebuilt."""
    data = load_data(config("digits"))

    def parts() -> list[list[int]]:
        module._partition.cache_clear()
        cfg = scheme("dirichlet")
        return [part.tolist() for part in partition_indices(data, cfg, 4, seed=1)]

    computed = parts()
    (file,) = cache.glob("*/partition-*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(partitioning, "divide", lambda *_: pytest.fail("divided again"))
        assert parts() == computed
    file.write_bytes(file.read_bytes()[:100])
    assert parts() == computed
    assert parts() == computed


@pytest.mark.parametrize(
    "change",
    [
        {"rows": np.arange(1437) + 1},
        {"rows": np.arange(1437) - 1},
        {"rows": np.zeros(1437, np.int64)},
        {"rows": np.arange(1437)[::-1]},
        {"rows": np.arange(1437.0)},
        {"rows": np.arange(1437)[:, None]},
        {"rows": np.arange(0)},
        {"bounds": np.array([3, 3, 9])},
        {"bounds": np.array([9, 6, 3])},
        {"bounds": np.array([3, 9, 1437])},
        {"bounds": np.array([3, 9])},
        {"bounds": np.array([3.0, 6.0, 9.0])},
        {"rows": None},
        {"rows": "objects"},
        {},
    ],
    ids=str,
)
def test_a_partition_file_that_divides_nothing_is_rebuilt(
    cache: Path, change: dict[str, Any]
) -> None:
    """Rows that no example has, or that two clients do; a client that has none."""
    data = load_data(config("digits"))
    expected = [p.tolist() for p in partition_indices(data, scheme("iid"), 4, seed=1)]
    (file,) = cache.glob("*/partition-*.npz")
    trace = cache / "trace"
    arrays = {"rows": np.arange(1437), "bounds": np.array([3, 6, 9]), **change}
    if arrays["rows"] is None:
        del arrays["rows"]
    elif isinstance(arrays["rows"], str):
        arrays["rows"] = np.array([Unpickled(trace)] * 1437, dtype=object)
    with file.open("wb") as opened:
        if change:
            np.savez(opened, **arrays)
        else:
            np.save(opened, arrays["rows"])
    module._partition.cache_clear()
    parts = partition_indices(data, scheme("iid"), 4, seed=1)
    assert [part.tolist() for part in parts] == expected
    assert not trace.exists()
    with np.load(file) as saved:
        assert_array_equal(saved["rows"], np.concatenate(parts))
    assert not list(file.parent.glob("tmp-*"))


def test_iid_parts_are_equal_and_mixed() -> None:
    """Sorted labels do not lead to clients of one class."""
    parts = partition_indices(labelled(np.sort(LABELS)), scheme("iid"), 7, 1)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(set(np.sort(LABELS)[part])) == 10 for part in parts)


def test_alpha_governs_the_skew() -> None:
    """A large alpha gives every client all classes, a small one hardly more than
    one."""

    def classes(alpha: float) -> float:
        cfg = scheme("dirichlet", alpha=alpha)
        parts = partition_indices(labelled(LABELS), cfg, 5, seed=1)
        return float(np.mean([len(set(LABELS[part])) for part in parts]))

    assert classes(1000) == 10
    assert classes(0.01) < 4 < classes(1)


@settings(max_examples=25)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    alpha=st.floats(1e-300, 1e6),
    seed=st.integers(0, 2**63 - 1),
    draw=st.data(),
)
def test_dirichlet_always_finds_a_partition(
    labels: list[int], alpha: float, seed: int, draw: st.DataObject
) -> None:
    """Whatever the alpha, as many clients as examples can be served."""
    num_clients = draw.draw(st.integers(1, len(labels)))
    cfg = scheme("dirichlet", alpha=alpha)
    parts = partition_indices(labelled(labels), cfg, num_clients, seed)
    assert len(parts) == num_clients
    assert all(len(part) for part in parts)
    assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_pathological_clients_have_so_many_classes(count: int) -> None:
    """Exactly so many each, and nobody owns an example twice."""
    cfg = scheme("pathological", classes_per_client=count)
    parts = partition_indices(labelled(LABELS), cfg, 8, seed=1)
    assert [len(set(LABELS[part])) for part in parts] == [count] * 8
    rows = np.concatenate(parts)
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("clients", "count"), [(5, 2), (2, 5), (10, 1), (8, 3), (3, 10)]
)
def test_classes_are_dealt_out_in_turn(clients: int, count: int) -> None:
    """So many to each client; none goes unused, and as many have each, but for one."""
    cfg = scheme("disjoint", classes_per_client=count)
    parts = partition_indices(labelled(LABELS), cfg, clients, seed=1)
    hands = [set(LABELS[part].tolist()) for part in parts]
    assert [len(hand) for hand in hands] == [count] * clients
    owners = [sum(label in hand for hand in hands) for label in range(10)]
    assert min(owners) >= 1 and max(owners) - min(owners) <= 1
    for label in range(10):
        shares = [int((LABELS[part] == label).sum()) for part in parts]
        shares = [share for share in shares if share]
        assert sum(shares) == 60 and max(shares) - min(shares) <= 1


def test_clients_that_a_class_has_nothing_left_for_get_of_another() -> None:
    """There are more owners of each class than examples; nobody has none."""
    labels, cfg = [0, 0, 0, 1, 1, 1], scheme("disjoint", classes_per_client=2)
    parts = partition_indices(labelled(labels), cfg, 5, seed=1)
    assert all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(6))


def test_with_as_many_clients_as_ids_client_i_is_the_ith(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever the seed; silently."""
    data = labelled([0, 1, 0, 1, 0, 1], [7, 3, 3, 9, 7, 7])
    for seed in (1, 2):
        parts = partition_indices(data, scheme("natural_id"), 3, seed)
        assert [part.tolist() for part in parts] == [[1, 2], [0, 4, 5], [3]]
    assert capfd.readouterr() == ("", "")


def test_surplus_ids_are_dealt_out_by_the_seed() -> None:
    """None goes unused, none is divided, and hands differ by one at most."""
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(11), 5))
    dealt = []
    for seed in (1, 2):
        parts = partition_indices(labelled(ids, ids), scheme("natural_id"), 4, seed)
        hands = [set(ids[part].tolist()) for part in parts]
        assert sorted(map(len, hands)) == [2, 3, 3, 3]
        assert set.union(*hands) == set(range(11))
        assert sum(map(len, parts)) == len(ids)
        assert [min(hand) for hand in hands] == sorted(min(hand) for hand in hands)
        dealt.append(hands)
    assert dealt[0] != dealt[1]


@pytest.mark.parametrize(
    ("cfg", "num_clients", "message"),
    [
        (
            {"name": "sorted"},
            2,
            "partition=sorted: must be one of iid, dirichlet, path",
        ),
        (scheme("iid"), 0, "num_clients=0: must be a whole number from 1 to 600"),
        (scheme("iid"), 601, "num_clients=601: must be a whole number from 1 to 600"),
        (scheme("dirichlet", alpha=0), 2, "partition.alpha=0: must be a number > 0"),
        (scheme("dirichlet", alpha="a"), 2, "partition.alpha=a: must be a number > 0"),
        (
            scheme("dirichlet", alpha=float("nan")),
            2,
            "partition.alpha=nan: must be a number > 0",
        ),
        (
            scheme("pathological", classes_per_client=11),
            2,
            "partition.classes_per_client=11: must be a whole number from 1 to 10",
        ),
        (
            scheme("pathological", classes_per_client=0),
            2,
            "partition.classes_per_client=0: must be a whole number from 1 to 10",
        ),
        (
            scheme("disjoint", classes_per_client=1),
            4,
            "partition.classes_per_client=1: must be a whole number from 3 to 10, the",
        ),
        (
            scheme("pathological", classes_per_client=10),
            61,
            "num_clients=61: must be smaller for this partition: Label: 0 is needed",
        ),
        (scheme("natural_id"), 11, "num_clients=11: must be at most 10, the number of"),
    ],
)
def test_impossible_partitions_are_refused(
    cfg: Any, num_clients: int, message: str
) -> None:
    """One line names the key and what it may be."""
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        partition_indices(
            labelled(LABELS, LABELS), OmegaConf.create(cfg), num_clients, seed=1
        )
    assert "\n" not in str(caught.value)


def test_natural_partitions_need_ids() -> None:
    """A dataset without ids points to those that have them."""
    with pytest.raises(ConfigError, match="^partition=natural_id: must be .* femnist"):
        partition_indices(labelled(LABELS), scheme("natural_id"), 2, seed=1)


# ------------------------------------------------------------------- feeding a model


def statistics(mean: Any, std: Any) -> TaskData:
    """Return a dataset of which only mean and std matter, a number for each channel."""
    empty, labels = np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, np.int64)
    if mean is not None:
        mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) for v in (mean, std))
    return TaskData(empty, labels, empty, labels, 1, mean, std, labels)


def test_prepare_normalises_each_channel() -> None:
    """The training set itself comes out with mean 0 and standard deviation 1."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 2, 7, 5), dtype=np.uint8)
    scaled = pixels / 255
    axes = (0, 2, 3)
    data = statistics(list(scaled.mean(axes)), list(scaled.std(axes)))
    images = torch.from_numpy(pixels)
    prepared = prepare(images, data)
    assert prepared.dtype == torch.float32
    assert prepared.shape == images.shape
    assert_array_equal(images, pixels)
    torch.testing.assert_close(prepared.mean(axes), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        prepared.std(axes, correction=0), torch.ones(2), atol=1e-5, rtol=0
    )


def test_augmentation_equals_a_slow_reference() -> None:
    """Each image is padded with black, cropped at its own place, perhaps flipped."""
    images = torch.randint(0, 256, (64, 3, 9, 11), dtype=torch.uint8)
    data = statistics([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    augmented = prepare(images, data, True, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    tops, lefts = torch.randint(9, (2, 64, 1), generator=generator)
    flips = torch.rand((64, 1), generator=generator) < 0.5
    reference = torch.zeros_like(images)
    for i, (top, left, flip) in enumerate(zip(tops, lefts, flips, strict=True)):
        canvas = torch.zeros(3, 9 + 8, 11 + 8, dtype=torch.uint8)
        canvas[:, 4:13, 4:15] = images[i]
        crop = canvas[:, int(top) : int(top) + 9, int(left) : int(left) + 11]
        reference[i] = crop.flip(2) if flip else crop
    assert torch.equal(augmented, prepare(reference, data))
    # Every shift and both orientations occur.
    assert {int(t) for t in tops} == {int(t) for t in lefts} == set(range(9))
    assert 16 < int(flips.sum()) < 48


def test_augmentation_follows_its_generator_alone() -> None:
    """The same generator state gives the same images, and the global one rests."""
    images = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8)
    data = statistics([0.5], [0.5])
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    first, second = (prepare(images, data, True, generator) for _ in range(2))
    assert torch.equal(
        first, prepare(images, data, True, torch.Generator().manual_seed(1))
    )
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augmentation_is_the_same_on_a_gpu() -> None:
    """Only arithmetic moves to the device, the draws do not."""
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    data = statistics([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    on_cpu, on_gpu = (
        prepare(images.to(d), data, True, torch.Generator().manual_seed(1)).cpu()
        for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_cpu, on_gpu)


def test_prepare_normalises_float16_in_float32() -> None:
    """Features are not scaled as pixels are, and lose nothing to half precision."""
    features = np.random.default_rng(0).normal(100, 10, (4, 1, 5, 3)).astype(np.float16)
    mean = np.array([[[90, 100, 110]]], np.float32)
    std = mean / np.float32(10)
    data = replace(statistics([0], [1]), mean=mean, std=std)
    prepared = prepare(torch.from_numpy(features), data)
    assert prepared.dtype == torch.float32
    expected = (features.astype(np.float32) - mean) / std
    np.testing.assert_allclose(prepared, expected, rtol=1e-6, atol=1e-6)


def test_prepare_leaves_tokens_as_they_are() -> None:
    """Numbers of words have no mean."""
    tokens = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert prepare(tokens, statistics(None, None)) is tokens


# ------------------------------------------------------------------------- recordings


def recording(samples: np.ndarray, rate: int = 16_000, kind: str = "FLAC") -> bytes:
    """Return an encoded recording."""
    buffer = BytesIO()
    soundfile.write(buffer, samples, rate, format=kind)
    return buffer.getvalue()


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """Return noise at half the full loudness."""
    shape = (int(seconds * rate), channels)
    return np.random.default_rng(int(rate * seconds)).uniform(-0.5, 0.5, shape)


def mfcc(samples: np.ndarray, count: int = 20) -> np.ndarray:
    """Compute a second's features, ``(1, T, F)``, straight by librosa."""
    return librosa.feature.mfcc(
        y=samples.astype(np.float32),
        sr=16_000,
        n_mfcc=count,
        n_mels=40,
        n_fft=640,
        hop_length=320,
        center=False,
    ).T[None]


def spoken(
    folder: Path, recordings: Sequence[bytes | None], path: str | None = None
) -> DictConfig:
    """Write recordings as the hub has them; each is a word and a speaker of its own."""
    write_parquet(
        folder / "train.parquet",
        audio=(
            {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            [{"bytes": r, "path": path} for r in recordings],
        ),
        label=(datasets.Value("int64"), list(range(len(recordings)))),
        speaker_id=(
            datasets.Value("string"),
            [f"{i:08x}" for i in range(9, 99)][: len(recordings)],
        ),
    )
    (folder / "test.parquet").write_bytes((folder / "train.parquet").read_bytes())
    return config("speech_commands", path=folder)


def test_recordings_become_a_second_of_features(tmp_path: Path) -> None:
    """Longer ones are cut, shorter ones end in silence, channels are averaged."""
    second, long, short = noise(1), noise(1.4), noise(0.3)
    stereo = noise(1, channels=2)
    sounds = [second, long, short, stereo]
    cfg = spoken(tmp_path, [recording(s, kind="WAV") for s in sounds])
    data = load_data(cfg)
    assert data.input_shape == (1, 49, 20)
    assert data.train_inputs.dtype == np.float16
    assert isinstance(data.train_inputs, np.memmap)
    heard = [soundfile.read(BytesIO(recording(s, kind="WAV")))[0] for s in sounds]
    silence = np.zeros(16_000 - len(short))
    for row, samples in enumerate(
        [
            heard[0],
            heard[1][:16_000],
            np.concatenate([heard[2], silence]),
            heard[3].mean(axis=1),
        ]
    ):
        expected = mfcc(samples)
        np.testing.assert_allclose(
            data.train_inputs[row], expected, rtol=1e-3, atol=0.05
        )
    frames = data.train_inputs.astype(np.float64)
    assert data.mean is not None and data.std is not None
    np.testing.assert_allclose(data.mean, frames.mean((0, 2))[None], rtol=1e-5)
    np.testing.assert_allclose(data.std, frames.std((0, 2))[None], rtol=1e-5)
    assert data.natural_ids is not None
    assert_array_equal(data.natural_ids, range(4))


def test_other_sampling_rates_sound_alike(tmp_path: Path) -> None:
    """A tone keeps its pitch, and silence has a standard deviation to divide by."""
    tones = [
        recording(0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate)
        for rate in (16_000, 44_100)
    ]
    data = load_data(spoken(tmp_path / "tones", tones))
    slow, fast = data.train_inputs.astype(np.float32)[:, 0, 5:-5]
    np.testing.assert_allclose(slow[:, 1:8], fast[:, 1:8], atol=25)
    silence = load_data(spoken(tmp_path / "silence", [recording(np.zeros(100))] * 2))
    assert silence.std is not None
    assert_array_equal(silence.std, np.ones((1, 1, 20)))


def wave(rate: int, samples: np.ndarray, frames: int | None = None) -> bytes:
    """Return float samples with a header that says whatever it is told."""
    content = samples.astype("<f4").tobytes()
    length = len(content) if frames is None else 4 * frames
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate % 2**32, 4, 32)
    body = b"WAVE" + head + struct.pack("<4sI", b"data", length) + content
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def endless(rate: int) -> bytes:
    """Return a FLAC file that says it has 2**36 - 1 samples at this rate."""
    whole = bytearray(recording(np.zeros(100), rate))
    whole[21] |= 15
    whole[22:26] = b"\xff" * 4
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no sound", "Format not recognised"),
        (b"", "an empty cell"),
        (None, "an empty cell"),
        (recording(noise(1))[:50], "Error"),
        (wave(16_000, np.full(9, np.nan)), "finite"),
        (wave(16_000, np.full(9, np.inf)), "finite"),
        (wave(16_000, np.full(9_000, 1e30)), "finite"),
        (wave(2**31 - 1, np.zeros(9)), "2147483647 samples a second"),
    ],
    ids=["other", "empty", "null", "cut", "nan", "infinite", "loud", "fast"],
)
def test_a_broken_recording_is_the_users_to_mend(
    tmp_path: Path, cache: Path, content: bytes | None, why: str
) -> None:
    """It ends in one line that names the column and the row."""
    cfg = spoken(tmp_path / "data", [recording(noise(1)), content])
    line = refusal(cfg, cache)
    assert line.startswith("dataset.audio=audio: must be a column of readable audio")
    assert f"row 1 of {tmp_path / 'data'}'s train split" in line and why in line


@pytest.mark.parametrize(
    "content",
    [
        endless(16_000),
        endless(655_350),
        wave(16_000, np.zeros(9), 2**29),
        wave(1, np.zeros(10**6)),
    ],
    ids=["flac", "fast-flac", "wave", "slow"],
)
def test_no_more_of_a_recording_is_read_than_it_takes(
    tmp_path: Path, cache: Path, content: bytes
) -> None:
    """However long it says that it is, or would be once it is resampled."""
    cfg = spoken(tmp_path / "data", [recording(noise(1)), content])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        assert load_data(cfg).input_shape == (1, 49, 20)
    except ConfigError:
        assert not list(cache.glob("*"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024 and time.monotonic() - start < 10  # kilobytes, seconds


def test_real_recordings(data_root: Path) -> None:
    """Ten words of many speakers; the features are those of librosa."""
    folder = data_root / "speech_commands"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    data = load_data(config("speech_commands", path=folder, features=13))
    assert data.input_shape == (1, 49, 13)
    assert (len(data.train_targets), len(data.test_targets)) == (3275, 799)
    assert data.num_classes == 10
    assert data.natural_ids is not None
    assert len(np.unique(data.natural_ids)) == 200
    row = pq.ParquetFile(folder / "train.parquet").read(["audio"])["audio"][7].as_py()
    samples = soundfile.read(BytesIO(row["bytes"]))[0]
    expected = mfcc(librosa.util.fix_length(samples, size=16_000), 13)
    np.testing.assert_allclose(data.train_inputs[7], expected, rtol=1e-3, atol=0.05)
    prepared = prepare(torch.from_numpy(np.array(data.train_inputs)), data)
    torch.testing.assert_close(
        prepared.mean((0, 1, 2)), torch.zeros(13), atol=1e-3, rtol=0
    )


# ------------------------------------------------------------------------------- text


TRAIN = "".join(
    f" {line} \n"
    for line in (
        "",
        "= Cats =",
        "",
        "a cat and a cat or two cat",
        "= = Food = =",
        "a fish and a",
        "",
        "= A =",
        "",
        "zebra yak a <unk> fish",
    )
)
TEST = " = Dogs = \n a dog and a cat \n"


def texts(folder: Path, train: str = "train.txt", **changes: Any) -> DictConfig:
    """Write the two small texts and return their configuration."""
    folder.mkdir(exist_ok=True)
    (folder / train).write_text(TRAIN)
    (folder / "test.txt").write_text(TEST)
    return config("wikitext-2", path=folder, sequence_length=3, **changes)


def by_hand(text: str, known: list[str]) -> tuple[list[list[int]], list[int]]:
    """Cut a text into runs of four numbered words, a word shared by neighbours."""
    articles: list[list[str]] = [[]]
    for line in text.split("\n")[:-1]:
        words = line.split()
        if len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "=":
            articles.append([])
        articles[-1] += words + ["<eos>"]
    runs, owners = [], []
    for owner, words in enumerate(articles):
        for start in range(0, len(words) - 3, 3):
            run = words[start : start + 4]
            runs.append([known.index(w) if w in known else 0 for w in run])
            owners.append(owner)
    return runs, [sorted(set(owners)).index(owner) for owner in owners]


@pytest.mark.parametrize("vocabulary", [None, 1, 4, 6, 99])
def test_text_equals_a_slow_reference(tmp_path: Path, vocabulary: int | None) -> None:
    """Sequences stay within an article and targets follow their inputs."""
    data = load_data(texts(tmp_path / "data", vocabulary=vocabulary))
    # By frequency, then by the alphabet; unknown words first.
    words = "<unk> <eos> = a cat and fish A Cats Food or two yak zebra".split()
    known = words[:vocabulary]
    assert data.num_classes == len(known)
    runs, owners = by_hand(TRAIN, known)
    assert_array_equal(data.train_inputs, [run[:3] for run in runs])
    assert_array_equal(data.train_targets, [run[1:] for run in runs])
    assert_array_equal(data.strata, owners)
    assert_array_equal(data.natural_ids, owners)
    assert set(owners) == {0, 1}
    runs, _ = by_hand(TEST, known)
    assert_array_equal(data.test_inputs, [run[:3] for run in runs])
    assert_array_equal(data.test_targets, [run[1:] for run in runs])
    assert data.train_inputs.dtype == np.int32
    assert data.train_targets.dtype == np.int64
    assert data.mean is None and data.std is None
    assert data.metric == "perplexity"


def test_validation_text_stands_in_for_training_text(tmp_path: Path) -> None:
    """Only where there is no other."""
    cfg = texts(tmp_path / "data", train="valid.txt")
    alone = load_data(cfg)
    assert alone.train_inputs.max() > 0
    (tmp_path / "data" / "train.txt").write_text("x y z x")
    module._load.cache_clear()
    assert load_data(cfg).num_classes == 5


def test_text_that_cannot_be_used_names_the_mend(tmp_path: Path) -> None:
    """No test text, none that is long enough, none that is UTF-8."""
    cfg = texts(tmp_path / "data")
    long = OmegaConf.merge(cfg, {"sequence_length": 50})
    assert isinstance(long, DictConfig)
    with pytest.raises(ConfigError, match="^dataset.sequence_length=50: must be small"):
        load_data(long)
    (tmp_path / "data" / "test.txt").write_bytes(b"a b \xff d e")
    with pytest.raises(ConfigError, match="^dataset.path=.* UTF-8, unlike test.txt$"):
        load_data(cfg)
    (tmp_path / "data" / "test.txt").unlink()
    with pytest.raises(ConfigError, match="^dataset.path=.*: must be .* and test.txt$"):
        load_data(cfg)


def test_real_text(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WikiText-2's validation text is 60 articles."""
    folder = data_root / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    if any(folder.glob("train*.txt")):
        pytest.skip(f"{folder} holds the training text")
    monkeypatch.setenv("GWPF_DATA", str(data_root))
    data = load_data(config("wikitext-2"))
    assert data.num_classes == 13_777
    assert data.train_inputs.shape == data.train_targets.shape == (6_183, 35)
    assert data.test_inputs.shape == (6_985, 35)
    assert set(data.strata) == set(range(60))
    assert_array_equal(data.train_inputs[:, 1:], data.train_targets[:, :-1])
    fewer = load_data(config("wikitext-2", path=folder, vocabulary=2_000))
    assert fewer.num_classes == 2_000
    assert_array_equal(
        fewer.train_inputs > 0, (data.train_inputs < 2_000) & (data.train_inputs > 0)
    )
