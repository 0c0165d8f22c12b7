"""Gaia: send only significant updates.

Hsieh, Harlap, Vijaykumar, Konomis, Ganger, Gibbons, Mutlu: Gaia: Geo-Distributed
Machine Learning Approaching LAN Speeds. NSDI 2017, section 4: the significance filter.

A client sends an update once it has grown to a share of the parameter's own value; the
share falls with the square root of the rounds. What it does not send it keeps, adds to,
and trains with: no update is lost, it only arrives later.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.sparse import SparseClient, SparseStrategy
from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector, is_number


@dataclass(frozen=True)
class GaiaConfig:
    """Hyper-parameters of Gaia.

    Parameters
    ----------
    threshold : float, default 0.01
        The relative change that is significant in the first round, above 0.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    threshold: float = 0.01

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.threshold) or not 0 < self.threshold < math.inf:
            raise ConfigError("method.threshold", self.threshold, "a number > 0")


def significant(
    update: FloatVector, weights: FloatVector, threshold: float, server_round: int
) -> BoolVector:
    """Tell which updates are worth sending.

    Parameters
    ----------
    update : numpy.ndarray
        float32 ``(d,)``, what has accumulated since each coordinate was last sent.
    weights : numpy.ndarray
        float32 ``(d,)``, the global model.
    threshold : float
        The relative change that is significant in the first round.
    server_round : int
        Counted from 1.

    Returns
    -------
    numpy.ndarray
        bool ``(d,)``: ``|update / weights| > threshold / sqrt(server_round)``. Any
        change of a weight that is 0 is significant.
    """
    least = np.float32(threshold / math.sqrt(server_round))
    return np.abs(update) > least * np.abs(weights)


class GaiaStrategy(SparseStrategy):
    """The server's half of Gaia.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`GaiaConfig`.
    """

    name = "gaia"
    config: GaiaConfig


class GaiaClient(SparseClient):
    """The client's half of Gaia.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`GaiaConfig`.
    """

    name = "gaia"
    config: GaiaConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train on its own copy, unsent updates included, and send what counts."""
        residual = self.residual(state)
        start = task.weights + torch.from_numpy(residual)
        delta, loss = self.train(start, task, state)
        residual += delta.numpy()
        mask = significant(
            residual,
            task.weights.numpy(),
            self.config.threshold,
            self.server_round,
        )
        self.send(writer, state, residual, mask)
        return loss


METHOD = Method(GaiaConfig, GaiaStrategy, GaiaClient)
