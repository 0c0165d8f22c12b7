"""The Flower ClientApp, for ``flwr run`` and SuperNodes, and what plays clients."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.client import Client
from flwr.clientapp import ClientApp
from omegaconf import DictConfig, OmegaConf

from gwpf_baseline.config import Workbench, from_run_config, workbench
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.flat_model import FlatModel, parameters_to_vector
from gwpf_baseline.learning.state import InMemory, OnDisk, StateStore
from gwpf_baseline.learning.training import Batches
from gwpf_baseline.records.checkpoint import CheckpointFolder
from gwpf_baseline.utils import (
    ConfigError,
    is_whole,
    keep_freed_memory,
    pick_device,
    run_folder,
)


def make_client(
    cfg: DictConfig,
    client: int,
    folder: str,
    store: StateStore | None = None,
    bench: Workbench | None = None,
) -> SyncClient:
    """Build the client of one partition.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    client : int
        The partition's id.
    folder : str
        The run's folder, for the client's part of checkpoints; if empty, there is none.
    store : StateStore, optional
        What the client keeps from one message to the next; default: a file in that
        folder.
    bench : Workbench, optional
        The data, the model and the method; default: what is configured.

    Returns
    -------
    SyncClient
        The configured method's client.
    """
    torch.set_num_threads(cfg.client_threads)
    bench = bench or workbench(cfg)
    model, initial = _flat_model(cfg.client_resources.num_gpus, bench.model)
    batches = Batches(
        bench.data, bench.partitions[client], cfg.seed, client, cfg.dataset.augment
    )
    return bench.method.client(
        store or OnDisk(folder, client, initial.numel()),
        model,
        initial,
        batches,
        bench.training,
        config=bench.method_config,
        quantization=bench.quantization,
        saved=CheckpointFolder(folder) if folder and cfg.checkpoint_every else None,
        found=_found(cfg, folder),
    )


def _found(cfg: DictConfig, folder: str) -> list[CheckpointFolder]:
    """Return where this client's part of a checkpoint may be: on its own disk."""
    folders = [Path(folder)] if folder else []
    if cfg.resume:
        # The server's path is another machine's; there, runs are called by their ids.
        folders += [Path(cfg.resume), run_folder(Path(cfg.resume).name)]
    return [CheckpointFolder(path) for path in folders]


@functools.lru_cache(maxsize=1)
def _flat_model(
    num_gpus: float, model: torch.nn.Module
) -> tuple[FlatModel, torch.Tensor]:
    initial = parameters_to_vector(model)
    # A copy: the model is the process's only record of the initial weights.
    return FlatModel(copy.deepcopy(model), pick_device(num_gpus)), initial


class Worker:
    """Plays clients, one at a time, in a process of Ray's; outlives a run.

    A client that it does not hold, as a move has failed, begins anew, and says so.
    """

    def __init__(self) -> None:
        keep_freed_memory()
        self.cfg = DictConfig({})
        self.folder = ""
        self.bench: Workbench | None = None
        self.stores: dict[int, InMemory] = {}

    def begin(self, text: str, folder: str) -> None:
        """Begin a run.

        Parameters
        ----------
        text : str
            A checked configuration as JSON.
        folder : str
            The run's folder.
        """
        self.cfg = OmegaConf.create(json.loads(text))
        self.folder = folder
        self.stores.clear()
        # None if that fails: never the last run's.
        self.bench = None
        self.bench = workbench(self.cfg)

    def answer(
        self, client: int, question: str, ins: Any, store: InMemory | None = None
    ) -> Any:
        """Let a client answer a message.

        Parameters
        ----------
        client : int
            Its partition id.
        question : str
            The method of Flower's ``Client`` that answers.
        ins : FitIns or GetPropertiesIns
            The message.
        store : InMemory, optional
            What the client keeps; default: as this worker holds it.

        Returns
        -------
        FitRes or GetPropertiesRes
            The answer.
        """
        store = store or self.stores.get(client) or InMemory()
        self.stores[client] = store
        made = make_client(self.cfg, client, self.folder, store, self.bench)
        return getattr(made.to_client(), question)(ins)

    def give(self, client: int) -> InMemory:
        """Give away what a client keeps, also while another one is played."""
        return self.stores.pop(client, None) or InMemory()


def client_fn(context: Context) -> Client:
    """Build a client from Flower's run configuration.

    Raises
    ------
    ConfigError
        The node has no partition, or one that does not exist.
    """
    cfg = _composed(json.dumps(dict(context.run_config), sort_keys=True))
    client = context.node_config.get("partition-id")
    if not is_whole(client, 0) or client >= cfg.num_clients:
        raise ConfigError(
            "partition-id",
            client,
            f"in the node's configuration, from 0 to {cfg.num_clients - 1} "
            f"(num_clients={cfg.num_clients})",
        )
    return make_client(cfg, client, str(run_folder(context.run_id))).to_client()


@functools.lru_cache(maxsize=1)
def _composed(text: str) -> DictConfig:
    run_config: dict[str, Any] = json.loads(text)
    return from_run_config(run_config)


app = ClientApp(client_fn=client_fn)
