"""What travels: a frame of header and entropy-coded bitmaps, then vectors of values.

A payload is a short list of one-dimensional NumPy arrays. The first, uint8, is the
frame: a fixed header and the coded bitmaps, in the order in which they were written.
The others are vectors of values, of floats or of small integers. Nothing is pickled.
Whoever reads a payload says at each step what it must hold; anything else is a
:class:`WireError`, before a single number of it is used.
"""

import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import constriction
import numpy as np
import numpy.typing as npt
import torch

from gwpf_baseline.utils import BoolVector, FloatVector

FORMAT_VERSION = 2
_stream = constriction.stream  # pylint: disable=no-member  # compiled
_MAGIC = b"GW"
_HEADER = struct.Struct("<2sBBBIiiiII")
# length of the bitmap, number of ones, bytes of code that follow
_BITMAP = struct.Struct("<III")
# What numpy.save writes for a one-dimensional array of small floats or integers;
# nothing else is accepted, so no general parser ever sees a client's bytes.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00([\x00-\xff]{2})"
    rb"\{'descr': '(<f[24]|\|[iu]1|<[iu]2)', 'fortran_order': False, "
    rb"'shape': \((\d{1,12}),\), \} *\n"
)
_NPY_MAX_HEADER = 192


class WireError(ValueError):
    """A payload that is not what the receiver must be able to rely on."""


class Kind(IntEnum):
    """What a payload is for."""

    MODEL = 1  # server to client: the whole model
    CHANGES = 2  # server to client: a bitmap of what changed since `base`, and that
    MASKED = 3  # server to client: what changed is what you last uploaded
    UPDATE = 4  # client to server: what was learned
    LOST = 5  # client to server: I cannot follow; `base` is the version I do hold
    SKIPPED = 6  # client to server: what I learned is not worth sending


@dataclass(frozen=True)
class Header:
    """The fixed part of every payload.

    Parameters
    ----------
    method : str
        Name of the method; it travels as its CRC-32.
    kind : Kind
        What the payload is for.
    exchange : int
        Number of the exchange, and so of the mask, that the payload belongs to.
    base : int
        Version of the model that the payload builds on or that its sender holds: the
        last exchange whose outcome is in it, 0 for the initial weights that follow
        from the seed, -1 for none.
    accepted : int, default 0
        From the server: the last exchange whose upload by this client it used.
    length : int
        d, the length of the parameter vector.
    follow_up : bool, default False
        Whether this is a second exchange of a round: upload, but do not train.
    masked : bool, default False
        From the server: whether the mask of coordinates to upload is in the payload.
    checksum : int, default 0
        CRC-32 of what both sides must have alike although it does not travel: of the
        initial weights in payloads that build on them, of the mask in an upload whose
        sender derived it. Else 0.
    """

    method: str
    kind: Kind
    exchange: int
    base: int
    length: int
    accepted: int = 0
    follow_up: bool = False
    masked: bool = False
    checksum: int = 0

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.kind,
            self.follow_up | self.masked << 1,
            zlib.crc32(self.method.encode()),
            self.exchange,
            self.base,
            self.accepted,
            self.length,
            self.checksum,
        )

    @classmethod
    def unpack(cls, frame: bytes, method: str, length: int) -> "Header":
        """Read and check a header.

        Parameters
        ----------
        frame : bytes
            The frame, at least as long as a header.
        method : str
            The receiver's own method.
        length : int
            The receiver's own d.

        Returns
        -------
        Header
            The header.

        Raises
        ------
        WireError
            Another format, version, method or length.
        """
        if len(frame) < _HEADER.size:
            raise WireError(
                f"a frame of {len(frame)} bytes, a header has {_HEADER.size}"
            )
        (
            magic,
            version,
            kind,
            flags,
            name,
            exchange,
            base,
            accepted,
            d,
            checksum,
        ) = _HEADER.unpack_from(frame)
        if magic != _MAGIC or version != FORMAT_VERSION:
            raise WireError(
                f"not a payload of format version {FORMAT_VERSION}: "
                f"it begins with {frame[:3]!r}; run the same release on both sides"
            )
        if name != zlib.crc32(method.encode()):
            raise WireError(f"the payload is not of method {method}")
        if kind not in set(Kind) or flags > 3:
            raise WireError(f"unknown kind of payload: {kind}, {flags}")
        if d != length:
            raise WireError(f"a payload for {d} parameters, the model has {length}")
        return cls(
            method,
            Kind(kind),
            exchange,
            base,
            d,
            accepted,
            follow_up=bool(flags & 1),
            masked=bool(flags & 2),
            checksum=checksum,
        )


