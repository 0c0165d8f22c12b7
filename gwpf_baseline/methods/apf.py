"""Adaptive Parameter Freezing (APF) and its strawmen.

Chen, Xu, Wang, Li, Li, Chen, Zhang: Communication-Efficient Federated Learning with
Adaptive Parameter Freezing. ICDCS 2021; the aggressive variant is that of section IV-D.
``docs/apf.md`` says what is read how.

Every few synchronisations, each coordinate whose updates have begun to oscillate is
frozen for a period: it keeps its value on all clients and is not exchanged. A period
that proves right, since the coordinate is still stable when it wakes, is followed by a
longer one, else by a shorter. All of this follows from the global model alone, so
clients that see every model work the mask out for themselves, and no mask is sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gwpf_baseline.coordinates import cache_blocks
from gwpf_baseline.exchange.header import Header
from gwpf_baseline.exchange.payload import Reader, Writer, as_tensor
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import LostState, Task, drifted
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.learning.training import StepHook
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.stability import Stability
from gwpf_baseline.records.checkpoint import as_arrays, as_tensors
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import (
    BoolVector,
    ConfigError,
    FloatVector,
    derive_seed,
    is_number,
    is_whole,
)

# Checks for which `fixed` freezes (section VI-C).
FIXED_PERIOD = 10
# The longest period, that of `permanent`, and the last check that ends one: as far as
# 16 bits count. That is 327,675 rounds at the defaults.
_FOREVER = 2**16 - 1
# The aggressive variant freezes with probability round / 2000, at most a half.
_AGGRESSIVE_ROUNDS, _AGGRESSIVE_LIMIT = 2000, 0.5


@dataclass(frozen=True)
class APFConfig:
    """Hyper-parameters of APF.

    Parameters
    ----------
    control : {"aimd", "additive", "multiplicative", "fixed", "permanent"}
        How a freezing period follows from the one before: longer by one check where
        the coordinate is still stable, else halved (``aimd``, the paper); longer or
        shorter by one; doubled or halved; always 10 checks; for ever (the strawman).
    check_every : int, default 5
        Synchronisations between two stability checks: F_c / F_s.
    ema : float, default 0.99
        alpha, the factor of the moving averages E and A, in ``[0, 1)``.
    threshold : float, default 0.05
        A coordinate is stable when ``|E| / A`` is below it; in ``(0, 1]``. Halved each
        time the frozen share rises past 0.8.
    frozen_update : {"rollback", "drift"}
        ``rollback``: a frozen coordinate returns to its value after every iteration.
        ``drift`` (the strawman of partial synchronisation): it goes on locally.
    aggressive : bool, default False
        Whether a coordinate that a check has found unstable, and leaves active, is
        frozen all the same with probability ``min(K / 2000, 0.5)``, K the round, until
        the next check; then it is active until it has been checked.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    control: str = "aimd"
    check_every: int = 5
    ema: float = 0.99
    threshold: float = 0.05
    frozen_update: str = "rollback"
    aggressive: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        for key, choices in (
            ("control", tuple(CONTROLS)),
            ("frozen_update", ("rollback", "drift")),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"method.{key}", getattr(self, key), f"one of {', '.join(choices)}"
                )
        if not is_whole(self.check_every, 1):
            raise ConfigError(
                "method.check_every", self.check_every, "a whole number >= 1"
            )
        if not is_number(self.ema) or not 0 <= self.ema < 1:
            raise ConfigError("method.ema", self.ema, "in [0, 1)")
        if not is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise ConfigError("method.threshold", self.threshold, "in (0, 1]")
        if not isinstance(self.aggressive, bool):
            raise ConfigError("method.aggressive", self.aggressive, "true or false")


# ---- the algorithm: pure functions on flat vectors ----------------------------------

