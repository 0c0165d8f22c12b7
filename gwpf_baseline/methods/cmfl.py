"""CMFL: send only relevant updates.

Wang, Wang, Li: CMFL: Mitigating Communication Overhead for Federated Learning. ICDCS
2019, section IV.

A client compares the signs of its update with those of the last global update. Where
too few agree, its update is an outlier, and it sends nothing but that it has none; as
in the paper, such an update is dropped, not kept for later.
"""

import math
from dataclasses import dataclass

import numpy as np

from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.fedavg import FedAvgStrategy
from gwpf_baseline.utils import ConfigError, FloatVector, is_number


@dataclass(frozen=True)
class CMFLConfig:
    """Hyper-parameters of CMFL.

    Parameters
    ----------
    threshold : float, default 0.8
        The relevance from which an update is sent, in ``[0, 1]``.
    decay : bool, default False
        Whether the threshold falls with the square root of the rounds.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    threshold: float = 0.8
    decay: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ConfigError("method.threshold", self.threshold, "in [0, 1]")
        if not isinstance(self.decay, bool):
            raise ConfigError("method.decay", self.decay, "true or false")


def relevance(update: FloatVector, last_global: FloatVector) -> float:
    """Return the share of coordinates whose update has the last global one's sign.

    Parameters
    ----------
    update, last_global : numpy.ndarray
        float32 ``(d,)``.

    Returns
    -------
    float
        In ``[0, 1]``; two zeros agree.
    """
    rises = (update > 0) == (last_global > 0)
    rises &= (update < 0) == (last_global < 0)
    return int(np.count_nonzero(rises)) / update.size


class CMFLStrategy(FedAvgStrategy):
    """The server's half of CMFL: FedAvg over those that send.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`CMFLConfig`.
    """

    name = "cmfl"
    dense_downlink = False
    skips = True

    senders = 0

    def reset_sums(self) -> None:
        """Start the sum afresh."""
        super().reset_sums()
        self.senders = 0

    def add_upload(self, upload: FloatVector, weight: float) -> None:
        """Add a dense update."""
        super().add_upload(upload, weight)
        self.senders += 1

    def metrics(self) -> dict[str, float]:
        """Return the share of the clients that sent their update."""
        return {"sent_fraction": self.senders / self.answers}


class CMFLClient(SyncClient):
    """The client's half of CMFL.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`CMFLConfig`.
    """

    name = "cmfl"
    config: CMFLConfig

    def follow(self, reader: Reader, state: ClientState) -> Task:
        """Also note how the model has moved since this client last saw it.

        For a client that takes part in every round this is the last global update. If
        the model has not moved, since nobody sent anything, the update before counts.
        """
        known = state.arrays.get("weights", self.initial.numpy()).copy()
        task = super().follow(reader, state)
        moved = task.weights.numpy() - known
        if moved.any():
            state.arrays["last_global"] = moved
        return task

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train, and send the update if it is relevant."""
        delta, loss = self.train(task.weights, task, state)
        last_global = state.arrays.get("last_global")
        threshold = self.config.threshold
        if self.config.decay:
            threshold /= math.sqrt(self.server_round)
        # Before the first global update nothing can be told, and everything is sent.
        if last_global is None or relevance(delta.numpy(), last_global) >= threshold:
            due = self.with_left_out(state, delta.numpy())
            self.write_update(writer, state, due)
        else:
            writer.skip()
        return loss


METHOD = Method(CMFLConfig, CMFLStrategy, CMFLClient)
