"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. Algorithm 1.

The whole model goes out and the whole update comes back, every round. With a longer
interval between synchronisations (``local_steps``) this is the control that any method
that saves bytes has to beat.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gwpf_baseline.exchange.payload import Reader, Writer, as_tensor
from gwpf_baseline.learning.client import ClientState, SyncClient, Task
from gwpf_baseline.methods import Method
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import FloatVector


@dataclass(frozen=True)
class FedAvgConfig:
    """FedAvg has no hyper-parameters of its own."""


class FedAvgStrategy(SyncStrategy[FloatVector]):
    """The server's half of FedAvg.

    Parameters
    ----------
    *args : object
        See :class:`SyncStrategy`.
    config : FedAvgConfig
        Nothing.
    **kwargs : object
        See :class:`SyncStrategy`.
    """

    name = "fedavg"
    dense_downlink = True

    def __init__(self, *args: Any, config: FedAvgConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config
        self.update_sum = torch.zeros(0)

    def begin_exchange(self) -> None:
        """Start the sum afresh."""
        self.update_sum = torch.zeros(self.dimension)

    def read_upload(self, reader: Reader) -> FloatVector:
        """Take a dense update."""
        return self.read_update(reader)

    def add_upload(self, upload: FloatVector, weight: float) -> None:
        """Add a dense update."""
        self.update_sum.add_(as_tensor(upload), alpha=weight)

    def finish_exchange(self, total_weight: float) -> None:
        """Move the model by the mean update."""
        self.move(self.update_sum.div_(total_weight).numpy())

    def metrics(self) -> dict[str, float]:
        """Everything is sent; nothing is ever frozen."""
        return {"sent_fraction": 1.0}


class FedAvgClient(SyncClient):
    """The client's half of FedAvg.

    Parameters
    ----------
    *args : object
        See :class:`SyncClient`.
    config : FedAvgConfig
        Nothing.
    **kwargs : object
        See :class:`SyncClient`.
    """

    name = "fedavg"
    dense_downlink = True

    def __init__(self, *args: Any, config: FedAvgConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model and send the whole update."""
        delta, loss = self.train(task.weights, task, state)
        self.write_update(writer, task, delta.numpy())
        return loss


METHOD = Method(FedAvgConfig, FedAvgStrategy, FedAvgClient)
