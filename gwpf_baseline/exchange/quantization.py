"""Values in fewer bits, on the way of any method that sends some."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.payload import Part, Reader, Writer
from gwpf_baseline.utils import ConfigError, FloatVector, is_whole

# The signed integers that updates are rounded to, and travel as; those of fewer bits
# have so few values that they are coded at their entropy.
_LEVELS: dict[int, np.dtype] = {8: np.dtype(np.int8), 16: np.dtype("<i2")}
_CODED = (2, 3, 4)
_ROUNDINGS = ("nearest", "random")
_HALF = np.dtype("<f2")
_HALF_MAX = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Quantization:
    """How values travel.

    Parameters
    ----------
    bits : {32, 16, 8, 4, 3, 2}
        Bits of an update's value on its way to the server, its sign among them. Below
        32 it is rounded to a multiple of a step that each tensor has of its own; below
        8 the few multiples are coded at their entropy.
    fp16 : bool, default False
        Whether what otherwise travels in 32 bits, to the server or to clients, is cast
        to half precision. Buffers never are.
    rounding : {"nearest", "random"}
        To the nearest multiple; clients keep what that leaves out, and send it later
        (error feedback). Or to one of the two next to it at random, without bias, and
        nothing is kept: QSGD (Alistarh et al., NeurIPS 2017), which with 2 bits is
        TernGrad (Wen et al., NeurIPS 2017).

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    bits: int = 32
    fp16: bool = False
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_whole(self.bits) or self.bits not in (32, *_LEVELS, *_CODED):
            raise ConfigError(
                "quantization.bits", self.bits, "one of 32, 16, 8, 4, 3, 2"
            )
        if self.rounding not in _ROUNDINGS:
            allowed = f"one of {', '.join(_ROUNDINGS)}"
            raise ConfigError("quantization.rounding", self.rounding, allowed)
        if self.rounding == "random" and self.bits == 32:
            allowed = "nearest where quantization.bits=32"
            raise ConfigError("quantization.rounding", self.rounding, allowed)
        if not isinstance(self.fp16, bool):
            raise ConfigError("quantization.fp16", self.fp16, "true or false")

    @property
    def exact_model(self) -> bool:
        """Whether clients hold the global model to the bit."""
        return not self.fp16

    @property
    def feedback(self) -> bool:
        """Whether clients keep what rounding leaves out, and send it later."""
        return (self.bits < 32 or self.fp16) and self.rounding == "nearest"

    def write_values(self, writer: Writer, values: FloatVector) -> None:
        """Write a model's values.

        Parameters
        ----------
        writer : Writer
            The payload.
        values : numpy.ndarray
            float32 ``(k,)``; half precision cuts them off at 65504.
        """
        writer.vector(_halved(values) if self.fp16 else values)

    def read_values(self, reader: Reader, length: int) -> FloatVector:
        """Take what :meth:`write_values` wrote, float32 ``(length,)``."""
        if not self.fp16:
            return reader.vector(length)
        return reader.vector(length, _HALF).astype(np.float32)

    def write_update(
        self, writer: Writer, values: FloatVector, counts: Sequence[int], seed: int = 0
    ) -> FloatVector:
        """Write an update's values.

        Parameters
        ----------
        writer : Writer
            The payload.
        values : numpy.ndarray
            float32 ``(k,)``.
        counts : sequence of int
            How many of them belong to each tensor, in order.
        seed : int, default 0
            Of the draws, where rounding is random.

        Returns
        -------
        numpy.ndarray
            float32 ``(k,)``, what :meth:`read_update` will make of it.
        """
        if self.bits == 32:
            sent = _halved(values) if self.fp16 else values
            writer.vector(sent)
            return sent.astype(np.float32, copy=False)
        rng = np.random.default_rng(seed) if self.rounding == "random" else None
        levels, steps = quantize(values, counts, self.bits, rng)
        writer.vector(steps)
        if self.bits in _CODED:
            write_levels(writer, levels)
        else:
            writer.vector(levels)
        return dequantize(levels, steps, counts)

    def read_update(self, reader: Reader, counts: Sequence[int]) -> FloatVector:
        """Take what :meth:`write_update` wrote, float32 ``(sum(counts),)``.

        Raises
        ------
        WireError
            The payload holds something else.
        """
        if self.bits == 32:
            return self.read_values(reader, sum(counts))
        steps = reader.vector(sum(count > 0 for count in counts))
        if self.bits in _CODED:
            levels = read_levels(reader, sum(counts), self.bits)
        else:
            levels = reader.vector(sum(counts), _LEVELS[self.bits])
        limit = np.finfo(np.float32).max / 2**self.bits
        if np.abs(steps).max(initial=0) > limit:
            raise WireError(f"a step of quantisation is larger than {limit:.3g}")
        return dequantize(levels, steps, counts)


