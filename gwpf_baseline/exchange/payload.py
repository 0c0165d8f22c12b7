"""What travels: one array of bytes, and in it a header, bitmaps and vectors.

A payload is a header and then sections, coded bitmaps and vectors of floats or of small
integers, in the order in which they were written. Nothing is pickled. Whoever reads a
payload says at each step what it must hold; anything else is a :class:`WireError`,
before a single number of it is used.
"""

import warnings
import zlib
from collections import Counter
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from flwr.common import Parameters

from gwpf_baseline.exchange.coding import (
    MOST,
    Buffer,
    Classes,
    WireError,
    decode_bitmap,
    decode_number,
    decode_positions,
    encode_bitmap,
    encode_number,
    encode_positions,
    skip_positions,
)
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.utils import BoolVector, FloatVector

# The types of vectors, by the byte that announces one.
_DTYPES = tuple(np.dtype(t) for t in ("<f4", "<f2", "|i1", "<i2", "|u1", "<u2", "<i4"))
# How Flower is told what a tensor's bytes are.
_TENSOR_TYPE = "uint8"


class Part(StrEnum):
    """What the bytes of a section are spent on; all other bytes are overhead."""

    VALUES = "value"
    POSITIONS = "position"
    BUFFERS = "buffer"


#: Bytes of a payload by what they are spent on.
Sizes = Counter[Part]


class Sections:
    """Coded bitmaps and vectors, in the order in which the reader will ask for them.

    Parameters
    ----------
    code : bytes, default none
        What :meth:`code` returned of others, to go on from.
    sizes : Counter of Part, optional
        What that was spent on.

    Attributes
    ----------
    sizes : Counter of Part
        Bytes so far, by what they are spent on.
    """

    def __init__(self, code: bytes = b"", sizes: Sizes | None = None) -> None:
        self.sizes: Sizes = Counter(sizes or {})
        self._parts: list[Buffer] = [code]

    @property
    def size(self) -> int:
        """Return the bytes so far."""
        return self.sizes.total()

    def code(self) -> bytes:
        """Return the sections' bytes."""
        return b"".join(self._parts)

    def bitmap(
        self,
        bits: BoolVector,
        expected: np.ndarray | None = None,
        part: Part = Part.POSITIONS,
    ) -> None:
        """Append a bitmap, coded at its entropy.

        Parameters
        ----------
        bits : numpy.ndarray
            bool ``(n,)``.
        expected : numpy.ndarray, optional
            As of :func:`encode_bitmap`.
        part : Part, default positions
            What its bytes count as.
        """
        self._append(encode_bitmap(bits, expected), part)

    def positions(
        self, positions: np.ndarray, length: int, classes: Classes | None = None
    ) -> None:
        """Append a bitmap, given where its ones are.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(k,)``, rising.
        length : int
            The number of its bits.
        classes : Classes, optional
            As of :func:`encode_positions`.
        """
        self._append(encode_positions(positions, length, classes), Part.POSITIONS)

    def vector(self, values: np.ndarray, part: Part = Part.VALUES) -> None:
        """Append a vector.

        Parameters
        ----------
        values : numpy.ndarray
            ``(k,)``, float32 or float16, or integers of 8 to 32 bits, which travel as
            they are after a byte for the type and k. An empty vector costs nothing.
        part : Part, default values
            What its bytes count as.
        """
        if values.size:
            little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
            announced = bytes([_DTYPES.index(little.dtype)])
            self._append(announced + encode_number(little.size), part)
            self._append(little.data.cast("B"), part)

    def splice(self, sections: "Sections") -> None:
        """Append sections that were coded before.

        Parameters
        ----------
        sections : Sections
            They stay as they are, and can be appended to other payloads too.
        """
        self._parts.append(sections.code())
        self.sizes += sections.sizes

    def _append(self, code: Buffer, part: Part) -> None:
        self._parts.append(code)
        self.sizes[part] += len(code)


class Writer(Sections):
    """Builds a payload.

    Parameters
    ----------
    header : Header
        The payload's header.

    Attributes
    ----------
    kind : Kind
        What the payload is for; the header's until another is set.
    """

    def __init__(self, header: Header) -> None:
        super().__init__()
        self.kind = header.kind
        self._header = header

    def skip(self) -> None:
        """Say that there is nothing worth sending, and take back what was written."""
        self._parts.clear()
        self.sizes.clear()
        self.kind = Kind.SKIPPED

    def payload(self) -> bytes:
        """Return all bytes."""
        return b"".join([self._header.pack(self.kind), *self._parts])


