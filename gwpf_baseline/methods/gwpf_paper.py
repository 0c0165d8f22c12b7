"""Gradient-Wise Parameter Freezing as published.

Communication-efficient federated learning with gradient-wise parameter freezing.
Computer Networks, 2024. The paper's code is Dora233/GWPF on GitHub; ``docs/gwpf.md``
says where it departs from the paper and what is mended here.

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
from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector, is_number


@dataclass(frozen=True)
class GWPFPaperConfig:
    """Hyper-parameters of GWPF as published, with those of its code as defaults.

    Parameters
    ----------
    freeze_threshold : float, default 0.5
        T, in ``(0, 1]``: a synchronised coordinate is frozen when its effective update
        ``|E| / A`` is below it.
    ema : float, default 0.99
        alpha, the factor of the moving averages E and A, in ``[0, 1)``.
    tighten : bool, default True
        Halve `freeze_threshold` when the frozen share rises past 0.8.
    threshold_floor : float, default 0.01
        `tighten` never goes below this.
    frozen_update : {"drift", "residual"}
        ``drift`` (the released code): a frozen coordinate stays where training left it.
        ``residual``: it returns to its global value after a round and what was learned
        is kept aside.
    thaw_threshold : float, default 0.5
        In ``(0, 1]``: a client votes for a frozen coordinate whose local steps agree,
        ``|sum of steps| >= thaw_threshold * sum of |steps|``.
    thaw_quorum : float, default 0.0
        Thaw what at least this share of the clients voted for, in ``[0, 1]``; 0 means
        any single one (the released code).
    thaw_exchange : {"same_round", "next_round"}
        Whether thawed coordinates are uploaded in a second exchange of the same round
        (the released code) or in the next round.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    freeze_threshold: float = 0.5
    ema: float = 0.99
    tighten: bool = True
    threshold_floor: float = 0.01
    frozen_update: str = "drift"
    thaw_threshold: float = 0.5
    thaw_quorum: float = 0.0
    thaw_exchange: str = "same_round"

    def __post_init__(self) -> None:
        """Check every value."""
        for key, choices in (
            ("frozen_update", ("drift", "residual")),
            ("thaw_exchange", ("same_round", "next_round")),
        ):
            if getattr(self, key) not in choices:
                raise ConfigError(
                    f"method.{key}", getattr(self, key), f"one of {', '.join(choices)}"
                )
        for key in ("freeze_threshold", "threshold_floor", "thaw_threshold"):
            if not is_number(getattr(self, key)) or not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"method.{key}", getattr(self, key), "in (0, 1]")
        if not is_number(self.ema) or not 0 <= self.ema < 1:
            raise ConfigError("method.ema", self.ema, "in [0, 1)")
        if not is_number(self.thaw_quorum) or not 0 <= self.thaw_quorum <= 1:
            raise ConfigError("method.thaw_quorum", self.thaw_quorum, "in [0, 1]")
        if not isinstance(self.tighten, bool):
            raise ConfigError("method.tighten", self.tighten, "true or false")


# ---- the algorithm: pure functions on flat vectors ----------------------------------


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
        unsigned ``(m,)``, votes for each frozen coordinate.
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


# ---- the server's half --------------------------------------------------------------


class GWPFPaperUpload(NamedTuple):
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