class Writer:
    """Builds a payload: bitmaps and vectors in the order the reader will ask for them.

    Parameters
    ----------
    header : Header
        The payload's header.

    Attributes
    ----------
    skipped : bool
        Whether the payload says that there is nothing worth sending.
    """

    def __init__(self, header: Header) -> None:
        self.skipped = False
        self._header = header
        self._frame = [header.pack()]
        self._vectors: list[np.ndarray] = []

    def bitmap(self, bits: BoolVector, expected: np.ndarray | None = None) -> None:
        """Append a bitmap, coded at its entropy.

        Parameters
        ----------
        bits : numpy.ndarray
            bool ``(n,)``.
        expected : numpy.ndarray, optional
            As of :func:`encode_bitmap`.
        """
        self._frame.append(encode_bitmap(bits, expected))

    def vector(self, values: np.ndarray) -> None:
        """Append a vector of values.

        Parameters
        ----------
        values : numpy.ndarray
            ``(k,)``, float32 or float16, or integers of 8 or 16 bits, which travel as
            they are. An empty vector costs nothing.
        """
        if values.size:
            little = values.dtype.newbyteorder("<")
            self._vectors.append(np.ascontiguousarray(values, dtype=little))

    def skip(self) -> None:
        """Say that there is nothing worth sending, and take back what was written."""
        skipped = replace(self._header, kind=Kind.SKIPPED)
        self._frame, self._vectors = [skipped.pack()], []
        self.skipped = True

    def arrays(self) -> list[np.ndarray]:
        """Return the payload as the list of arrays that Flower serialises."""
        return [np.frombuffer(b"".join(self._frame), np.uint8), *self._vectors]


class Reader:
    """Takes a payload apart, in the order in which it was written.

    Parameters
    ----------
    arrays : sequence of numpy.ndarray
        The payload.
    method : str
        The receiver's method.
    length : int
        The receiver's d.

    Attributes
    ----------
    header : Header
        The checked header.

    Raises
    ------
    WireError
        The arrays are no payload, or not one for this receiver.
    """

    def __init__(self, arrays: Sequence[np.ndarray], method: str, length: int) -> None:
        if not arrays or arrays[0].dtype != np.uint8 or arrays[0].ndim != 1:
            raise WireError("a payload begins with a one-dimensional uint8 frame")
        self._frame = arrays[0].tobytes()
        self._offset = _HEADER.size
        self._vectors = list(arrays[:0:-1])
        self.header = Header.unpack(self._frame, method, length)

    def bitmap(self, length: int, expected: np.ndarray | None = None) -> BoolVector:
        """Take the next bitmap.

        Parameters
        ----------
        length : int
            The number of bits that it must have.
        expected : numpy.ndarray, optional
            As it was written with.

        Returns
        -------
        numpy.ndarray
            bool ``(length,)``.
        """
        frame, offset = self._frame, self._offset
        bits, self._offset = decode_bitmap(frame, offset, length, expected)
        return bits

    def vector(self, length: int, dtype: npt.DTypeLike = np.float32) -> np.ndarray:
        """Take the next vector.

        Parameters
        ----------
        length : int
            The number of values that it must have.
        dtype : data type, default float32
            The type that they must have.

        Returns
        -------
        numpy.ndarray
            ``(length,)`` of that type, all finite. It may be read-only.
        """
        wanted = np.dtype(dtype).newbyteorder("<")
        if length == 0:
            return np.zeros(0, wanted)
        if not self._vectors:
            raise WireError(f"a vector of {length} values is missing")
        values = self._vectors.pop()
        if values.dtype != wanted or values.shape != (length,):
            raise WireError(
                f"expected {length} {wanted} values, got {values.dtype} {values.shape}"
            )
        # A sum in float64 is finite exactly if every value is: one pass, no mask.
        with np.errstate(invalid="ignore"):
            total = np.sum(values, dtype=np.float64)
        if not np.isfinite(total):
            raise WireError("a value is NaN or infinite")
        return values

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._vectors:
            raise WireError(f"{len(self._vectors)} vectors too many")
        if self._offset != len(self._frame):
            raise WireError(f"{len(self._frame) - self._offset} bytes too many")


