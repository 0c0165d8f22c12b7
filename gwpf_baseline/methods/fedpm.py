"""Federated probabilistic mask training (FedPM).

Isik, Pase, Gunduz, Weissman, Zorzi: Sparse Random Networks for Communication-Efficient
Federated Learning. ICLR 2023. ``docs/fedpm.md`` says what is read how.

The weights keep their random signs for good; what is learned is which of them take
part. Each has a score, whose sigmoid is the probability that it does. A client trains
the scores through sampled masks and sends a single mask: a bit a weight, or less. The
server counts the ones, and the mode of their Beta posterior is the next probability.
The model that comes out is a seed and a mask.
"""

import functools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from gwpf_baseline.exchange.payload import (
    Reader,
    WireError,
    Writer,
    decode_bitmap,
    encode_bitmap,
    vector_checksum,
)
from gwpf_baseline.learning.client import ClientState, SyncClient, Task
from gwpf_baseline.learning.flat_model import (
    buffers_to_vector,
    parameters_to_vector,
    vector_to_buffers,
)
from gwpf_baseline.methods import Method
from gwpf_baseline.model import initial_model
from gwpf_baseline.records.checkpoint import as_arrays, as_tensors
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import (
    BoolVector,
    ConfigError,
    FloatVector,
    derive_seed,
    is_number,
)

# How a probability travels, by its bits.
_LEVELS = {8: np.uint8, 16: np.uint16}
# What the counts of ones, uint16, can hold.
_MOST_MASKS = 2**16 - 1


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

    def __post_init__(self) -> None:
        """Check every value."""
        initial = self.initial_probability
        if not is_number(initial) or not 0 < initial < 1:
            raise ConfigError("method.initial_probability", initial, "in (0, 1)")
        if not is_number(self.prior) or not 1 <= self.prior < math.inf:
            raise ConfigError("method.prior", self.prior, "a number >= 1")
        whole = isinstance(self.reset_every, int) and is_number(self.reset_every)
        if not whole or self.reset_every < 1:
            raise ConfigError(
                "method.reset_every", self.reset_every, "a whole number >= 1"
            )
        bits = self.probability_bits
        if not is_number(bits) or bits not in _LEVELS:
            raise ConfigError("method.probability_bits", bits, "8 or 16")
        codes = ("density", "probabilities")
        if self.mask_code not in codes:
            raise ConfigError(
                "method.mask_code", self.mask_code, f"one of {', '.join(codes)}"
            )

    @property
    def initial_level(self) -> int:
        """Return the level of the initial probability."""
        probability = np.array(self.initial_probability)
        return int(to_levels(probability, self.probability_bits))


# ---- the masked network -------------------------------------------------------------


class MaskedLinear(nn.Linear):
    """A linear layer of fixed weights, of which a random mask takes part.

    Attributes
    ----------
    weight : torch.nn.Parameter
        The scores, float32 in the weights' shape; a score's sigmoid is the probability
        that its weight takes part, exactly 0 and 1 for infinite ones.
    fixed : torch.Tensor
        The weights, float32: signs times the standard deviation of the layer's Kaiming
        initialisation. They follow from a seed and are no part of the state dict.
    """

    fixed: torch.Tensor

    # pylint: disable-next=arguments-renamed  # torch's name is a builtin's
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the weights that take part."""
        return functional.linear(inputs, _taking_part(self))


class MaskedConv2d(nn.Conv2d):
    """A convolution of fixed weights, of which a random mask takes part.

    Attributes
    ----------
    weight, fixed
        As of :class:`MaskedLinear`.
    """

    fixed: torch.Tensor

    # pylint: disable-next=arguments-renamed  # torch's name is a builtin's
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Apply the weights that take part."""
        return self._conv_forward(inputs, _taking_part(self), None)


def _taking_part(layer: MaskedLinear | MaskedConv2d) -> torch.Tensor:
    """Return a sample of the masked weights, or in evaluation their mean."""
    probability = layer.weight.sigmoid()
    if not layer.training:
        return layer.fixed * probability
    mask = probability.detach().bernoulli()
    # The sample in value, the probability in gradient: straight through.
    return layer.fixed * (mask + (probability - probability.detach()))


