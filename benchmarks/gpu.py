"""Images a second through Ray with shares of a GPU, against a bare loop on that GPU.

The bare loop: the same training on the same batches in this process, one client after
the other; after each round, while the workers wait. Ray's clients keep their state,
exchange what the method sends, and the server counts bytes and writes records.
Evaluation is off. Where PyTorch sees no GPU, all of it runs on the CPU, and in fp32
unless told otherwise.
"""

import logging
import math
import os
import statistics
from argparse import Namespace
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from _common import add_data_option, announced, parser, show
from _flower import round_seconds
from omegaconf import DictConfig
from round_time import METHODS, Training

from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.learning.training import PRECISIONS

GOAL = 0.7
COLUMNS = (
    "precision",
    "clients at once",
    "ms a round",
    "rounds/s",
    "images/s",
    "bare images/s",
    "ratio",
    "goal >=",
)


def main() -> None:
    """Measure every precision, one client at a time and several; print the table."""
    # Ray would give each worker a GPU of its own, where the bare loop has but one.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    on_gpu = torch.cuda.is_available()
    arguments = parser(
        __doc__,
        clients=10,
        steps=5,
        batch_size=50,
        rounds=10,
        warm_up=3,
        parallel=4,
        seed=0,
    )
    arguments.add_argument("--model", default="resnet18", help="(resnet18)")
    arguments.add_argument("--method", choices=METHODS, default="gwpf", help="(gwpf)")
    precisions = list(PRECISIONS if on_gpu else PRECISIONS[:1])
    arguments.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=precisions
    )
    add_data_option(arguments)
    options = arguments.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # A worker takes a CPU, also where it trains on a GPU.
    several = min(options.parallel, os.cpu_count() or 1)
    settings = list(product(options.precisions, sorted({1, several})))
    rows = [
        measure(precision, at_once, options)
        for precision, at_once in announced(settings, "{0[0]}, {0[1]} at once".format)
    ]
    device = torch.cuda.get_device_name() if on_gpu else "the CPU, as there is no GPU"
    show(f"A round of {options.model} on {device}", COLUMNS, rows, options)


def measure(precision: str, at_once: int, options: Namespace) -> Sequence[Any]:
    """Run one experiment and return its row.

    Parameters
    ----------
    precision : str
        One of `PRECISIONS`.
    at_once : int
        How many clients train at a time.
    options : argparse.Namespace
        The parameters.

    Returns
    -------
    sequence of object
        A cell for each of `COLUMNS`.
    """
    cfg = configuration(precision, at_once, options)
    bare = Training(cfg, workers=1)
    laps = round_seconds(cfg, bare)
    played = statistics.median(laps[-options.rounds :])
    alone = statistics.median(bare.seconds[-options.rounds :])
    images = options.clients * options.steps * options.batch_size
    rates = (1000 * played, 1 / played, images / played, images / alone)
    return precision, at_once, *rates, alone / played, GOAL


def configuration(precision: str, at_once: int, options: Namespace) -> DictConfig:
    """Return an experiment's checked configuration; parameters as of `measure`."""
    cpus, gpus = 1, 1 / at_once
    if not torch.cuda.is_available():
        cpus, gpus = math.ceil((os.cpu_count() or 1) / at_once), 0.0
    return checked(
        compose_config(
            [
                f"method={options.method}",
                f"model={options.model}",
                "dataset=cifar10",
                f"dataset.path={options.data / 'cifar10'}",
                f"num_clients={options.clients}",
                f"local_steps={options.steps}",
                f"batch_size={options.batch_size}",
                f"num_rounds={options.warm_up + options.rounds}",
                f"precision={precision}",
                f"client_resources.num_cpus={cpus}",
                f"client_resources.num_gpus={gpus}",
                f"seed={options.seed}",
                "lr=0.01",
            ]
        )
    )


if __name__ == "__main__":
    main()
