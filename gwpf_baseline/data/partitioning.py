"""Divide a training set among clients with Flower's partitioners, which happens once.

Like decoding, this needs libraries that take seconds to import; a process that finds
the division in the cache never loads this module.
"""

import math
import warnings
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import datasets
import numpy as np
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
)
from numpy.typing import NDArray

from gwpf_baseline.data.task import TaskData
from gwpf_baseline.utils import ConfigError, derive_seed, is_number, is_whole

PARTITIONS = ("iid", "dirichlet", "pathological", "disjoint", "natural_id")


def divide(
    data: TaskData, cfg: dict[str, Any], num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Divide the training set; `dataset.partition_indices` says how."""
    partitioner = _partitioner(data, cfg, num_clients, seed)
    if partitioner is None:
        owner = _in_turn(data.strata, cfg["classes_per_client"], num_clients, seed)
        partitions = [np.flatnonzero(owner == client) for client in range(num_clients)]
    else:
        partitions = _by(partitioner, data, cfg["name"], num_clients, seed)
    _fill_empty(partitions)
    return partitions


def _by(
    partitioner: Partitioner, data: TaskData, name: str, num_clients: int, seed: int
) -> list[NDArray[np.int64]]:
    """Let one of Flower's partitioners divide; return each client's rows, ascending."""
    # Partitioners see labels and row numbers only, so that no input is touched.
    table = {"label": data.strata, "row": np.arange(len(data.strata))}
    if name == "natural_id" and data.natural_ids is not None:
        table["client"] = _deal(data.natural_ids, num_clients, seed)
    rows = datasets.Dataset.from_dict(table)
    if isinstance(partitioner, IidPartitioner):  # which cuts without shuffling
        rows = rows.shuffle(seed=seed)
    partitioner.dataset = rows
    # One of them warns about what is documented here, another shows a progress bar.
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            return [
                np.sort(_rows(partitioner.load_partition(client)))
                for client in range(num_clients)
            ]
        except ValueError as error:
            raise ConfigError(
                "num_clients", num_clients, f"smaller for this partition: {error}"
            ) from error


def _deal(ids: NDArray[np.int64], num_clients: int, seed: int) -> NDArray[np.int64]:
    """Deal natural ids out to the clients; return each row's client."""
    names, numbers = np.unique(ids, return_inverse=True)
    order = np.random.default_rng(derive_seed(seed, "deal")).permutation(len(names))
    hands = [np.sort(order[client::num_clients]) for client in range(num_clients)]
    owner = np.empty_like(order)
    for client, hand in enumerate(sorted(hands, key=lambda hand: hand[0])):
        owner[hand] = client
    return owner[numbers]


def _in_turn(
    labels: NDArray[np.int64], count: int, num_clients: int, seed: int
) -> NDArray[np.int64]:
    """Let clients take so many classes each, in turn; return each row's client."""
    classes = np.unique(labels)
    np.random.default_rng(derive_seed(seed, "classes")).shuffle(classes)
    turns = np.arange(num_clients * count) % len(classes)
    owner = np.empty_like(labels)
    for place, label in enumerate(classes):
        rows, owners = np.flatnonzero(labels == label), np.flatnonzero(turns == place)
        owner[rows] = (owners // count)[np.arange(len(rows)) % len(owners)]
    return owner


def _rows(partition: datasets.Dataset) -> NDArray[np.int64]:
    return partition.with_format("numpy")["row"][:]


def _partitioner(
    data: TaskData, cfg: dict[str, Any], num_clients: int, seed: int
) -> Partitioner | None:
    """Check the configuration and choose Flower's partitioner for it, if it has one."""
    rows = len(data.strata)
    if not (is_whole(num_clients, 1) and num_clients <= rows):
        allowed = f"a whole number from 1 to {rows}, the number of training examples"
        raise ConfigError("num_clients", num_clients, allowed)
    match cfg["name"]:
        case "iid":
            return IidPartitioner(num_clients)
        case "dirichlet":
            alpha = cfg["alpha"]
            if not (is_number(alpha) and 0 < alpha < math.inf):
                raise ConfigError("partition.alpha", alpha, "a number > 0")
            # Empty clients are mended afterwards: redrawing until there are none, the
            # partitioner's way, hardly ever ends for a small alpha.
            return DirichletPartitioner(
                num_clients, "label", alpha, 0, shuffle=False, seed=seed
            )
        case "pathological" | "disjoint" as name:
            count = cfg["classes_per_client"]
            classes = len(np.unique(data.strata))
            least = 1 if name == "pathological" else math.ceil(classes / num_clients)
            if not (is_whole(count, least) and count <= classes):
                allowed = (
                    f"a whole number from {least} to {classes}, the number of classes"
                )
                if least > 1:
                    allowed += ", so that each has a client"
                raise ConfigError("partition.classes_per_client", count, allowed)
            if name == "disjoint":
                return None
            return PathologicalPartitioner(
                num_clients, "label", count, "first-deterministic", False, seed
            )
        case "natural_id":
            if data.natural_ids is None:
                allowed = "another, or a dataset with natural_id set, such as femnist"
                raise ConfigError("partition", "natural_id", allowed)
            ids = len(np.unique(data.natural_ids))
            if num_clients > ids:
                allowed = f"at most {ids}, the number of natural ids"
                raise ConfigError("num_clients", num_clients, allowed)
            return NaturalIdPartitioner("client")
        case name:
            raise ConfigError("partition", name, f"one of {', '.join(PARTITIONS)}")


def _fill_empty(partitions: list[NDArray[np.int64]]) -> None:
    """Give every client without data one row of whoever has most at that moment."""
    for client, partition in enumerate(partitions):
        if len(partition) == 0:
            donor = max(range(len(partitions)), key=lambda i: len(partitions[i]))
            partitions[client] = partitions[donor][:1]
            partitions[donor] = partitions[donor][1:]