def _fixed_weights(shape: torch.Size, probability: float, seed: int) -> torch.Tensor:
    size, fan_in = shape.numel(), shape[1:].numel()
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(-(-size // 8)), np.uint8)
    ones = torch.from_numpy(np.unpackbits(drawn, count=size)).view(shape)
    return (2.0 * ones - 1.0) * math.sqrt(1 / (fan_in * probability))


_MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # pylint: disable=protected-access
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def masked(model: nn.Module, level: int, bits: int, seed: int) -> nn.Module:
    """Turn a model into one whose only parameters are the scores of its mask.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it is changed in place. Convolutions and linear layers keep their
        shapes and lose their biases, normalisation loses its scales and shifts.
    level, bits : int
        How probable it is at first that a weight takes part: ``level / 2**bits``.
    seed : int
        The run's seed, from which the signs of the weights follow.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ConfigError
        Another kind of layer has parameters to train.
    """
    layer: Any
    for name, layer in model.named_modules():
        kind = type(layer)
        if kind in _MASKED:
            # As torch's parametrizations do: the layer stays what it was otherwise.
            layer.__class__ = _MASKED[kind]
            shape = layer.weight.shape
            signs = derive_seed(seed, "signs", name)
            fixed = _fixed_weights(shape, level / 2**bits, signs)
            layer.register_buffer("fixed", fixed, persistent=False)
            scores = torch.full(shape, float(score_table(bits)[level]))
            layer.weight, layer.bias = nn.Parameter(scores), None
        elif isinstance(layer, _NORMALISATION):
            layer.weight = layer.bias = None
        elif any(p.requires_grad for p in layer.parameters(recurse=False)):
            raise ConfigError(
                "model",
                f"one with {kind.__name__}",
                "made of convolutions, linear layers and normalisation for FedPM",
            )
    return model


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


def to_levels(probabilities: np.ndarray, bits: int) -> np.ndarray:
    """Round probabilities to those that can be sent.

    Parameters
    ----------
    probabilities : numpy.ndarray
        Floats ``(k,)`` in ``[0, 1]``.
    bits : int
        8 or 16.

    Returns
    -------
    numpy.ndarray
        uint8 or uint16 ``(k,)``, from 1 to ``2**bits - 1``: multiples of ``2**-bits``.
    """
    levels = np.rint(probabilities * 2.0**bits)
    return np.clip(levels, 1, 2**bits - 1).astype(_LEVELS[bits])


@functools.cache
def score_table(bits: int) -> FloatVector:
    """Return the score of every level.

    Parameters
    ----------
    bits : int
        8 or 16.

    Returns
    -------
    numpy.ndarray
        float32 ``(2**bits,)``, strictly rising: the logits of the levels'
        probabilities, -inf for level 0, which nothing is rounded to.
    """
    level = np.arange(2.0**bits)
    with np.errstate(divide="ignore"):
        return (np.log(level) - np.log(2.0**bits - level)).astype(np.float32)


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


def certain_scores(mask: BoolVector) -> torch.Tensor:
    """Return the scores that make a mask certain: inf where it is set, else -inf."""
    return torch.where(torch.from_numpy(mask), math.inf, -math.inf)


# ---- the server's half --------------------------------------------------------------


class FedPMStrategy(SyncStrategy[BoolVector]):
    """The server's half of FedPM.

    Parameters
    ----------
    *args : object
        See :class:`SyncStrategy`.
    config : FedPMConfig
        The hyper-parameters.
    **kwargs : object
        See :class:`SyncStrategy`.

    Attributes
    ----------
    ones : numpy.ndarray
        uint16 ``(d,)``, ones among the masks since the last reset.
    masks : int
        How many masks these were.
    expected : numpy.ndarray or None
        What the coder of the exchange's masks expects, see :func:`expected_bits`.

    Raises
    ------
    ConfigError
        Clients are to be weighted, values to be averaged or rounded in another way, or
        the masks are more than the counts can hold.
    """

    name = "fedpm"

    def __init__(self, *args: Any, config: FedPMConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config
        for key, value, only in (
            ("weighting", self.weighting, "uniform"),
            ("server_optimizer", self.optimizer.config.name, "fedavg"),
            ("quantization.bits", self.quantization.bits, 32),
            ("quantization.fp16", self.quantization.fp16, False),
        ):
            if value != only:
                raise ConfigError(key, value, f"{only} for FedPM, which counts masks")
        most = _MOST_MASKS // kwargs["num_clients"]
        if config.reset_every > most:
            raise ConfigError(
                "method.reset_every",
                config.reset_every,
                f"at most {most} for so many clients",
            )
        self.ones = np.zeros(self.dimension, np.uint16)
        self.masks = 0
        self.expected: np.ndarray | None = None

    def begin_exchange(self) -> None:
        """Fall back to the prior if it is time; every client sends a whole mask."""
        if (self.exchange - 1) % self.config.reset_every == 0:
            self.ones.fill(0)
            self.masks = 0
        self.expected = expected_bits(self.weights.numpy(), self.config)

    def write_values(self, writer: Writer, values: FloatVector) -> None:
        """Send scores as the levels of their probabilities."""
        table = score_table(self.config.probability_bits)
        dtype = _LEVELS[self.config.probability_bits]
        writer.vector(np.searchsorted(table, values).astype(dtype))

    def read_upload(self, reader: Reader) -> BoolVector:
        """Take one client's mask."""
        return reader.bitmap(self.dimension, self.expected)

    def add_upload(self, upload: BoolVector, weight: float) -> None:
        """Count one client's ones."""
        del weight
        self.ones += upload
        self.masks += 1

    def finish_exchange(self, total_weight: float) -> torch.Tensor:
        """Turn the counts into scores, of which there are but a few different ones."""
        del total_weight
        bits = self.config.probability_bits
        counts = np.arange(self.masks + 1)
        modes = posterior_mode(counts, self.masks, self.config.prior)
        scores = torch.from_numpy(score_table(bits)[to_levels(modes, bits)][self.ones])
        changed = scores != self.weights
        self.weights.copy_(scores)
        return changed

    def network(self) -> torch.Tensor:
        """Return the scores of a mask that is sampled anew after each exchange."""
        seed = derive_seed(self.seed, "network", self.exchange)
        return certain_scores(sample_mask(self.weights.sigmoid().numpy(), seed))

    def mean_network(self) -> torch.Tensor:
        """Return the scores themselves, by which every weight counts in part."""
        return self.weights

    def export(self, folder: Path, origin: dict[str, Any]) -> None:
        """Write the final network as a seed and a mask, for :func:`load_network`."""
        mask = (self.network() > 0).numpy()
        description = {
            **origin,
            "seed": self.seed,
            "level": self.config.initial_level,
            "bits": self.config.probability_bits,
            "checksum": _checksum(self.model, mask),
        }
        buffers = self.buffers.numpy().astype("<f4").tobytes()
        parts = (pack_description(description), encode_bitmap(mask), buffers)
        (folder / NETWORK_FILE).write_bytes(b"".join(parts))

    def method_state(self) -> dict[str, Any]:
        """Return the counts."""
        return {**as_tensors({"ones": self.ones}), "masks": self.masks}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.masks = state.pop("masks")
        self.ones = as_arrays(state)["ones"]


# ---- the final network --------------------------------------------------------------

NETWORK_FILE = "network.mask"
# What a description looks like: zlib then stores little but the differences, which
# counts where a whole network takes some thousand bytes. A part of the format.
_EXAMPLE = (
    b'{"model":"conv4","input_shape":[3,32,32],"num_classes":10,"options":{"width":16},'
    b'"seed":0,"level":51,"bits":8,"checksum":'
)
# No description is longer; a hostile file could claim gigabytes.
_MOST_DESCRIPTION = 2**16


def pack_description(description: dict[str, Any]) -> bytes:
    """Write down what a network is made of, as short as can be.

    Parameters
    ----------
    description : dict
        What JSON can hold.

    Returns
    -------
    bytes
        A zlib stream, which knows its own end.
    """
    line = json.dumps(description, separators=(",", ":")).encode()
    packer = zlib.compressobj(9, zdict=_EXAMPLE)
    return packer.compress(line) + packer.flush()


def unpack_description(data: bytes) -> tuple[Any, bytes]:
    """Read what :func:`pack_description` has written.

    Parameters
    ----------
    data : bytes
        The file's.

    Returns
    -------
    tuple
        The description, and the bytes that follow it.

    Raises
    ------
    zlib.error, ValueError
        The bytes do not begin with a description.
    """
    unpacker = zlib.decompressobj(zdict=_EXAMPLE)
    line = unpacker.decompress(data, _MOST_DESCRIPTION)
    return json.loads(line), unpacker.unused_data


def load_network(file: Path | str) -> nn.Module:
    """Rebuild the network that a run has left behind.

    Parameters
    ----------
    file : pathlib.Path or str
        ``network.mask`` in the run's folder: a packed description with the seed
        of the weights' signs, the coded mask, and what buffers the model has.

    Returns
    -------
    torch.nn.Module
        The network in evaluation mode, on the CPU. It maps inputs that are normalised
        as the run's to the logits that the run measured.

    Raises
    ------
    ConfigError
        The file is missing or damaged, or another release draws other signs from the
        seed.
    """
    try:
        made, rest = unpack_description(Path(file).read_bytes())
        shape, seed = tuple(made["input_shape"]), made["seed"]
        name, options = made["model"], made["options"]
        if made["bits"] not in _LEVELS:
            raise ValueError(f"probabilities of {made['bits']} bits")
        model = initial_model(name, shape, made["num_classes"], seed, **options)
        model = masked(model, made["level"], made["bits"], seed)
        mask, end = decode_bitmap(rest, 0, parameters_to_vector(model).numel())
        if len(rest) - end != 4 * buffers_to_vector(model).numel():
            raise ValueError(f"{len(rest)} bytes after its description")
        if _checksum(model, mask) != made["checksum"]:
            raise ValueError("other weights than were written")
    except (
        *(OSError, LookupError, TypeError, ValueError, RuntimeError),
        *(AttributeError, ArithmeticError, zlib.error),
    ) as error:
        raise ConfigError(
            "network", file, f"what FedPM has written ({error})"
        ) from error
    buffers = torch.from_numpy(np.frombuffer(rest, "<f4", offset=end).copy())
    nn.utils.vector_to_parameters(certain_scores(mask), model.parameters())
    vector_to_buffers(model, buffers)
    return model.eval()


def _checksum(model: nn.Module, mask: BoolVector) -> int:
    """Return the CRC-32 of a masked model's remaining weights."""
    kinds = (MaskedLinear, MaskedConv2d)
    parts = [m.fixed.flatten() for m in model.modules() if isinstance(m, kinds)]
    return vector_checksum(np.where(mask, torch.cat(parts).numpy(), np.float32(0)))


# ---- the client's half --------------------------------------------------------------


class FedPMClient(SyncClient):
    """The client's half of FedPM.

    Parameters
    ----------
    *args : object
        See :class:`SyncClient`.
    config : FedPMConfig
        The hyper-parameters.
    **kwargs : object
        See :class:`SyncClient`.
    """

    name = "fedpm"

    def __init__(self, *args: Any, config: FedPMConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def read_values(self, reader: Reader, length: int) -> FloatVector:
        """Take the levels of probabilities as scores."""
        bits = self.config.probability_bits
        levels = reader.vector(length, _LEVELS[bits])
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
        writer.bitmap(mask, expected_bits(task.weights.numpy(), self.config))
        return loss


METHOD = Method(FedPMConfig, FedPMStrategy, FedPMClient, adapt)
