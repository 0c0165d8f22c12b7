"""Clients as Flower's examples write them, and timed simulations of them and of ours.

Ray's workers import this module, so what it keeps in a process stays there from round
to round.
"""

import functools
import itertools
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import (
    Server,
    ServerAppComponents,
    ServerConfig,
    SimpleClientManager,
)
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

from gwpf_baseline.callbacks import OnRound
from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import workbench
from gwpf_baseline.learning.state import InMemory
from gwpf_baseline.learning.training import train
from gwpf_baseline.model import initial_model
from gwpf_baseline.records.history import History
from gwpf_baseline.server_app import make_strategy
from gwpf_baseline.simulation import on_ray, stop_ray

Arrays = list[np.ndarray]
ClientFn = Callable[[DictConfig, Context], Client]


def get_weights(model: nn.Module) -> Arrays:
    """Return all weights the way Flower's examples exchange them."""
    return [value.cpu().numpy() for value in model.state_dict().values()]


def set_weights(model: nn.Module, weights: Arrays) -> None:
    """Load what :func:`get_weights` returned."""
    pairs = zip(model.state_dict(), weights, strict=True)
    model.load_state_dict(OrderedDict((k, torch.tensor(v)) for k, v in pairs))


class DenseClient(NumPyClient):
    """Our data, model and local loop; all weights exchanged, and no state kept."""

    def __init__(self, cfg: DictConfig, context: Context) -> None:
        client = int(context.node_config["partition-id"])
        self.ours = make_client(cfg, client, "unused", InMemory())

    def fit(self, parameters: Arrays, config: dict) -> tuple[Arrays, int, dict]:
        """Train from the given weights on the batches of this round."""
        ours = self.ours
        set_weights(ours.model.module, parameters)
        drawn = ours.training.local_steps * ours.training.batch_size
        cursor = (config["round"] - 1) * drawn
        loss, _ = train(ours.model, ours.batches, ours.training, cursor)
        weights = get_weights(ours.model.module)
        return weights, len(ours.batches), {"train_loss": loss}


class TemplateClient(NumPyClient):
    """A client in the manner of Flower's app template: everything anew each round."""

    def __init__(self, cfg: DictConfig, context: Context) -> None:
        self.cfg = cfg
        self.model = initial_model(cfg.model.name, (1, 28, 28), 10, cfg.seed)
        self.loader = self._loader(int(context.node_config["partition-id"]))

    def fit(self, parameters: Arrays, config: dict) -> tuple[Arrays, int, dict]:
        """Train from the given weights for as many steps as ours."""
        cfg = self.cfg
        set_weights(self.model, parameters)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=cfg.lr)
        criterion = nn.CrossEntropyLoss()
        self.model.train()
        total = 0.0
        for batch in itertools.islice(self.loader, cfg.local_steps):
            optimizer.zero_grad()
            loss = criterion(self.model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            total += loss.item()
        loss = total / cfg.local_steps
        return get_weights(self.model), len(self.loader), {"train_loss": loss}

    def _loader(self, partition: int) -> DataLoader:
        dataset = _federated(self.cfg.dataset.path, self.cfg.num_clients)
        split = dataset.load_partition(partition).train_test_split(0.2, seed=42)
        transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])

        def apply(batch: dict[str, Any]) -> dict[str, Any]:
            batch["image"] = [transform(image) for image in batch["image"]]
            return batch

        data = split["train"].with_transform(apply)
        return DataLoader(data, batch_size=self.cfg.batch_size, shuffle=True)


@functools.lru_cache(maxsize=1)
def _federated(path: str, num_clients: int) -> FederatedDataset:
    return FederatedDataset(
        dataset="parquet",
        data_files={"train": f"{path}/train.parquet"},
        partitioners={"train": IidPartitioner(num_clients)},
    )


def dense_client(cfg: DictConfig, context: Context) -> Client:
    """Build a :class:`DenseClient`."""
    return DenseClient(cfg, context).to_client()


def template_client(cfg: DictConfig, context: Context) -> Client:
    """Build a :class:`TemplateClient`, with one thread as ours."""
    torch.set_num_threads(cfg.client_threads)
    return TemplateClient(cfg, context).to_client()


class Laps:
    """Seconds of rounds, without what is done between them.

    Parameters
    ----------
    between : callable
        What is done after each round.

    Attributes
    ----------
    seconds : list of float
        Of each round but the first, which starts the workers.
    """

    def __init__(self, between: Callable[[], object]) -> None:
        self.between = between
        self.seconds: list[float] = []
        self._began = math.inf

    def __call__(self) -> None:
        """End a round."""
        lap = time.perf_counter() - self._began
        if lap > 0:
            self.seconds.append(lap)
        self.between()
        self._began = time.perf_counter()


def nothing() -> None:
    """Do nothing between rounds."""


def round_seconds(
    cfg: DictConfig, between: Callable[[], object] = nothing
) -> list[float]:
    """Run our own experiment with its records, but without evaluations.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    between : callable, default nothing
        As of :class:`Laps`.

    Returns
    -------
    list of float
        As of the same.
    """
    laps = Laps(between)
    with tempfile.TemporaryDirectory() as folder:
        history = History(folder)
        callbacks = [OnRound(history.add), OnRound(lambda record: laps())]
        strategy = make_strategy(cfg, workbench(cfg), callbacks)
        server = Server(client_manager=SimpleClientManager(), strategy=strategy)
        on_ray(cfg, Path(folder))(server, ServerConfig(cfg.num_rounds))
        history.close()
    # Its workers would keep the CPUs that Flower's own simulation needs.
    stop_ray()
    return laps.seconds


def flower_round_seconds(
    cfg: DictConfig, client_fn: ClientFn, between: Callable[[], object] = nothing
) -> list[float]:
    """Run Flower's own FedAvg on its simulation runtime.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    client_fn : callable
        Builds a client; a function of a module that workers can import.
    between : callable, default nothing
        As of :class:`Laps`.

    Returns
    -------
    list of float
        As of the same.
    """
    laps = Laps(between)

    def clock(server_round: int, weights: Arrays, config: dict) -> None:
        """Stand where our strategy closes a round's record."""
        if server_round:
            laps()

    def server_fn(context: Context) -> ServerAppComponents:
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_available_clients=cfg.num_clients,
            initial_parameters=ndarrays_to_parameters(
                get_weights(workbench(cfg).model)
            ),
            on_fit_config_fn=lambda server_round: {"round": server_round},
            evaluate_fn=clock,
        )
        config = ServerConfig(num_rounds=cfg.num_rounds)
        return ServerAppComponents(strategy=strategy, config=config)

    # Ray would join a cluster that it finds, also a dead one, and wait for it.
    init_args: dict[str, Any] = {"address": "local", "log_to_driver": False}
    run_simulation(
        server_app=ServerApp(server_fn=server_fn),
        client_app=ClientApp(client_fn=functools.partial(client_fn, cfg)),
        num_supernodes=cfg.num_clients,
        backend_config={
            "init_args": {**init_args, "logging_level": "ERROR"},
            "client_resources": {
                "num_cpus": cfg.client_resources.num_cpus,
                "num_gpus": cfg.client_resources.num_gpus,
            },
        },
    )
    return laps.seconds
