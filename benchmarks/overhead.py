"""What each method costs beside FedAvg in time and memory, as in APF's Table III.

Rounds of real training in one process, the methods in turn, so that all of them see the
same machine. The medians are of one client's part of a round, and of the server's.
"""

import logging
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import add_data_option, announced, parser, show
from flwr.common import FitIns, FitRes
from omegaconf import DictConfig

from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import checked, compose_config, workbench
from gwpf_baseline.local import LocalFederation, LocalNode
from gwpf_baseline.server_app import make_strategy

METHODS = ("fedavg", "gwpf", "gwpf_paper", "apf", "gaia", "cmfl")
# Steps and samples that a processor does within a second or so.
MODELS = {"lenet5": (10, 100), "resnet18": (2, 10)}


class Node(LocalNode):
    """A node that notes how long its client takes.

    Attributes
    ----------
    seconds : float
        Of the client's part.
    away : float
        And with the building of the client.
    """

    seconds = away = 0.0

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client train."""
        called = time.perf_counter()
        client = self.build(self.store).to_client()
        started = time.perf_counter()
        answer = client.fit(ins)
        self.seconds += time.perf_counter() - started
        self.away += time.perf_counter() - called
        return answer


class Federation(LocalFederation):
    """One method's server and nodes."""

    nodes: list[Node]  # type: ignore[assignment]

    def __init__(self, cfg: DictConfig) -> None:
        nodes = [
            Node(client, partial(make_client, cfg, client, "unused"))
            for client in range(cfg.num_clients)
        ]
        super().__init__(make_strategy(cfg, workbench(cfg)), nodes)

    def timed(self) -> tuple[float, float]:
        """Play a round; return a client's and the server's seconds."""
        for node in self.nodes:
            node.seconds = node.away = 0.0
        self.rounds += 1
        started = time.perf_counter()
        self.server.fit_round(self.rounds, timeout=None)
        seconds = time.perf_counter() - started
        clients = sum(node.seconds for node in self.nodes)
        away = sum(node.away for node in self.nodes)
        return clients / len(self.nodes), seconds - away

    def memory(self) -> tuple[float, float]:
        """Return the bytes that a client and the server keep between rounds."""
        state = self.nodes[0].store.load()
        assert state is not None
        client = sum(array.nbytes for array in state.arrays.values())
        kept = self.strategy.method_state().values()
        server = sum(value.nbytes for value in kept if torch.is_tensor(value))
        return client, server


def main() -> None:
    """Measure every method on every model and print a table for each."""
    logging.getLogger("flwr").setLevel(logging.WARNING)  # which tells of every round
    options = parser(__doc__, clients=2, rounds=7, seed=0)
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add_data_option(options)
    given = options.parse_args()
    for model in given.models:
        measure(model, *MODELS[model], given)


def measure(model: str, steps: int, batch: int, options: Any) -> None:
    """Print one model's table."""
    data: Path = options.data / "cifar10"
    common = [f"model={model}", "dataset=cifar10", f"dataset.path={data}"]
    common += [f"num_clients={options.clients}", f"seed={options.seed}"]
    common += [f"local_steps={steps}", f"batch_size={batch}", "lr=0.01"]
    build = partial(_build, common)
    federations = {name: build(name) for name in METHODS}
    for federation in federations.values():  # the first round starts from nothing
        federation.play()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    for _ in announced(options.rounds * [f"a round of {model}"]):
        for name, federation in federations.items():
            times[name].append(federation.timed())
    rows = []
    dimension = federations["fedavg"].strategy.dimension
    medians = {
        name: [statistics.median(column) for column in zip(*played, strict=True)]
        for name, played in times.items()
    }
    for name, federation in federations.items():
        client, server = (1000 * seconds for seconds in medians[name])
        before = 1000 * medians["fedavg"][0], 1000 * medians["fedavg"][1]
        memory = [kept / 4 / dimension for kept in federation.memory()]
        extra = client - before[0]
        rows.append((name, client, extra, client / before[0], server, *memory))
    columns = ["method", "client ms", "extra ms", "ratio", "server ms"]
    columns += ["client memory / d", "server memory / d"]
    title = f"A round of {model}: {steps} steps of {batch}, {dimension:,} parameters"
    show(title, columns, rows, options)


def _build(common: list[str], method: str) -> Federation:
    return Federation(checked(compose_config([*common, f"method={method}"])))


if __name__ == "__main__":
    main()
