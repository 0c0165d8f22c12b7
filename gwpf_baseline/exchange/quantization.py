"""Values in fewer bits, on the way of any method that sends some."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.payload import Reader, Writer
from gwpf_baseline.utils import ConfigError, FloatVector, is_number

# The signed integers that updates are rounded to.
_LEVELS: dict[int, np.dtype] = {8: np.dtype(np.int8), 16: np.dtype("<i2")}
_HALF = np.dtype("<f2")
_HALF_MAX = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Quantization:
    """How values travel.

    Parameters
    ----------
    bits : {32, 16, 8}
        Bits of an update's value on its way to the server. Below 32 it is rounded to
        the nearest multiple of a step that each tensor has of its own; clients keep
        what that leaves out, and send it later (error feedback).
    fp16 : bool, default False
        Whether what otherwise travels in 32 bits, to the server or to clients, is cast
        to half precision. Buffers never are.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    bits: int = 32
    fp16: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.bits) or self.bits not in (32, *_LEVELS):
            raise ConfigError("quantization.bits", self.bits, "one of 32, 16, 8")
        if not isinstance(self.fp16, bool):
            raise ConfigError("quantization.fp16", self.fp16, "true or false")

    @property
    def exact_model(self) -> bool:
        """Whether clients hold the global model to the bit."""
        return not self.fp16

    @property
    def exact_updates(self) -> bool:
        """Whether the server gets what clients have learned to the bit."""
        return self.bits == 32 and not self.fp16

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
        self, writer: Writer, values: FloatVector, counts: Sequence[int]
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

        Returns
        -------
        numpy.ndarray
            float32 ``(k,)``, what :meth:`read_update` will make of it.
        """
        if self.bits == 32:
            self.write_values(writer, values)
            return values if not self.fp16 else _halved(values).astype(np.float32)
        levels, steps = quantize(values, counts, self.bits)
        writer.vector(steps)
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
        levels = reader.vector(sum(counts), _LEVELS[self.bits])
        limit = np.finfo(np.float32).max / 2**self.bits
        if np.abs(steps).max(initial=0) > limit:
            raise WireError(f"a step of quantisation is larger than {limit:.3g}")
        return dequantize(levels, steps, counts)


def _halved(values: FloatVector) -> np.ndarray:
    return np.clip(values, -_HALF_MAX, _HALF_MAX).astype(_HALF)


def quantize(
    values: FloatVector, counts: Sequence[int], bits: int
) -> tuple[np.ndarray, FloatVector]:
    """Round values to few levels, each to the nearest.

    Beside error feedback, rounding at random and without bias (Alistarh et al.: QSGD,
    NeurIPS 2017) was measured to be no better; docs/gradient_pruning.md has the
    numbers.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(k,)``.
    counts : sequence of int
        How many of them belong to each tensor, in order.
    bits : {8, 16}
        Bits of a level.

    Returns
    -------
    levels : numpy.ndarray
        int8 or int16 ``(k,)``, symmetrical about 0.
    steps : numpy.ndarray
        float32, what a level is worth in each tensor that has any values: its largest
        magnitude divided by the largest level.
    """
    limit = 2 ** (bits - 1) - 1
    levels = np.zeros(values.size, _LEVELS[bits])
    steps = np.zeros(sum(count > 0 for count in counts), np.float32)
    stop = 0
    for number, count in enumerate(filter(None, counts)):
        start, stop = stop, stop + count
        part = values[start:stop]
        step = np.float32(np.abs(part).max() / limit)
        if step > 0:
            steps[number] = step
            levels[start:stop] = np.clip(np.rint(part / step), -limit, limit)
    return levels, steps


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