def _halved(values: FloatVector) -> np.ndarray:
    return np.clip(values, -_HALF_MAX, _HALF_MAX).astype(_HALF)


def quantize(
    values: FloatVector,
    counts: Sequence[int],
    bits: int,
    rng: np.random.Generator | None = None,
) -> tuple[np.ndarray, FloatVector]:
    """Round values to few levels.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(k,)``.
    counts : sequence of int
        How many of them belong to each tensor, in order.
    bits : {16, 8, 4, 3, 2}
        Bits of a level.
    rng : numpy.random.Generator, optional
        Rounds up or down at random, so that the mean is the value: QSGD, with a tensor
        as its bucket and the largest magnitude as its norm. Default: to the nearest.

    Returns
    -------
    levels : numpy.ndarray
        int8 or int16 ``(k,)``, symmetrical about 0.
    steps : numpy.ndarray
        float32, what a level is worth in each tensor that has any values: its largest
        magnitude divided by the largest level.
    """
    limit = 2 ** (bits - 1) - 1
    levels = np.zeros(values.size, _LEVELS.get(bits, _LEVELS[8]))
    steps = np.zeros(sum(count > 0 for count in counts), np.float32)
    stop = 0
    for number, count in enumerate(filter(None, counts)):
        start, stop = stop, stop + count
        part = values[start:stop]
        step = np.float32(np.abs(part).max() / limit)
        if step > 0:
            steps[number] = step
            scaled = part / step
            if rng is None:
                np.rint(scaled, out=scaled)
            else:
                scaled += rng.random(count, np.float32)
                np.floor(scaled, out=scaled)
            levels[start:stop] = np.clip(scaled, -limit, limit)
    return levels, steps


def write_levels(writer: Writer, levels: np.ndarray) -> None:
    """Code small levels at their entropy.

    A bitmap of those beyond 0; of these, one of the signs and one of those beyond 1; of
    these one of those beyond 2, and so on: by the chain rule all bitmaps together take
    what the shares of the magnitudes take, and the signs.

    Parameters
    ----------
    writer : Writer
        The payload.
    levels : numpy.ndarray
        int8 ``(k,)``.
    """
    sizes, limit = np.abs(levels), 0
    while True:
        beyond = sizes > limit
        writer.bitmap(beyond, part=Part.VALUES)
        if not beyond.any():
            return
        sizes = sizes[beyond]
        if not limit:
            writer.bitmap(levels[beyond] > 0, part=Part.VALUES)
        limit += 1


def read_levels(reader: Reader, length: int, bits: int) -> np.ndarray:
    """Undo :func:`write_levels`.

    Parameters
    ----------
    reader : Reader
        The payload.
    length : int
        The levels that it must have.
    bits : {4, 3, 2}
        Bits of a level.

    Returns
    -------
    numpy.ndarray
        int8 ``(length,)``.

    Raises
    ------
    WireError
        The payload holds something else, or a level of more bits.
    """
    levels = np.zeros(length, np.int8)
    places = np.arange(length)
    signs = np.zeros(0, np.int8)
    for limit in range(2 ** (bits - 1)):
        beyond = reader.bitmap(places.size, part=Part.VALUES)
        places = places[beyond]
        if not places.size:
            return levels
        if not limit:
            positive = reader.bitmap(places.size, part=Part.VALUES)
            signs = np.where(positive, np.int8(1), np.int8(-1))
        else:
            signs = signs[beyond]
        levels[places] += signs
    raise WireError(f"a level of more than {bits} bits")


def dequantize(
    levels: np.ndarray, steps: FloatVector, counts: Sequence[int]
) -> FloatVector:
    """Undo :func:`quantize`, up to its rounding.

    Parameters
    ----------
    levels, steps : numpy.ndarray
        As :func:`quantize` returned them.
    counts : sequence of int
        As given to it.

    Returns
    -------
    numpy.ndarray
        float32 ``(k,)``.
    """
    values = levels.astype(np.float32)
    stop = 0
    for step, count in zip(steps, filter(None, counts), strict=True):
        start, stop = stop, stop + count
        values[start:stop] *= step
    return values
