"""Federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of
Deep Networks from Decentralized Data. AISTATS 2017. Algorithm 1.

The whole model goes out and the whole update comes back, every round. With a longer
interval between synchronisations (``local_steps``) this is the control that any method
that saves bytes has to beat.
"""

from dataclasses import dataclass

import torch

from gwpf_baseline.exchange.messages import EVERYTHING
from gwpf_baseline.exchange.payload import Reader, Writer, as_tensor
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
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
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`FedAvgConfig`.
    """

    name = "fedavg"
    config: FedAvgConfig
    dense_downlink = True

    update_sum: torch.Tensor

    def reset_sums(self) -> None:
        """Start the sum afresh."""
        self.update_sum = torch.zeros(self.dimension)

    def read_upload(self, reader: Reader) -> FloatVector:
        """Take a dense update."""
        return self.read_update(reader)

    def add_upload(self, upload: FloatVector, weight: float) -> None:
        """Add a dense update."""
        self.update_sum.add_(as_tensor(upload), alpha=weight)

    def finish_exchange(self, total_weight: float) -> slice:
        """Move the model by the mean update."""
        self.move(self.update_sum.div_(total_weight).numpy())
        return EVERYTHING

    def metrics(self) -> dict[str, float]:
        """Everything is sent; nothing is ever frozen."""
        return {"sent_fraction": 1.0}


class FedAvgClient(SyncClient):
    """The client's half of FedAvg.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`FedAvgConfig`.
    """

    name = "fedavg"
    config: FedAvgConfig
    dense_downlink = True

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model and send the whole update."""
        delta, loss = self.train(task.weights, task, state)
        due = self.with_left_out(state, delta.numpy())
        self.write_update(writer, state, due)
        return loss


METHOD = Method(FedAvgConfig, FedAvgStrategy, FedAvgClient)
