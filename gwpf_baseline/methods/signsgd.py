"""SignSGD with majority vote.

Bernstein et al.: signSGD: Compressed Optimisation for Non-Convex Problems. ICML 2018,
algorithm 3. ``docs/fedpm.md`` says what is read how.

A client sends the sign of each coordinate of its update, one bit; the server moves each
coordinate by a step of one size, the way that most clients want, and sends which way.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gwpf_baseline.exchange.payload import Part, Reader, Writer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.ternary import (
    SteppingClient,
    SteppingStrategy,
    Ternary,
)
from gwpf_baseline.utils import BoolVector, ConfigError, is_number


@dataclass(frozen=True)
class SignSGDConfig:
    """Hyper-parameters of signSGD.

    Parameters
    ----------
    step : float, default 0.002
        delta, by how much a coordinate moves in an exchange, above 0.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    step: float = 0.002

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.step) or not 0 < self.step < math.inf:
            raise ConfigError("method.step", self.step, "a number > 0")


class SignSGDStrategy(SteppingStrategy[BoolVector]):
    """The server's half of signSGD.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SteppingStrategy`; its `config` is a :class:`SignSGDConfig`.

    Attributes
    ----------
    votes : numpy.ndarray
        float32 ``(d,)``, the weights of those who want more of a coordinate less the
        weights of those who want less of it.
    """

    name = "signsgd"
    config: SignSGDConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.votes = np.zeros(self.dimension, np.float32)

    def reset_sums(self) -> None:
        """Start the vote afresh."""
        self.votes.fill(0)

    def read_upload(self, reader: Reader) -> BoolVector:
        """Take one client's signs: whatever they say, each is but a vote."""
        return reader.bitmap(self.dimension, part=Part.VALUES)

    def add_upload(self, upload: BoolVector, weight: float) -> None:
        """Count one client's votes."""
        self.votes += np.where(upload, np.float32(weight), np.float32(-weight))

    def finish_exchange(self, total_weight: float) -> np.ndarray:
        """Move each coordinate the way that most want; where they are even, none."""
        del total_weight
        decided = np.flatnonzero(self.votes)
        signs = self.votes[decided] > 0
        return self.take_step(Ternary(decided, signs, np.float32(self.config.step)))

    def metrics(self) -> dict[str, float]:
        """Something is sent of everything."""
        return {"sent_fraction": 1.0}


class SignSGDClient(SteppingClient):
    """The client's half of signSGD.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SteppingClient`; its `config` is a :class:`SignSGDConfig`.
    """

    name = "signsgd"
    config: SignSGDConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model, and send which way each coordinate went."""
        delta, loss = self.train(task.weights, task, state)
        writer.bitmap(delta.numpy() > 0, part=Part.VALUES)
        return loss


METHOD = Method(SignSGDConfig, SignSGDStrategy, SignSGDClient)