# From the last period, int32, in checks: the next one if stable, and if not.
_Next = Callable[[np.ndarray], np.ndarray]
CONTROLS: dict[str, tuple[_Next, _Next]] = {
    "aimd": (lambda period: period + 1, lambda period: period // 2),
    "additive": (lambda period: period + 1, lambda period: np.maximum(period - 1, 0)),
    "multiplicative": (
        lambda period: np.maximum(2 * period, 1),
        lambda period: period // 2,
    ),
    "fixed": (
        lambda period: np.full_like(period, FIXED_PERIOD),
        np.zeros_like,
    ),
    "permanent": (lambda period: np.full_like(period, _FOREVER), np.zeros_like),
}


def next_period(period: np.ndarray, stable: BoolVector, control: str) -> np.ndarray:
    """Return how long coordinates that were just checked are to be frozen.

    Parameters
    ----------
    period : numpy.ndarray
        int32 ``(k,)``, their last periods, in checks.
    stable : numpy.ndarray
        bool ``(k,)``, which of them are stable.
    control : str
        As of :class:`APFConfig`.

    Returns
    -------
    numpy.ndarray
        int32 ``(k,)``.
    """
    longer, shorter = CONTROLS[control]
    return np.where(stable, np.minimum(longer(period), _FOREVER), shorter(period))


def aggressive_share(server_round: int) -> float:
    """Return the probability with which an unstable coordinate is frozen as well."""
    return min(server_round / _AGGRESSIVE_ROUNDS, _AGGRESSIVE_LIMIT)


class FreezingSchedule:
    """When each coordinate is frozen, worked out from the global model alone.

    Server and clients run the same schedule on the same models, and so have the same
    masks, to the bit.

    Parameters
    ----------
    weights : numpy.ndarray
        float32 ``(d,)``, the initial global model, which becomes the first reference.
    config : APFConfig
        The hyper-parameters.
    seed : int
        The run's seed, for the aggressive variant's draws.

    Attributes
    ----------
    exchange : int
        The last exchange whose outcome it has seen.
    checks : int
        Stability checks so far.
    stability : Stability
        E, A and the threshold.
    reference : numpy.ndarray
        float32 ``(d,)``, the global model at the last check.
    period, deadline : numpy.ndarray
        uint16 ``(d,)``, each coordinate's last freezing period, and the check that ends
        it.
    """

    def __init__(self, weights: FloatVector, config: APFConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.exchange = 0
        self.checks = 0
        self.stability = Stability(weights.size, config.ema, config.threshold)
        self.reference = weights
        self.period = np.zeros(weights.size, np.uint16)
        self.deadline = np.zeros(weights.size, np.uint16)

    def observe(self, exchange: int, weights: FloatVector) -> None:
        """See the outcome of an exchange, and check the stability if it is time.

        Parameters
        ----------
        exchange : int
            The exchange's number; none may be left out.
        weights : numpy.ndarray
            float32 ``(d,)``, the global model after it.
        """
        self.exchange = exchange
        if not self.checks_at(exchange):
            return
        live = self.deadline <= self.checks
        self.checks += 1
        rng = np.random.default_rng(derive_seed(self.seed, "aggressive", self.checks))
        for index, _ in cache_blocks(live):
            current = weights[index]
            stable = self.stability.observe(index, current - self.reference[index])
            self.reference[index] = current
            last = self.period[index].astype(np.int32)
            period = next_period(last, stable, self.config.control)
            self.period[index] = period
            if self.config.aggressive:
                # Its period stays: a draw tells nothing about how stable it is.
                drawn = rng.random(index.size) < aggressive_share(exchange)
                period = np.maximum(period, drawn)
            self.deadline[index] = np.minimum(self.checks + period, _FOREVER)
        frozen = np.count_nonzero(self.deadline > self.checks)
        self.stability.tighten(frozen / self.deadline.size)

    def checks_at(self, exchange: int) -> bool:
        """Tell whether the stability is checked after an exchange."""
        return exchange > 0 and exchange % self.config.check_every == 0

    def active(self) -> BoolVector:
        """Return which coordinates the next exchange synchronises, bool ``(d,)``."""
        active: BoolVector = self.deadline <= self.checks
        return active

    def state(self) -> dict[str, np.ndarray]:
        """Return all that it remembers."""
        return {
            **self.stability.state(),
            "reference": self.reference,
            "period": self.period,
            "deadline": self.deadline,
            "exchange": np.array(self.exchange),
            "checks": np.array(self.checks),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what :meth:`state` returned."""
        self.stability.load_state(state)
        self.reference = state["reference"]
        self.period, self.deadline = state["period"], state["deadline"]
        self.exchange, self.checks = int(state["exchange"]), int(state["checks"])


# ---- the server's half --------------------------------------------------------------


class APFStrategy(SyncStrategy[FloatVector]):
    """The server's half of APF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`APFConfig`.

    Attributes
    ----------
    schedule : FreezingSchedule
        When each coordinate is frozen.
    in_step : set of int
        The clients that have seen every model and so derive the mask themselves.
    """

    name = "apf"
    config: APFConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        initial = self.weights.numpy().copy()
        self.schedule = FreezingSchedule(initial, self.config, self.seed)
        self.in_step: set[int] = set()
        self.mask = np.ones(self.dimension, np.bool_)
        self.value_sum = torch.zeros(0)

    def begin_exchange(self) -> None:
        """See the last exchange's outcome, from which the mask follows."""
        last = self.exchange - 1
        self.schedule.observe(last, self.weights.numpy())
        self.mask = self.schedule.active()
        self.in_step = {
            client
            for client, record in self.clients.items()
            if (last == record.version == 0)
            # From a model that was rounded on its way another mask would follow.
            or (self.quantization.exact_model and client in self.in_step)
            and record.used == last
        }

    def reset_sums(self) -> None:
        """Start the sum afresh."""
        self.value_sum = torch.zeros(int(np.count_nonzero(self.mask)))

    def request(self) -> BoolVector:
        """Ask for what is not frozen."""
        return self.mask

    def sends_mask(self, client: int) -> bool:
        """Leave the mask out for a client that has seen every model."""
        return client not in self.in_step

    def read_upload(self, reader: Reader) -> FloatVector:
        """Take the updates of the active coordinates."""
        return self.read_update(reader, self.mask)

    def add_upload(self, upload: FloatVector, weight: float) -> None:
        """Add one client's updates."""
        self.value_sum.add_(as_tensor(upload), alpha=weight)

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Move the active coordinates by their mean update."""
        self.move(self.value_sum.div_(total_weight).numpy(), self.mask)
        return self.mask

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that were frozen, and that were sent."""
        share = self.value_sum.numel() / self.dimension
        return {"frozen_fraction": 1.0 - share, "sent_fraction": share}

    def method_state(self) -> dict[str, Any]:
        """Return the schedule, and who follows it."""
        return {**as_tensors(self.schedule.state()), "in_step": sorted(self.in_step)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.in_step = set(state.pop("in_step"))
        for client in self.in_step:
            self.roster.check(client)
        self.schedule.load_state(as_arrays(state))


# ---- the client's half --------------------------------------------------------------

_PREFIX = "schedule."


def _form(arrays: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (array.dtype, array.shape) for name, array in arrays.items()}


class APFClient(SyncClient):
    """The client's half of APF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`APFConfig`.
    """

    name = "apf"
    config: APFConfig

    def derive_mask(
        self, header: Header, weights: torch.Tensor, state: ClientState
    ) -> BoolVector:
        """Run the schedule on the model that has just arrived."""
        last = header.exchange - 1
        schedule = self._schedule(state, last)
        if last > 0:
            if schedule.exchange != last - 1:
                raise LostState(0)
            schedule.observe(last, weights.numpy())
        for name, array in schedule.state().items():
            state.arrays[_PREFIX + name] = array
        return schedule.active()

    def _schedule(self, state: ClientState, last: int) -> FreezingSchedule:
        """Return the schedule that this client keeps, before it sees an exchange."""
        names = [name for name in state.arrays if name.startswith(_PREFIX)]
        initial, seed = self.initial.numpy(), self.batches.seed
        if not names or last == 0:
            return FreezingSchedule(initial.copy(), self.config, seed)
        schedule = FreezingSchedule(initial, self.config, seed)
        # Between checks it stays as it is, and where it is.
        take = state.own if schedule.checks_at(last) else state.arrays.__getitem__
        kept = {name.removeprefix(_PREFIX): take(name) for name in names}
        if _form(kept) != _form(schedule.state()):
            raise LostState(0)
        schedule.load_state(kept)
        return schedule

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train what is not frozen, and send it."""
        assert task.mask is not None
        if task.header.with_mask:
            # Once out of step, a client cannot get back into it, and need not try.
            for name in [name for name in state.arrays if name.startswith(_PREFIX)]:
                del state.arrays[name]
        residual = self.residual(state)
        if self.config.frozen_update == "drift":
            delta, loss = self.train(drifted(task, residual), task, state)
        else:
            delta, loss = self.train(task.weights, task, state, self._roll_back(task))
        residual += delta.numpy()
        self.write_update(writer, state, residual, task.mask)
        return loss

    def _roll_back(self, task: Task) -> StepHook:
        device = self.model.device
        start = task.weights.to(device)
        active = torch.from_numpy(task.mask).to(device)

        def restore(vector: torch.Tensor) -> None:
            torch.where(active, vector, start, out=vector)

        return restore


METHOD = Method(APFConfig, APFStrategy, APFClient)
