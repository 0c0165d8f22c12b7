"""Sparse ternary compression (STC).

Sattler, Wiedemann, Müller, Samek: Robust and Communication-Efficient Federated Learning
from Non-IID Data. IEEE TNNLS 2020, algorithms 1 and 2. ``docs/stc.md`` says what is
read how.

A client sends the largest of what it has accumulated, as positions, signs and a single
magnitude, and keeps the rest, also what the magnitude leaves out. The server averages,
and does to the mean what the clients did: its step is as sparse and as ternary.
"""

from dataclasses import dataclass

import numpy as np

from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.ternary import TernaryClient, TernaryStrategy
from gwpf_baseline.utils import ConfigError, is_number


@dataclass(frozen=True)
class STCConfig:
    """Hyper-parameters of STC.

    Parameters
    ----------
    up, down : float, default 0.01
        p, the share of all coordinates that a client's upload and the server's step
        have, in ``(0, 1]``; at least one coordinate.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    up: float = 0.01
    down: float = 0.01

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("up", "down"):
            value = getattr(self, key)
            if not is_number(value) or not 0 < value <= 1:
                raise ConfigError(f"method.{key}", value, "in (0, 1]")


class STCStrategy(TernaryStrategy):
    """The server's half of STC.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`TernaryStrategy`; its `config` is a :class:`STCConfig`.
    """

    name = "stc"
    config: STCConfig

    @property
    def upload_share(self) -> float:
        """Return the share that a client sends."""
        return self.config.up

    def finish_exchange(self, total_weight: float) -> np.ndarray:
        """Move the model by what the mean, with what is due, is compressed to."""
        return self.take_step(self.compressed_mean(total_weight, self.config.down))


class STCClient(TernaryClient):
    """The client's half of STC.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`TernaryClient`; its `config` is a :class:`STCConfig`.
    """

    name = "stc"
    config: STCConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model, and send the largest of all that is due."""
        residual = self.residual(state)
        delta, loss = self.train(task.weights, task, state)
        residual += delta.numpy()
        self.write_largest(writer, state, residual, self.config.up)
        return loss


METHOD = Method(STCConfig, STCStrategy, STCClient)
