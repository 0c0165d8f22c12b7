"""Federated probabilistic mask training (FedPM).

Isik, Pase, Gunduz, Weissman, Zorzi: Sparse Random Networks for Communication-Efficient
Federated Learning. ICLR 2023. ``docs/fedpm.md`` says what is read how.

The weights keep their random signs for good; what is learned is which of them take
part. Each has a score, whose sigmoid is the probability that it does. A client trains
the scores through sampled masks and sends a single mask: a bit a weight, or less. The
server counts the ones, and the mode of their Beta posterior is the next probability.
The model that comes out is a seed and a mask.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.payload import Part, Reader, Writer
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.masked_network import (
    LEVELS,
    certain_scores,
    masked,
    score_table,
    to_levels,
)
from gwpf_baseline.methods.shared.network_file import NETWORK_FILE, save_network
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

# What the counts of ones, uint16, can hold.
_MOST_MASKS = 2**16 - 1
# Standard deviations: no mask of fair coins is that much against the global one.
_MOST_AGAINST = 6


@dataclass(frozen=True)
class FedPMConfig:
    """Hyper-parameters of FedPM.

    Parameters
    ----------
    initial_probability : float, default 0.5
        How probable it is at first that a weight takes part, in ``(0, 1)``; rounded
        like any probability that travels. The weights are larger where fewer take
        part, so that sums keep their size.
    prior : float, default 1.0
        alpha and beta of the Beta prior, at least 1. With 1, the uniform prior, the
        posterior's mode is the share of ones.
    reset_every : int, default 1
        Rounds after which the posterior falls back to the prior; until then it gathers
        the masks of all of them.
    probability_bits : int, default 8
        Bits, 8 or 16, of a probability on its way to the clients: with b bits it is a
        multiple of ``2**-b``, and neither 0 nor 1.
    mask_code : {"density", "probabilities"}
        What the coder of a client's mask expects of a bit: the share of ones in the
        mask, as in the paper; or the probability that the client was sent, which tells
        more the surer it is.
    network : {"sampled", "likeliest"}
        Which network is measured and left behind: one mask drawn from the global
        probabilities, as in the paper; or the likeliest one, of what takes part more
        probably than not.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    initial_probability: float = 0.5
    prior: float = 1.0
    reset_every: int = 1
    probability_bits: int = 8
    mask_code: str = "density"
    network: str = "sampled"

    def __post_init__(self) -> None:
        """Check every value."""
        initial = self.initial_probability
        if not is_number(initial) or not 0 < initial < 1:
            raise ConfigError("method.initial_probability", initial, "in (0, 1)")
        if not is_number(self.prior) or not 1 <= self.prior < math.inf:
            raise ConfigError("method.prior", self.prior, "a number >= 1")
        if not is_whole(self.reset_every, 1):
            raise ConfigError(
                "method.reset_every", self.reset_every, "a whole number >= 1"
            )
        bits = self.probability_bits
        if not is_whole(bits) or bits not in LEVELS:
            raise ConfigError("method.probability_bits", bits, "8 or 16")
        for key, known in (
            ("mask_code", ("density", "probabilities")),
            ("network", ("sampled", "likeliest")),
        ):
            value = getattr(self, key)
            if value not in known:
                raise ConfigError(f"method.{key}", value, f"one of {', '.join(known)}")

    @property
    def initial_level(self) -> int:
        """Return the level of the initial probability."""
        probability = np.array(self.initial_probability)
        return int(to_levels(probability, self.probability_bits))


def adapt(model: nn.Module, config: FedPMConfig, seed: int) -> nn.Module:
    """Mask a model, see :func:`masked`."""
    return masked(model, config.initial_level, config.probability_bits, seed)


# ---- the algorithm: pure functions on flat vectors ----------------------------------


