"""Gradient-Wise Parameter Freezing (GWPF).

Communication-efficient federated learning with gradient-wise parameter freezing and a
thawing strategy. Computer Networks, 2024. The paper's code is Dora233/GWPF on GitHub;
``docs/gwpf.md`` says where it departs from the paper and what is mended here.

The server freezes single coordinates: a frozen one is not exchanged. Clients go on
accumulating what they learn about it, and one bit a frozen coordinate tells the server
when that matters again; the server then thaws it, and what has accumulated arrives.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gwpf_baseline.coordinates import cache_blocks, gather
from gwpf_baseline.exchange.payload import Reader, Writer, as_tensor
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task, drifted
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.pruning import share
from gwpf_baseline.methods.shared.stability import Stability
from gwpf_baseline.records.checkpoint import as_arrays, as_tensors
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import (
    BoolVector,
    ConfigError,
    FloatVector,
    derive_seed,
    is_number,
)


@dataclass(frozen=True)
class GWPFConfig:
    """Hyper-parameters of GWPF.

    Parameters
    ----------
    freeze_rule : {"always", "threshold"}
        ``threshold`` (the paper): freeze a synchronised coordinate when its effective
        update ``|E| / A`` is below `freeze_threshold`. ``always``: freeze everything
        after each synchronisation, also before the first, so that only votes thaw.
    freeze_threshold : float, default 0.5
        In ``(0, 1]``.
    ema : float, default 0.99
        alpha, the factor of the moving averages E and A, in ``[0, 1)``.
    tighten : bool, default False
        Halve `freeze_threshold` when the frozen share rises past 0.8.
    threshold_floor : float, default 0.01
        `tighten` never goes below this.
    frozen_update : {"residual", "drift"}
        ``residual``: a frozen coordinate returns to its global value after a round and
        what was learned is kept aside. ``drift`` (the released code): it stays where
        training left it.
    thaw_signal : {"importance", "consistency"}
        ``consistency`` (the paper): vote for a coordinate whose local steps agree,
        ``|sum of steps| >= thaw_threshold * sum of |steps|``. ``importance``: vote for
        those with the client's largest accumulated updates.
    thaw_threshold : float, default 0.5
        For ``consistency``, in ``(0, 1]``.
    vote_fraction : float, default 0.02
        For ``importance``: the share of frozen coordinates voted for, in ``(0, 1]``.
    thaw_rule : {"budget", "quorum"}
        ``quorum``: thaw what at least `thaw_quorum` of the clients voted for.
        ``budget``: thaw the most voted `thaw_budget` of all coordinates.
    thaw_quorum : float, default 0.0
        A share of the clients in ``[0, 1]``; 0 means any single one (released code).
    thaw_budget : float, default 0.02
        A share of all coordinates in ``(0, 1]``.
    thaw_exchange : {"next_round", "same_round"}
        Whether thawed coordinates are uploaded in the next round or in a second
        exchange of the same one (the released code).

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    freeze_rule: str = "always"
    freeze_threshold: float = 0.5
    ema: float = 0.99
    tighten: bool = False
    threshold_floor: float = 0.01
    frozen_update: str = "residual"
    thaw_signal: str = "importance"
    thaw_threshold: float = 0.5
    vote_fraction: float = 0.02
    thaw_rule: str = "budget"
    thaw_quorum: float = 0.0
    thaw_budget: float = 0.02
    thaw_exchange: str = "next_round"

    def __post_init__(self) -> None:
        """Check every value."""
        for key, choices in (
            ("freeze_rule", ("always", "threshold")),
            ("frozen_update", ("residual", "drift")),
            ("thaw_signal", ("importance", "consistency")),
            ("thaw_rule", ("budget", "quorum")),
            ("thaw_exchange", ("next_round", "same_round")),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"method.{key}", getattr(self, key), f"one of {', '.join(choices)}"
                )
        for key in (
            "freeze_threshold",
            "threshold_floor",
            "thaw_threshold",
            "vote_fraction",
            "thaw_budget",
        ):
            if not is_number(getattr(self, key)) or not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"method.{key}", getattr(self, key), "in (0, 1]")
        if not is_number(self.ema) or not 0 <= self.ema < 1:
            raise ConfigError("method.ema", self.ema, "in [0, 1)")
        if not is_number(self.thaw_quorum) or not 0 <= self.thaw_quorum <= 1:
            raise ConfigError("method.thaw_quorum", self.thaw_quorum, "in [0, 1]")
        if not isinstance(self.tighten, bool):
            raise ConfigError("method.tighten", self.tighten, "true or false")


# ---- the algorithm: pure functions on flat vectors ----------------------------------


