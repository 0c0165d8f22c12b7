"""Rounds a second of our client against one written as Flower's app template does it.

The template's client loads its partition through Flower Datasets, transforms PIL images
one by one in a DataLoader, and builds its model anew each round. Both train LeNet-5 on
MNIST with the same number of steps, under FedAvg: the template on Flower's simulation
runtime, ours as the command line runs it.
"""

import logging
import statistics

from _common import add_data_option, announced, parser, show
from _flower import flower_round_seconds, round_seconds, template_client

from gwpf_baseline.config import checked, compose_config


def main() -> None:
    """Measure both and print the table."""
    arguments = parser(
        __doc__, clients=10, steps=5, rounds=20, warm_up=3, repeats=2, seed=0
    )
    add_data_option(arguments)
    options = arguments.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    cfg = checked(
        compose_config(
            [
                "method=fedavg",
                "dataset=mnist",
                f"dataset.path={options.data / 'mnist'}",
                "partition=iid",
                f"num_clients={options.clients}",
                f"local_steps={options.steps}",
                f"num_rounds={options.warm_up + options.rounds}",
                f"seed={options.seed}",
            ]
        )
    )
    kept = slice(options.warm_up - 1, None)
    template, ours = [], []
    for _ in announced(options.repeats * ["template, ours"]):
        template += flower_round_seconds(cfg, template_client)[kept]
        ours += round_seconds(cfg)[kept]
    slow, fast = statistics.median(template), statistics.median(ours)
    rows = [("template", 1 / slow, 1.0, ""), ("ours", 1 / fast, slow / fast, "3")]
    columns = ("client", "rounds a second", "speed / template's", "goal >=")
    show("LeNet-5 on MNIST", columns, rows, options)


if __name__ == "__main__":
    main()
