"""Gradient-Wise Parameter Freezing (GWPF) with signed votes.

After: Communication-efficient federated learning with gradient-wise parameter freezing.
Computer Networks, 2024; that paper's own rule is ``gwpf_paper``. ``docs/gwpf.md`` says
what is another here and why, and ``docs/research.md`` what else was tried.

The server freezes every single parameter. Clients accumulate what they learn about
them, and vote for those about which they have learned most, each vote with its sign: a
bit that says that a parameter matters again, and one that says whereto. The server
accumulates the votes, thaws the parameters that have most of them, and moves these by
one signed step, which is all that clients are sent.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.ternary import TernaryClient, TernaryStrategy
from gwpf_baseline.utils import ConfigError, is_number


@dataclass(frozen=True)
class GWPFConfig:
    """Hyper-parameters of GWPF.

    Parameters
    ----------
    vote_fraction : float, default 0.04
        The share of all coordinates that a client votes for, in ``(0, 1]``.
    thaw_budget : float, default 0.04
        The share of all coordinates that the server thaws, in ``(0, 1]``.
    step : float, default 3.0
        How far a thawed coordinate moves, in mean votes, above 0. What clients have
        not voted for they have mostly learned as well, so more than 1.
    half_life : float, default 200.0
        The local iterations after which a client has forgotten half of what it has
        accumulated, above 0: by then it has learned most of that again.
    averaging : float, default 0.1
        Over what share of the rounds so far, about, the model is averaged that is
        measured and saved, in ``[0, 1]``: 0 measures the global model itself, 1 the
        mean of all.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    vote_fraction: float = 0.04
    thaw_budget: float = 0.04
    step: float = 3.0
    half_life: float = 200.0
    averaging: float = 0.1

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("vote_fraction", "thaw_budget"):
            if not is_number(getattr(self, key)) or not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"method.{key}", getattr(self, key), "in (0, 1]")
        for key in ("step", "half_life"):
            value = getattr(self, key)
            if not is_number(value) or not 0 < value < math.inf:
                raise ConfigError(f"method.{key}", value, "a number > 0")
        if not is_number(self.averaging) or not 0 <= self.averaging <= 1:
            raise ConfigError("method.averaging", self.averaging, "in [0, 1]")


def newest_share(exchange: int, averaging: float) -> float:
    """Return the share that the newest model has in the average of all.

    Polynomial-decay averaging, with eta = 1 / averaging - 1. Shamir, Zhang: Stochastic
    Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal
    Averaging Schemes. ICML 2013.

    Parameters
    ----------
    exchange : int
        The exchange's number, from 1.
    averaging : float
        As of :class:`GWPFConfig`.

    Returns
    -------
    float
        In ``(0, 1]``.
    """
    return 1 / (1 + averaging * (exchange - 1))


class GWPFStrategy(TernaryStrategy):
    """The server's half of GWPF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`TernaryStrategy`; its `config` is a :class:`GWPFConfig`.

    Attributes
    ----------
    average : torch.Tensor
        float32 ``(d,)``, the moving average of the global models, which is measured.
    thawed : int
        How many coordinates the last exchange has thawed.
    """

    name = "gwpf"
    config: GWPFConfig
    foresees = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.average = self.weights.clone()
        self.thawed = 0

    @property
    def upload_share(self) -> float:
        """Return the share that a client sends."""
        return self.config.vote_fraction

    def finish_exchange(self, total_weight: float) -> np.ndarray:
        """Accumulate the votes, thaw what has most of them, and move that."""
        thawed = self.compressed_mean(total_weight, self.config.thaw_budget)
        self.thawed = thawed.signs.size
        changed = self.take_step(thawed.scaled(self.config.step))
        share = newest_share(self.exchange, self.config.averaging)
        self.average.lerp_(self.weights, share)
        return changed

    def measured_weights(self) -> torch.Tensor:
        """Return the averaged model: single steps are long, and tremble."""
        return self.average

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that stayed frozen, and that were sent."""
        return {
            "frozen_fraction": 1 - self.thawed / self.dimension,
            **super().metrics(),
        }

    def method_state(self) -> dict[str, Any]:
        """Return the accumulators, the last steps and the average."""
        return {"average": self.average, **super().method_state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.average = state.pop("average")
        super().load_method_state(state)


class GWPFClient(TernaryClient):
    """The client's half of GWPF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`TernaryClient`; its `config` is a :class:`GWPFConfig`.
    """

    name = "gwpf"
    config: GWPFConfig
    foresees = True

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model, and vote for the largest of what is held."""
        residual = self.residual(state)
        delta, loss = self.train(task.weights, task, state)
        steps = self.training.steps(len(self.batches))
        residual *= np.float32(0.5 ** (steps / self.config.half_life))
        residual += delta.numpy()
        self.write_largest(writer, state, residual, self.config.vote_fraction)
        return loss


METHOD = Method(GWPFConfig, GWPFStrategy, GWPFClient)