def posterior_mode(ones: np.ndarray, masks: int, prior: float) -> np.ndarray:
    """Return the most probable share of ones under a Beta posterior.

    Parameters
    ----------
    ones : numpy.ndarray
        Integers ``(k,)``, how many of the masks had a one.
    masks : int
        How many masks there were, at least 1.
    prior : float
        alpha and beta of the Beta prior, at least 1.

    Returns
    -------
    numpy.ndarray
        float64 ``(k,)``: ``(alpha - 1) / (alpha + beta - 2)``, where alpha has grown
        by the ones and beta by the zeros.
    """
    return (prior - 1.0 + ones) / (2.0 * (prior - 1.0) + masks)


def expected_bits(scores: FloatVector, config: FedPMConfig) -> np.ndarray | None:
    """Return what the coder of a mask expects of its bits.

    Parameters
    ----------
    scores : numpy.ndarray
        float32 ``(d,)``, the global scores that the mask was trained from.
    config : FedPMConfig
        The hyper-parameters.

    Returns
    -------
    numpy.ndarray or None
        float64 ``(d,)``, to the bit the same on both sides; None for the mask's own
        density.
    """
    if config.mask_code == "density":
        return None
    bits = config.probability_bits
    return np.searchsorted(score_table(bits), scores) / 2.0**bits


def sample_mask(probabilities: FloatVector, seed: int) -> BoolVector:
    """Draw a mask.

    Parameters
    ----------
    probabilities : numpy.ndarray
        float32 ``(d,)``, each bit's probability to be set; 0 and 1 are certain.
    seed : int
        The seed of the draw.

    Returns
    -------
    numpy.ndarray
        bool ``(d,)``.
    """
    rng = np.random.default_rng(seed)
    return rng.random(probabilities.size, np.float32) < probabilities


def agreement(mask: BoolVector, probabilities: FloatVector) -> float:
    """Return how much a mask leans the way that the probabilities lean.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(d,)``.
    probabilities : numpy.ndarray
        float32 ``(d,)``, theta.

    Returns
    -------
    float
        The sum of ``(theta - mean theta) (2 mask - 1)``, in standard deviations of what
        it is for a mask of fair coins; 0 where all theta are the same.
    """
    leaning = probabilities - probabilities.mean(dtype=np.float64)
    spread = math.sqrt(np.square(leaning).sum())
    if spread < 1e-6 * math.sqrt(mask.size):
        return 0.0
    # The leanings of all add up to 0.
    return float(2 * leaning[mask].sum() / spread)


# ---- the server's half --------------------------------------------------------------