def encode_bitmap(bits: BoolVector, expected: np.ndarray | None = None) -> bytes:
    """Code a bitmap with a range coder under a Bernoulli model.

    Parameters
    ----------
    bits : numpy.ndarray
        bool ``(n,)``, n < 2**32.
    expected : numpy.ndarray, optional
        float64 ``(n,)``, what both sides expect of each bit: the probability that it is
        set, above 0 and below 1. Default: of all bits the share of ones.

    Returns
    -------
    bytes
        12 bytes of lengths and, unless all bits are equal, the code: within a few
        bytes of n times the binary entropy of the share of ones, or of the sum of
        ``-log2`` of the probabilities that were expected of what the bits are.
    """
    ones = int(np.count_nonzero(bits))
    code = b""
    if 0 < ones < bits.size:
        encoder = _stream.queue.RangeEncoder()
        encoder.encode(bits.astype(np.int32), *_bernoulli(ones, bits.size, expected))
        code = encoder.get_compressed().astype("<u4", copy=False).tobytes()
    return _BITMAP.pack(bits.size, ones, len(code)) + code


def decode_bitmap(
    frame: bytes, offset: int, length: int, expected: np.ndarray | None = None
) -> tuple[BoolVector, int]:
    """Undo :func:`encode_bitmap`.

    Parameters
    ----------
    frame : bytes
        Bytes that hold a coded bitmap.
    offset : int
        Where it begins.
    length : int
        The number of bits that the receiver expects.
    expected : numpy.ndarray, optional
        As it was given to :func:`encode_bitmap`.

    Returns
    -------
    bits : numpy.ndarray
        bool ``(length,)``.
    offset : int
        The first byte after the code.

    Raises
    ------
    WireError
        Truncated, of another length, or its ones are not as many as it says.
    """
    if offset + _BITMAP.size > len(frame):
        raise WireError("a bitmap is missing or cut short")
    size, ones, nbytes = _BITMAP.unpack_from(frame, offset)
    offset += _BITMAP.size
    if size != length or ones > size:
        raise WireError(f"a bitmap of {size} bits, {ones} set, not of {length} bits")
    if nbytes > len(frame) - offset:
        raise WireError("a bitmap's code is cut short")
    if (nbytes == 0) != (ones in (0, size)) or nbytes % 4:
        raise WireError(f"{nbytes} bytes cannot code {ones} ones in {size} bits")
    end = offset + nbytes
    if nbytes == 0:
        return np.full(length, ones > 0), end
    decoder = _stream.queue.RangeDecoder(
        np.frombuffer(frame, "<u4", nbytes // 4, offset).astype(np.uint32)
    )
    try:
        model, *parameters = _bernoulli(ones, size, expected)
        bits = decoder.decode(model, *(parameters or [size])).astype(np.bool_)
    # The coder panics on some words that no encoder writes; a panic is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise WireError("a bitmap's code is damaged") from None
    if np.count_nonzero(bits) != ones or not decoder.maybe_exhausted():
        raise WireError("a bitmap's code does not hold the ones that it announces")
    return bits, end


def _bernoulli(ones: int, size: int, expected: np.ndarray | None) -> tuple:
    """Return the coder's model, and each bit's parameter if they differ."""
    if expected is None:
        return (_stream.model.Bernoulli(ones / size, perfect=False),)
    return _stream.model.Bernoulli(perfect=False), expected


def parse_tensors(tensors: Sequence[bytes]) -> list[np.ndarray]:
    """Read the serialised arrays of a Flower ``Parameters`` without trusting them.

    ``numpy.load`` evaluates the header it finds and allocates what that announces;
    this accepts only the headers that ``numpy.save`` writes for one-dimensional arrays
    of floats of 16 or 32 bits and integers of 8 or 16, followed by exactly the bytes
    they announce, and copies nothing.

    Parameters
    ----------
    tensors : sequence of bytes
        ``Parameters.tensors``.

    Returns
    -------
    list of numpy.ndarray
        Read-only views of the bytes.

    Raises
    ------
    WireError
        Anything else.
    """
    arrays = []
    for number, tensor in enumerate(tensors):
        match = _NPY.match(tensor[:_NPY_MAX_HEADER])
        if match is None or match.end() != 10 + int.from_bytes(match[1], "little"):
            raise WireError(f"tensor {number} is no flat array of small numbers")
        dtype = np.dtype(match[2].decode())
        if len(tensor) - match.end() != int(match[3]) * dtype.itemsize:
            raise WireError(
                f"tensor {number} announces {int(match[3])} values of {dtype} "
                f"but {len(tensor) - match.end()} bytes follow"
            )
        arrays.append(np.frombuffer(tensor, dtype, offset=match.end()))
    return arrays


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