class GWPFPaperStrategy(SyncStrategy[GWPFPaperUpload]):
    """The server's half of GWPF as published.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`GWPFPaperConfig`.

    Attributes
    ----------
    mask : numpy.ndarray
        bool ``(d,)``, the active coordinates: those that clients upload next.
    stability : Stability
        E, A and the freezing threshold.
    """

    name = "gwpf_paper"
    config: GWPFPaperConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.mask = np.ones(self.dimension, np.bool_)
        self.thawed = np.zeros_like(self.mask)
        self.stability = Stability(
            self.dimension,
            config.ema,
            config.freeze_threshold,
            config.threshold_floor,
        )
        self.asked = self.mask
        self.count = self.sent = 0
        self.value_sum = torch.zeros(0)
        # The shortest type that holds a vote of every client.
        self.count_type = np.min_scalar_type(self.roster.num_clients)
        self.vote_counts = np.zeros(0, self.count_type)
        self.voters = 0

    def begin_exchange(self) -> None:
        """Ask for the active coordinates, in a follow-up for those just thawed."""
        self.asked = self.thawed if self.follow_up else self.mask
        self.count = int(np.count_nonzero(self.asked))
        self.sent = self.count + (self.sent if self.follow_up else 0)

    def reset_sums(self) -> None:
        """Start the sums and counts afresh."""
        self.value_sum = torch.zeros(self.count)
        self.vote_counts = np.zeros(self.dimension - self.count, self.count_type)
        self.voters = 0

    def request(self) -> BoolVector:
        """Return the coordinates to ask for."""
        return self.asked

    def read_upload(self, reader: Reader) -> GWPFPaperUpload:
        """Take one client's votes and values."""
        votes = None
        if not self.follow_up:
            votes = reader.bitmap(self.vote_counts.size)
        return GWPFPaperUpload(votes, self.read_update(reader, self.asked))

    def add_upload(self, upload: GWPFPaperUpload, weight: float) -> None:
        """Add one client's values to the sums and its votes to the counts."""
        self.value_sum.add_(as_tensor(upload.values), alpha=weight)
        if upload.votes is not None:
            self.vote_counts += upload.votes
            self.voters += 1

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Apply the mean update, freeze what has settled, thaw what was voted for."""
        asked = self.asked
        weights = self.weights.numpy()
        update = self.value_sum.div_(total_weight).numpy()
        keep = np.zeros_like(asked)
        for index, part in cache_blocks(asked):
            self.optimizer.step(weights, index, update[part])
            keep[index] = ~self.stability.observe(index, update[part])
        if self.follow_up:
            self.mask = self.mask | keep
        else:
            thawed = np.zeros_like(asked)
            elected = thaw_by_quorum(
                self.vote_counts, self.voters, self.config.thaw_quorum
            )
            for index, part in cache_blocks(~asked):
                thawed[index[elected[part]]] = True
            self.thawed = thawed
            same_round = self.config.thaw_exchange == "same_round"
            self.mask = keep if same_round else keep | thawed
        if not self.wants_follow_up():
            self._tighten()
        return asked

    def abandon_exchange(self) -> None:
        """Leave active what was thawed, though nobody has sent it."""
        if self.follow_up:
            self.mask = self.mask | self.thawed
            self._tighten()

    def _tighten(self) -> None:
        if self.config.tighten:
            active = int(np.count_nonzero(self.mask))
            self.stability.tighten(1.0 - active / self.dimension)

    def wants_follow_up(self) -> bool:
        """Ask at once for what was thawed, if it is to be the same round."""
        return (
            self.config.thaw_exchange == "same_round"
            and not self.follow_up
            and bool(self.thawed.any())
        )

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that stayed frozen, and that were sent."""
        sent = self.sent / self.dimension
        return {"frozen_fraction": 1.0 - sent, "sent_fraction": sent}

    def method_state(self) -> dict[str, Any]:
        """Return the mask, the averages and the threshold."""
        return as_tensors({"mask": self.mask, **self.stability.state()})

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        arrays = as_arrays(state)
        self.mask = arrays["mask"]
        self.stability.load_state(arrays)


# ---- the client's half --------------------------------------------------------------


class GWPFPaperClient(SyncClient):
    """The client's half of GWPF as published.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`GWPFPaperConfig`.
    """

    name = "gwpf_paper"
    config: GWPFPaperConfig

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
        path = _Path(start.to(self.model.device))
        delta, loss = self.train(start, task, state, path.step)
        votes = consistency_votes(
            gather(delta.numpy(), frozen),
            gather(path.length.cpu().numpy(), frozen),
            self.config.thaw_threshold,
        )
        residual += delta.numpy()
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


METHOD = Method(GWPFPaperConfig, GWPFPaperStrategy, GWPFPaperClient)