class FedPMStrategy(SyncStrategy[BoolVector]):
    """The server's half of FedPM.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`FedPMConfig`.

    Attributes
    ----------
    ones : numpy.ndarray
        uint16 ``(d,)``, ones among the masks since the last reset.
    masks, most_masks : int
        How many masks these were, and how many there can be.
    new_ones, new_masks : numpy.ndarray, int
        The same of the exchange under way.
    expected : numpy.ndarray or None
        What the coder of the exchange's masks expects, see :func:`expected_bits`.
    probabilities : numpy.ndarray
        float32 ``(d,)``, the global ones that the exchange's masks are trained from.

    Raises
    ------
    ConfigError
        Clients are to be weighted, values to be averaged or rounded in another way, or
        the masks are more than the counts can hold.
    """

    name = "fedpm"
    config: FedPMConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse("counts masks", "weighting", "server_optimizer", "quantization")
        most = _MOST_MASKS // self.roster.num_clients
        if self.config.reset_every > most:
            raise ConfigError(
                "method.reset_every",
                self.config.reset_every,
                f"at most {most} for so many clients",
            )
        self.most_masks = self.roster.num_clients * self.config.reset_every
        self.ones = np.zeros(self.dimension, np.uint16)
        self.masks = 0
        self.new_ones, self.new_masks = np.zeros(0, np.uint16), 0
        self.expected: np.ndarray | None = None
        self.probabilities = np.zeros(0, np.float32)

    def begin_exchange(self) -> None:
        """Fall back to the prior if it is time; every client sends a whole mask."""
        if (self.exchange - 1) % self.config.reset_every == 0:
            self.ones.fill(0)
            self.masks = 0
        self.expected = expected_bits(self.weights.numpy(), self.config)
        self.probabilities = self.weights.sigmoid().numpy()

    def reset_sums(self) -> None:
        """Start the exchange's counts afresh."""
        self.new_ones, self.new_masks = np.zeros(self.dimension, np.uint16), 0

    def write_values(self, writer: Writer, values: FloatVector) -> None:
        """Send scores as the levels of their probabilities."""
        table = score_table(self.config.probability_bits)
        dtype = LEVELS[self.config.probability_bits]
        writer.vector(np.searchsorted(table, values).astype(dtype))

    def read_upload(self, reader: Reader) -> BoolVector:
        """Take one client's mask.

        Raises
        ------
        WireError
            It contradicts what was learned before. A mask has no length that could be
            bounded, but an honest one was drawn from the global probabilities, trained
            on: it leans their way, as a turned one cannot.
        """
        mask = reader.bitmap(self.dimension, self.expected, Part.VALUES)
        against = -agreement(mask, self.probabilities)
        if self.update_bound.multiple is not None and against > _MOST_AGAINST:
            raise WireError(f"a mask against all others, by {against:.3g} deviations")
        return mask

    def add_upload(self, upload: BoolVector, weight: float) -> None:
        """Count one client's ones."""
        del weight
        self.new_ones += upload
        self.new_masks += 1

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Turn the counts into scores, of which there are but a few different ones."""
        del total_weight
        self.ones += self.new_ones
        self.masks += self.new_masks
        bits = self.config.probability_bits
        counts = np.arange(self.masks + 1)
        modes = posterior_mode(counts, self.masks, self.config.prior)
        scores = torch.from_numpy(score_table(bits)[to_levels(modes, bits)][self.ones])
        changed = (scores != self.weights).numpy()
        self.weights.copy_(scores)
        return changed

    def measured_weights(self) -> torch.Tensor:
        """Return the scores of the likeliest mask, or of one drawn anew each time."""
        if self.config.network == "likeliest":
            return certain_scores((self.weights > 0).numpy())
        seed = derive_seed(self.seed, "network", self.exchange)
        return certain_scores(sample_mask(self.weights.sigmoid().numpy(), seed))

    def mean_weights(self) -> torch.Tensor:
        """Return the scores themselves, by which every weight counts in part."""
        return self.weights

    def export(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write the final network, see :func:`save_network`."""
        made = {
            **origin,
            "seed": self.seed,
            "level": self.config.initial_level,
            "bits": self.config.probability_bits,
        }
        mask = (self.measured_weights() > 0).numpy()
        save_network(folder / NETWORK_FILE, made, self.model, mask, self.buffers)

    def method_state(self) -> dict[str, Any]:
        """Return the counts."""
        return {**as_tensors({"ones": self.ones}), "masks": self.masks}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.masks = state.pop("masks")
        self.ones = as_arrays(state)["ones"]
        if self.masks > self.most_masks or self.ones.max(initial=0) > self.masks:
            raise ValueError(f"{self.ones.max(initial=0)} ones in {self.masks} masks")


# ---- the client's half --------------------------------------------------------------


class FedPMClient(SyncClient):
    """The client's half of FedPM.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`FedPMConfig`.
    """

    name = "fedpm"
    config: FedPMConfig

    def read_values(self, reader: Reader, length: int) -> FloatVector:
        """Take the levels of probabilities as scores."""
        bits = self.config.probability_bits
        levels = reader.vector(length, LEVELS[bits])
        if not levels.all():
            raise WireError("a probability is 0")
        return score_table(bits)[levels]

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train the scores and send one mask that they give."""
        delta, loss = self.train(task.weights, task, state)
        probabilities = (task.weights + delta).sigmoid().numpy()
        seed, client = self.batches.seed, self.batches.client
        number = task.header.exchange
        mask = sample_mask(probabilities, derive_seed(seed, "mask", client, number))
        expected = expected_bits(task.weights.numpy(), self.config)
        writer.bitmap(mask, expected, Part.VALUES)
        return loss


METHOD = Method(FedPMConfig, FedPMStrategy, FedPMClient, adapt)
