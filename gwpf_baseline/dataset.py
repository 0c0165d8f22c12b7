"""Load a dataset and divide it among clients, both from the cache where they can be.

Images, recordings and text are decoded a single time into arrays on disk, which every
worker process maps into memory.
"""

import hashlib
import importlib
import os
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from gwpf_baseline.data.settings import Settings, patterns, read_settings
from gwpf_baseline.data.task import TaskData, check
from gwpf_baseline.utils import ConfigError

_CACHE_VERSION = 3  # to be raised whenever the same source would decode differently


# ----------------------------------------------------------------------------- loading


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
          of that type. A table's cells hold the encoded files' bytes: paths are not
          followed;
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
    settings = read_settings(cfg)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    cache_dir = Path(cfg.cache_dir or user_cache / "gwpf_baseline").expanduser()
    return _load(settings, cache_dir.resolve())


@lru_cache(maxsize=4)
def _load(settings: Settings, cache_dir: Path) -> TaskData:
    """Map the cached arrays, decoding them first if need be."""
    folder = cache_dir / _fingerprint(settings)
    existed = os.path.lexists(folder)  # asked first: another process may soon finish
    with suppress(Exception):  # not there yet, or damaged in whichever way
        return _map_arrays(folder, settings.metric)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _fill(folder, settings, existed)
    except OSError as error:
        allowed = f"a folder that can be written to ({error.strerror})"
        raise ConfigError("dataset.cache_dir", cache_dir, allowed) from error
    return _map_arrays(folder, settings.metric)


def _fill(folder: Path, settings: Settings, existed: bool) -> None:
    """Decode a dataset into a folder of the cache, in the place of a damaged one."""
    # Only a whole cache is given its name: whoever is killed leaves but a temporary
    # folder behind, and of several processes at once the first to finish wins.
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder.parent) as scratch:
        if existed:
            with suppress(FileNotFoundError):
                os.rename(folder, Path(scratch, "damaged"))
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        # Takes seconds to import, which no process need wait for that finds the arrays.
        importlib.import_module("gwpf_baseline.data.decoding").decode(settings, fresh)
        try:
            os.rename(fresh, folder)
        except OSError:
            if not folder.is_dir():
                raise


def _fingerprint(settings: Settings) -> str:
    """Digest everything that determines the arrays."""
    files = []
    if settings.path is not None:
        for pattern in patterns(settings.path, settings.source).values():
            for file in sorted(settings.path.glob(pattern)):
                if not (file.is_file() or file.is_dir()):
                    # A link to nowhere, or what waits for whoever writes to it.
                    allowed = f"without {file.name}, which is no file"
                    raise ConfigError("dataset.path", settings.path, allowed)
                stat = file.stat()
                files.append((str(file), stat.st_size, stat.st_mtime_ns))
    text = repr((_CACHE_VERSION, settings, files))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _map_arrays(folder: Path, metric: str) -> TaskData:
    """Open a whole cache folder; raise if it is not one."""

    def array(name: str) -> NDArray[Any]:
        # Mapped, so that a file which claims to be longer than it is takes no memory.
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    def array_or_none(name: str) -> NDArray[Any] | None:
        # An empty file, not a missing one, so that a file that got lost is noticed.
        values = array(name)
        return np.array(values) if values.size else None

    data = TaskData(
        train_inputs=array("train_inputs"),
        train_targets=array("train_targets"),
        test_inputs=array("test_inputs"),
        test_targets=array("test_targets"),
        num_classes=array("num_classes").item(),
        mean=array_or_none("mean"),
        std=array_or_none("std"),
        strata=np.array(array("strata")),
        natural_ids=array_or_none("natural_ids"),
        folder=folder,
        metric=metric,
    )
    check(data)
    return data


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
        - ``disjoint``: the classes are shuffled, and clients take
          ``classes_per_client`` of them in turn, so that none goes unused; a class that
          several have is divided evenly;
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
    file, examples = None, len(data.strata)
    if data.folder is not None:
        text = repr((sorted(cfg), num_clients, seed))
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        file = data.folder / f"partition-{name}.npz"
        with suppress(Exception):  # not there yet, or damaged in whichever way
            with np.load(file, allow_pickle=False) as saved:
                return _cut(saved["rows"], saved["bounds"], num_clients, examples)
    # As slow to import as decoding.
    partitioning = importlib.import_module("gwpf_baseline.data.partitioning")
    parts = partitioning.divide(data, dict(cfg), num_clients, seed)
    rows = np.concatenate(parts)
    bounds = np.cumsum([len(part) for part in parts])[:-1]
    if file is not None:
        # Who may only read the cache divides anew each time.
        with (
            suppress(OSError),
            tempfile.TemporaryDirectory(prefix="tmp-", dir=file.parent) as scratch,
        ):
            fresh = Path(scratch, file.name)
            np.savez(fresh, rows=rows, bounds=bounds)
            os.replace(fresh, file)
    return _cut(rows, bounds, num_clients, examples)


def _cut(
    rows: NDArray[np.int64], bounds: NDArray[np.int64], num_clients: int, examples: int
) -> tuple[NDArray[np.int64], ...]:
    """Cut the rows at the bounds; raise if no division of the examples comes out."""
    rows.flags.writeable = False
    parts = tuple(np.split(rows, bounds))
    if not (
        rows.dtype == np.int64
        and rows.ndim == 1
        and len(parts) == num_clients
        and all(len(part) and (np.diff(part) > 0).all() for part in parts)
        and len(np.unique(rows)) == len(rows)
        and 0 <= rows.min()
        and rows.max() < examples
    ):
        raise ValueError(f"no division of {examples} rows among {num_clients} clients")
    return parts