class Reader:
    """Takes a payload apart, in the order in which it was written.

    Whatever it is asked for and is not there raises a `WireError`.

    Parameters
    ----------
    payload : bytes or memoryview
        The payload.
    method : str
        The receiver's method.
    length : int
        The receiver's d.

    Attributes
    ----------
    header : Header
        The checked header.
    sizes : Counter of Part
        Bytes read so far, by what they are spent on.

    Raises
    ------
    WireError
        The bytes are no payload, or not one for this receiver.
    """

    def __init__(self, payload: Buffer, method: str, length: int) -> None:
        self.header, self._offset = Header.unpack(payload, method, length)
        self.sizes: Sizes = Counter()
        self._frame = payload

    def bitmap(
        self,
        length: int,
        expected: np.ndarray | None = None,
        part: Part = Part.POSITIONS,
    ) -> BoolVector:
        """Take the next bitmap.

        Parameters
        ----------
        length : int
            The number of bits that it must have.
        expected : numpy.ndarray, optional
            As it was written with.
        part : Part, default positions
            What its bytes count as.

        Returns
        -------
        numpy.ndarray
            bool ``(length,)``.
        """
        bits, end = decode_bitmap(self._frame, self._offset, length, expected)
        self._advance(end, part)
        return bits

    def positions(
        self, length: int, classes: Classes | None = None, most: int = MOST
    ) -> np.ndarray:
        """Take the next bitmap, as the positions of its ones.

        Parameters
        ----------
        length : int
            The number of bits that it must have.
        classes : Classes, optional
            As it was written with.
        most : int, default MOST
            How many positions there may be.

        Returns
        -------
        numpy.ndarray
            int64 ``(k,)``, rising.
        """
        positions, end = decode_positions(
            self._frame, self._offset, length, classes, most
        )
        self._advance(end, Part.POSITIONS)
        return positions

    def skip_positions(self, length: int, classes: int) -> int:
        """Pass over the next bitmap, given by its ones' positions.

        Parameters
        ----------
        length : int
            The number of bits that it must have.
        classes : int
            How many classes it was written with; 1 if without.

        Returns
        -------
        int
            How many of its bits are set.
        """
        ones, end = skip_positions(self._frame, self._offset, length, classes)
        self._advance(end, Part.POSITIONS)
        return ones

    def vector(
        self,
        length: int,
        dtype: npt.DTypeLike = np.float32,
        part: Part = Part.VALUES,
    ) -> np.ndarray:
        """Take the next vector.

        Parameters
        ----------
        length : int
            The number of values that it must have.
        dtype : data type, default float32
            The type that they must have.
        part : Part, default values
            What its bytes count as.

        Returns
        -------
        numpy.ndarray
            ``(length,)`` of that type, all finite. It may be read-only.
        """
        wanted = np.dtype(dtype).newbyteorder("<")
        if length == 0:
            return np.zeros(0, wanted)
        frame, offset = self._frame, self._offset
        if offset >= len(frame) or frame[offset] >= len(_DTYPES):
            raise WireError(f"a vector of {length} values is missing")
        found = _DTYPES[frame[offset]]
        size, offset = decode_number(frame, offset + 1)
        if found != wanted or size != length:
            raise WireError(f"expected {length} {wanted} values, got {size} of {found}")
        end = offset + length * wanted.itemsize
        if end > len(frame):
            raise WireError(f"a vector of {length} values is cut short")
        values = np.frombuffer(frame, wanted, length, offset)
        if not is_finite(values):
            raise WireError("a value is NaN or infinite")
        self._advance(end, part)
        # PyTorch does not promise to compute with values that begin at odd addresses.
        return values if values.flags.aligned else values.copy()

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._offset != len(self._frame):
            raise WireError(f"{len(self._frame) - self._offset} bytes too many")

    def _advance(self, end: int, part: Part) -> None:
        self.sizes[part] += end - self._offset
        self._offset = end


def is_finite(values: np.ndarray) -> bool:
    """Tell whether no number of an array is NaN or infinite."""
    if values.dtype.kind != "f":
        return True
    # A sum in float64 is finite exactly if every value is: one pass, no mask.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.sum(values, dtype=np.float64)))


def to_parameters(payload: bytes) -> Parameters:
    """Wrap a payload up as Flower's ``Parameters``: one uint8 array, its plain bytes.

    ``numpy.save`` would put 128 bytes before them, which is more than the rest of an
    upload's overhead, and for sparse methods a large share of all that is sent.

    Parameters
    ----------
    payload : bytes
        The payload.

    Returns
    -------
    flwr.common.Parameters
        One tensor of type ``uint8``.
    """
    return Parameters([payload], _TENSOR_TYPE)


def from_parameters(parameters: Parameters) -> bytes:
    """Undo :func:`to_parameters`.

    Parameters
    ----------
    parameters : flwr.common.Parameters
        What arrived.

    Returns
    -------
    bytes
        The payload.

    Raises
    ------
    WireError
        Not exactly one array of bytes.
    """
    if len(parameters.tensors) != 1 or parameters.tensor_type != _TENSOR_TYPE:
        raise WireError(
            f"{len(parameters.tensors)} tensors of type {parameters.tensor_type!r}, "
            f"a payload is one of type {_TENSOR_TYPE}"
        )
    payload: bytes = parameters.tensors[0]
    return payload


def vector_checksum(vector: FloatVector | BoolVector) -> int:
    """Return the CRC-32 by which two sides see that they hold the same vector.

    Parameters
    ----------
    vector : numpy.ndarray
        float32 or bool ``(d,)``.

    Returns
    -------
    int
        In ``[0, 2**32)``.
    """
    wide = vector.astype("<f4", copy=False) if vector.dtype != np.bool_ else vector
    return zlib.crc32(np.ascontiguousarray(wide).data)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """View a payload's vector as a tensor, without a copy.

    Parameters
    ----------
    values : numpy.ndarray
        What a :class:`Reader` gave.

    Returns
    -------
    torch.Tensor
        A tensor that must only be read: it may alias immutable bytes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not w")
        return torch.from_numpy(values)
