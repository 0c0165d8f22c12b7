"""The wall time of our rounds against Flower's own FedAvg with the same local training.

Both run on Flower's Ray simulation, with the same model, batches and steps. Ours keep
client state, count bytes and write records; Flower's exchange all weights and forget.
"""

import logging
import statistics

from _common import add_data_option, parser, show
from _flower import dense_client, flower_round_seconds, round_seconds

from gwpf_baseline.config import checked, compose_config

METHODS = ("fedavg", "gwpf")


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
                    f"num_rounds={options.warm_up + options.rounds + 1}",
                    "eval_every=1000000",  # but for the last round, which is left out
                    f"seed={options.seed}",
                ]
            )
        )
        for method in METHODS
    }
    times: dict[str, list[float]] = {"Flower's FedAvg": []}
    times |= {method: [] for method in METHODS}
    kept = slice(options.warm_up - 1, -1)
    for _ in range(options.repeats):
        flower = flower_round_seconds(configs["fedavg"], dense_client)
        times["Flower's FedAvg"] += flower[kept]
        for method, cfg in configs.items():
            times[method] += round_seconds(cfg)[kept]
    reference = statistics.median(times["Flower's FedAvg"])
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        goal = "1.05" if name in METHODS else ""
        rows.append((name, 1000 * median, median / reference, goal))
    columns = ("method", "ms a round", "time / Flower's", "goal <=")
    show("One round, LeNet-5 on MNIST", columns, rows, options)


if __name__ == "__main__":
    main()