def importance_votes(accumulated: FloatVector, fraction: float) -> BoolVector:
    """Vote for the coordinates with the largest accumulated updates.

    Parameters
    ----------
    accumulated : numpy.ndarray
        float32 ``(m,)``, the residuals of the frozen coordinates.
    fraction : float
        The share to vote for; at least one coordinate.

    Returns
    -------
    numpy.ndarray
        bool ``(m,)``. Ties at the threshold are all voted for; zeros never are.
    """
    size = np.abs(accumulated)
    if size.size == 0:
        return np.zeros(0, np.bool_)
    count = share(fraction, size.size)
    least = np.partition(size, size.size - count)[size.size - count]
    return size >= least if least > 0 else size > 0


def consistency_votes(
    net: FloatVector, path: FloatVector, threshold: float
) -> BoolVector:
    """Vote for the coordinates whose local steps point the same way.

    Parameters
    ----------
    net : numpy.ndarray
        float32 ``(m,)``, the sum of the local steps.
    path : numpy.ndarray
        float32 ``(m,)``, the sum of their magnitudes.
    threshold : float
        The least ``|net| / path``.

    Returns
    -------
    numpy.ndarray
        bool ``(m,)``. A coordinate that did not move never votes.
    """
    return (np.abs(net) >= np.float32(threshold) * path) & (path > 0)


def thaw_by_quorum(counts: np.ndarray, clients: int, quorum: float) -> BoolVector:
    """Thaw what a share of the clients voted for.

    Parameters
    ----------
    counts : numpy.ndarray
        uint16 ``(m,)``, votes for each frozen coordinate.
    clients : int
        Clients that voted.
    quorum : float
        The share of them that it takes, but at least one.

    Returns
    -------
    numpy.ndarray
        bool ``(m,)``.
    """
    return counts >= max(1, share(quorum, clients))


def thaw_by_budget(counts: np.ndarray, budget: int, seed: int) -> BoolVector:
    """Thaw the most voted coordinates.

    Parameters
    ----------
    counts : numpy.ndarray
        uint16 ``(m,)``, votes for each frozen coordinate.
    budget : int
        How many to thaw at most.
    seed : int
        Decides which of equally voted coordinates, where not all fit.

    Returns
    -------
    numpy.ndarray
        bool ``(m,)``; exactly ``min(budget, coordinates with a vote)`` are set.
    """
    # The least level at which everything fits, by bisection: no histogram, which
    # would need an int64 copy of the counts.
    low, high = 1, int(counts.max(initial=0)) + 1
    while low < high:
        level = (low + high) // 2
        if np.count_nonzero(counts >= level) <= budget:
            high = level
        else:
            low = level + 1
    thawed: BoolVector = counts >= low
    left = budget - int(np.count_nonzero(thawed))
    if low > 1 and left > 0:
        tied = np.flatnonzero(counts == low - 1)
        rng = np.random.default_rng(seed)
        thawed[rng.choice(tied, left, replace=False, shuffle=False)] = True
    return thawed


# ---- the server's half --------------------------------------------------------------


class GWPFUpload(NamedTuple):
    """What one client sends in one exchange.

    Parameters
    ----------
    votes : numpy.ndarray or None
        bool, one a frozen coordinate; None in a follow-up.
    values : numpy.ndarray
        float32, accumulated update of each active coordinate.
    """

    votes: BoolVector | None
    values: FloatVector


