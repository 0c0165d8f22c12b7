"""The wall time of a round against the training alone, and against Flower's own FedAvg.

The training alone: the same local loop on the same batches, one client after the other
in one process, divided by the number of workers; after each round, as the machine is
then. Ours plays the clients on Ray, keeps their state, counts bytes and writes records;
Flower's FedAvg exchanges all weights on its simulation runtime and forgets. Evaluation
is off.
"""

import logging
import os
import statistics
import time

from _common import add_data_option, announced, parser, show
from _flower import dense_client, flower_round_seconds, round_seconds
from omegaconf import DictConfig

from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.learning.training import train
from gwpf_baseline.local import federation

METHODS = ("fedavg", "gwpf")


class Training:
    """The training of all clients of a round, and nothing else.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    workers : int
        How many would share it.

    Attributes
    ----------
    seconds : list of float
        Of each time that it was called, divided by the number of workers.
    """

    def __init__(self, cfg: DictConfig, workers: int) -> None:
        self.workers = workers
        self.clients = [node.build(node.store) for node in federation(cfg).nodes]
        self.drawn = cfg.local_steps * cfg.batch_size
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Train."""
        cursor = len(self.seconds) * self.drawn
        started = time.perf_counter()
        for client in self.clients:
            train(client.model, client.batches, client.training, cursor)
        self.seconds.append((time.perf_counter() - started) / self.workers)


def main() -> None:
    """Measure every method and print the table."""
    arguments = parser(
        __doc__, clients=10, steps=5, rounds=30, warm_up=5, repeats=2, seed=0
    )
    add_data_option(arguments)
    options = arguments.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    configs = {
        method: checked(
            compose_config(
                [
                    f"method={method}",
                    "dataset=mnist",
                    f"dataset.path={options.data / 'mnist'}",
                    f"num_clients={options.clients}",
                    f"local_steps={options.steps}",
                    f"num_rounds={options.warm_up + options.rounds}",
                    f"seed={options.seed}",
                ]
            )
        )
        for method in METHODS
    }
    flower = "Flower's FedAvg"
    names = (flower, *METHODS)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}
    for name in announced(options.repeats * names):
        # After each round of it: a machine is not equally fast all the time.
        cfg = configs.get(name, configs["fedavg"])
        workers = (os.cpu_count() or 1) // cfg.client_resources.num_cpus
        training = Training(cfg, workers)
        if name == flower:
            seconds = flower_round_seconds(cfg, dense_client, training)
        else:
            seconds = round_seconds(cfg, training)
        rounds[name] += seconds[options.warm_up - 1 :]
        alone[name] += training.seconds[options.warm_up - 1 :]
    rows = []
    for name in names:
        median, least = map(statistics.median, (rounds[name], alone[name]))
        goal = "1.35" if name in METHODS else ""
        rows.append((name, 1000 * least, 1000 * median, median / least, goal))
    columns = ("", "ms of training", "ms a round", "ratio", "goal <=")
    show("One round, LeNet-5 on MNIST", columns, rows, options)


if __name__ == "__main__":
    main()
