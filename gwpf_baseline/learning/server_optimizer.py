"""How the server moves the global model by the clients' mean update.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated
Optimization. ICLR 2021, algorithm 2. FedAvgM is Hsu, Qi, Brown: Measuring the Effects
of Non-Identical Data Distribution for Federated Visual Classification, 2019.

A coordinate that was not synchronised has no update in a round: it stands still, and so
do its moments.
"""

import math
from dataclasses import dataclass

import numpy as np

from gwpf_baseline.utils import ConfigError, FloatVector, is_number

OPTIMIZERS = ("fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi")

Index = np.ndarray | slice


@dataclass(frozen=True)
class ServerOptimizerConfig:
    """Hyper-parameters of the server's optimiser.

    Parameters
    ----------
    name : {"fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"}
        The mean update itself; with momentum; divided by the root of the second
        moment, which is the sum of squares, Adam's moving average, or Yogi's.
    lr : float, default 1.0
        eta, the server's learning rate.
    beta1 : float, default 0.0
        Of ``fedavgm``, the share of the last velocity that is kept; of the adaptive
        ones, the factor of the update's moving average.
    beta2 : float, default 0.99
        The factor of ``fedadam``'s and ``fedyogi``'s second moment.
    tau : float, default 1e-3
        What is added to the root of the second moment, whose first value is its
        square.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    name: str = "fedavg"
    lr: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Check every value."""
        if self.name not in OPTIMIZERS:
            raise ConfigError(
                "server_optimizer", self.name, f"one of {', '.join(OPTIMIZERS)}"
            )
        for key in ("lr", "tau"):
            value = getattr(self, key)
            # Where an update is 0, one that is 0 as float32 would divide 0 by 0.
            if (
                not is_number(value)
                or not 0 < value < math.inf
                or not np.float32(value)
            ):
                raise ConfigError(f"server_optimizer.{key}", value, "a number > 0")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            if not is_number(value) or not 0 <= value < 1:
                raise ConfigError(f"server_optimizer.{key}", value, "in [0, 1)")


class ServerOptimizer:
    """The server's optimiser, with its moments.

    Parameters
    ----------
    config : ServerOptimizerConfig
        The hyper-parameters.
    dimension : int
        d.

    Attributes
    ----------
    velocity, second : numpy.ndarray
        float32 ``(d,)``, m and v, where the optimiser has them; else empty.
    """

    def __init__(self, config: ServerOptimizerConfig, dimension: int) -> None:
        self.config = config
        adaptive = config.name not in ("fedavg", "fedavgm")
        with_velocity = config.beta1 > 0 and config.name != "fedavg"
        self.velocity = np.zeros(dimension if with_velocity else 0, np.float32)
        first = np.float32(config.tau**2)
        self.second = np.full(dimension if adaptive else 0, first, np.float32)

    def step(self, weights: FloatVector, index: Index, update: FloatVector) -> None:
        """Move some coordinates.

        Parameters
        ----------
        weights : numpy.ndarray
            float32 ``(d,)``, moved in place.
        index : numpy.ndarray or slice
            int64 ``(k,)`` or a slice of k, the coordinates; best a block of
            :func:`gwpf_baseline.coordinates.cache_blocks`.
        update : numpy.ndarray
            float32 ``(k,)``, the clients' mean update.
        """
        direction = self._direction(index, update)
        if self.second.size:
            root = np.sqrt(self._second_moment(index, update))
            direction = np.divide(direction, root + np.float32(self.config.tau))
        weights[index] += np.float32(self.config.lr) * direction

    def _direction(self, index: Index, update: FloatVector) -> FloatVector:
        if not self.velocity.size:
            return update
        keep = np.float32(self.config.beta1)
        # FedAvgM adds up, the adaptive ones average.
        rate = 1 - keep if self.second.size else np.float32(1)
        velocity = keep * self.velocity[index] + rate * update
        self.velocity[index] = velocity
        return velocity

    def _second_moment(self, index: Index, update: FloatVector) -> FloatVector:
        square = update * update
        second = self.second[index]
        rate = 1 - np.float32(self.config.beta2)
        if self.config.name == "fedadagrad":
            second = second + square
        elif self.config.name == "fedadam":
            second = second + rate * (square - second)
        else:
            second = second + rate * square * np.sign(square - second)
        self.second[index] = second
        return second

    def state(self) -> dict[str, np.ndarray]:
        """Return the moments."""
        return {"velocity": self.velocity, "second": self.second}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what :meth:`state` returned."""
        self.velocity, self.second = state["velocity"], state["second"]