class GWPFStrategy(SyncStrategy[GWPFUpload]):
    """The server's half of GWPF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`GWPFConfig`.

    Attributes
    ----------
    mask : torch.Tensor
        bool ``(d,)``, the active coordinates: those that clients upload next.
    stability : Stability
        E, A and the freezing threshold.
    """

    name = "gwpf"
    config: GWPFConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        always = config.freeze_rule == "always"
        self.mask = torch.full((self.dimension,), not always)
        self.thawed = torch.zeros_like(self.mask)
        self.stability = Stability(
            # Where everything is frozen after each exchange, nobody asks for E and A.
            0 if always else self.dimension,
            config.ema,
            config.freeze_threshold,
            config.threshold_floor,
        )
        self.asked = self.mask
        self.count = self.sent = 0
        self.value_sum = torch.zeros(0)
        self.vote_counts = np.zeros(0, np.uint16)
        self.voters = 0

    def begin_exchange(self) -> None:
        """Ask for the active coordinates, in a follow-up for those just thawed."""
        self.asked = self.thawed if self.follow_up else self.mask
        self.count = int(np.count_nonzero(self.asked.numpy()))
        self.sent = self.count + (self.sent if self.follow_up else 0)

    def reset_sums(self) -> None:
        """Start the sums and counts afresh."""
        self.value_sum = torch.zeros(self.count)
        self.vote_counts = np.zeros(self.dimension - self.count, np.uint16)
        self.voters = 0

    def request(self) -> BoolVector:
        """Return the coordinates to ask for."""
        return self.asked.numpy()

    def read_upload(self, reader: Reader) -> GWPFUpload:
        """Take one client's votes and values."""
        votes = None
        if not self.follow_up:
            votes = reader.bitmap(self.vote_counts.size)
        return GWPFUpload(votes, self.read_update(reader, self.asked.numpy()))

    def add_upload(self, upload: GWPFUpload, weight: float) -> None:
        """Add one client's values to the sums and its votes to the counts."""
        self.value_sum.add_(as_tensor(upload.values), alpha=weight)
        if upload.votes is not None:
            self.vote_counts += upload.votes
            self.voters += 1

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Apply the mean update, freeze what has settled, thaw what was voted for."""
        asked = self.asked.numpy()
        weights = self.weights.numpy()
        update = self.value_sum.div_(total_weight).numpy()
        keep = np.zeros_like(asked)
        for index, part in cache_blocks(asked):
            self.optimizer.step(weights, index, update[part])
            if self.config.freeze_rule == "threshold":
                keep[index] = ~self.stability.observe(index, update[part])
        if self.follow_up:
            self.mask = self.mask | torch.from_numpy(keep)
        else:
            thawed = np.zeros_like(asked)
            elected = self._elected()
            for index, part in cache_blocks(~asked):
                thawed[index[elected[part]]] = True
            self.thawed = torch.from_numpy(thawed)
            same_round = self.config.thaw_exchange == "same_round"
            self.mask = torch.from_numpy(keep if same_round else keep | thawed)
        if self.config.tighten and not self.wants_follow_up():
            active = int(np.count_nonzero(self.mask.numpy()))
            self.stability.tighten(1.0 - active / self.dimension)
        return asked

    def wants_follow_up(self) -> bool:
        """Ask at once for what was thawed, if it is to be the same round."""
        return (
            self.config.thaw_exchange == "same_round"
            and not self.follow_up
            and bool(self.thawed.numpy().any())
        )

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that stayed frozen, and that were sent."""
        sent = self.sent / self.dimension
        return {"frozen_fraction": 1.0 - sent, "sent_fraction": sent}

    def method_state(self) -> dict[str, Any]:
        """Return the mask, the averages and the threshold."""
        stability = self.stability.state()
        return {"mask": self.mask, **as_tensors(stability)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.mask = state.pop("mask")
        self.stability.load_state(as_arrays(state))

    def _elected(self) -> BoolVector:
        if self.config.thaw_rule == "quorum":
            quorum = self.config.thaw_quorum
            return thaw_by_quorum(self.vote_counts, self.voters, quorum)
        budget = share(self.config.thaw_budget, self.dimension)
        seed = derive_seed(self.seed, "ties", self.exchange)
        return thaw_by_budget(self.vote_counts, budget, seed)


# ---- the client's half --------------------------------------------------------------


class GWPFClient(SyncClient):
    """The client's half of GWPF.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`GWPFConfig`.
    """

    name = "gwpf"
    config: GWPFConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float | None:
        """Train, vote, and send what has accumulated on the active coordinates."""
        assert task.mask is not None
        residual = self.residual(state)
        loss = None
        if not task.header.follow_up:
            loss = self._learn(task, state, residual, writer)
        self.write_update(writer, state, residual, task.mask)
        return loss

    def _learn(
        self, task: Task, state: ClientState, residual: FloatVector, writer: Writer
    ) -> float:
        assert task.mask is not None
        frozen = ~task.mask
        start = task.weights
        if self.config.frozen_update == "drift":
            start = drifted(task, residual)
        if self.config.thaw_signal == "consistency":
            path = _Path(start.to(self.model.device))
            delta, loss = self.train(start, task, state, path.step)
            votes = consistency_votes(
                gather(delta.numpy(), frozen),
                gather(path.length.cpu().numpy(), frozen),
                self.config.thaw_threshold,
            )
            residual += delta.numpy()
        else:
            delta, loss = self.train(start, task, state)
            residual += delta.numpy()
            accumulated = gather(residual, frozen)
            votes = importance_votes(accumulated, self.config.vote_fraction)
        writer.bitmap(votes)
        return loss


class _Path:
    """The length of each coordinate's way through the local iterations."""

    def __init__(self, start: torch.Tensor) -> None:
        self.last = start.clone()
        self.length = torch.zeros_like(start)

    def step(self, vector: torch.Tensor) -> None:
        """Add the step that led to these parameters."""
        self.length.add_(self.last.sub_(vector).abs_())
        self.last.copy_(vector)


METHOD = Method(GWPFConfig, GWPFStrategy, GWPFClient)
