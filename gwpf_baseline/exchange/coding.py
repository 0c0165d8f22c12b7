"""Numbers and bitmaps in as few bytes as they need.

Whole numbers are written in groups of seven bits (LEB128, as in DWARF and Protocol
Buffers), bitmaps by a range coder at their entropy: where ones (or zeros) are rare by
the gaps between them, which takes as many steps as there are of these, else bit by bit.
Both say where they end, and nothing that a decoder reads is believed before it is
checked.
"""

import math
from typing import Any

import constriction
import numpy as np

from gwpf_baseline.utils import BoolVector

_stream = constriction.stream  # pylint: disable=no-member  # compiled
#: No number of a payload is larger: versions and lengths are counted in int32.
MOST = 2**31 - 1
#: Bytes that somebody else may own: what arrives is read where it lies.
Buffer = bytes | memoryview
# Up to this share of the rarer bit, gaps are coded; beyond, they save no time.
_RARE = 1 / 8
# A gap of so many bits or more is written in pieces.
_MOST_GAP = 4096


class WireError(ValueError):
    """A payload that is not what the receiver must be able to rely on."""


def encode_number(number: int) -> bytes:
    """Code a whole number.

    Parameters
    ----------
    number : int
        From 0 to `MOST`.

    Returns
    -------
    bytes
        One byte below 128, two below 16,384, and so on.
    """
    assert 0 <= number <= MOST
    code = bytearray()
    while number > 0x7F:
        code.append(number & 0x7F | 0x80)
        number >>= 7
    code.append(number)
    return bytes(code)


def decode_number(frame: Buffer, offset: int) -> tuple[int, int]:
    """Undo :func:`encode_number`.

    Parameters
    ----------
    frame : bytes or memoryview
        Bytes that hold a coded number.
    offset : int
        Where it begins.

    Returns
    -------
    number : int
        From 0 to `MOST`.
    offset : int
        The first byte after it.

    Raises
    ------
    WireError
        Cut short, too large, or not the shortest code of the number.
    """
    number = 0
    for place, byte in enumerate(frame[offset : offset + 5]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            # What has two codes could be changed on its way unnoticed.
            if number > MOST or (place and not byte):
                break
            return number, offset + place + 1
    raise WireError("a number is missing, cut short or too large")


def encode_bitmap(bits: BoolVector, expected: np.ndarray | None = None) -> bytes:
    """Code a bitmap with a range coder, under the model of independent bits.

    Parameters
    ----------
    bits : numpy.ndarray
        bool ``(n,)``, n <= `MOST`.
    expected : numpy.ndarray, optional
        float64 ``(n,)``, what both sides expect of each bit: the probability that it is
        set, above 0 and below 1. Default: of all bits the share of ones.

    Returns
    -------
    bytes
        Three numbers, its length, its ones and the code's words, and unless all bits
        are equal the code: within a few bytes of n times the binary entropy of the
        share of ones, or of the sum of ``-log2`` of the probabilities that were
        expected of what the bits are.
    """
    ones = int(np.count_nonzero(bits))
    code = np.zeros(0, "<u4")
    if 0 < ones < bits.size:
        encoder = _stream.queue.RangeEncoder()
        rarer, count = _rarer(ones, bits.size)
        if expected is None and count <= _RARE * bits.size:
            model, longest = _gaps(count / bits.size)
            encoder.encode(_to_gaps(bits if rarer else ~bits, longest), model)
        else:
            model = _bernoulli(ones, bits.size, expected)
            encoder.encode(bits.astype(np.int32), *model)
        code = encoder.get_compressed().astype("<u4", copy=False)
    lengths = b"".join(map(encode_number, (bits.size, ones, code.size)))
    return lengths + code.tobytes()


def decode_bitmap(
    frame: Buffer, offset: int, length: int, expected: np.ndarray | None = None
) -> tuple[BoolVector, int]:
    """Undo :func:`encode_bitmap`.

    Parameters
    ----------
    frame : bytes or memoryview
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
    size, offset = decode_number(frame, offset)
    ones, offset = decode_number(frame, offset)
    words, offset = decode_number(frame, offset)
    if size != length or ones > size:
        raise WireError(f"a bitmap of {size} bits, {ones} set, not of {length} bits")
    if 4 * words > len(frame) - offset:
        raise WireError("a bitmap's code is cut short")
    if (words == 0) != (ones in (0, size)):
        raise WireError(f"{words} words cannot code {ones} ones in {size} bits")
    end = offset + 4 * words
    if words == 0:
        return np.full(length, ones > 0), end
    decoder = _stream.queue.RangeDecoder(
        np.frombuffer(frame, "<u4", words, offset).astype(np.uint32)
    )
    try:
        rarer, count = _rarer(ones, size)
        if expected is None and count <= _RARE * size:
            bits = _from_gaps(decoder, count, size) == rarer
        else:
            model, *parameters = _bernoulli(ones, size, expected)
            bits = decoder.decode(model, *(parameters or [size])).astype(np.bool_)
    except WireError:
        raise
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


def _rarer(ones: int, size: int) -> tuple[bool, int]:
    """Return which bit is the rarer one, and how many there are."""
    return (True, ones) if 2 * ones <= size else (False, size - ones)


def _gaps(share: float) -> tuple[Any, int]:
    """Return the model of a gap between bits of a given share, and how long it can be.

    It is geometric. A gap of that length or more begins with pieces of that length, for
    which the model's last symbol stands: together as probable as the whole.
    """
    longest = min(math.ceil(2 / share), _MOST_GAP)
    # By products alone, which come to the same bits on every machine.
    probabilities = np.full(longest + 1, 1 - share)
    probabilities[0] = 1
    np.cumprod(probabilities, out=probabilities)
    probabilities[:-1] *= share
    return _stream.model.Categorical(probabilities, perfect=False), longest


def _to_gaps(bits: BoolVector, longest: int) -> np.ndarray:
    """Return the symbols of the gaps before each one."""
    pieces, rest = np.divmod(np.diff(np.flatnonzero(bits), prepend=-1) - 1, longest)
    ends = np.cumsum(pieces + 1) - 1
    symbols = np.full(ends[-1] + 1, longest, np.int32)
    symbols[ends] = rest
    return symbols


def _from_gaps(decoder: Any, count: int, size: int) -> BoolVector:
    """Decode the gaps before so many ones, and return the bitmap of these."""
    model, longest = _gaps(count / size)
    parts, found, passed = [], 0, 0
    while found < count:
        # At least as many symbols follow as ones are left.
        symbols = decoder.decode(model, count - found)
        ends = symbols < longest
        found += int(np.count_nonzero(ends))
        places = passed + np.cumsum(symbols + ends, dtype=np.int64)
        passed = int(places[-1])
        # Also so that no code makes this go on for ever.
        if passed > size:
            raise WireError("a bitmap's code goes beyond its end")
        parts.append(places[ends] - 1)
    bits = np.zeros(size, np.bool_)
    bits[np.concatenate(parts)] = True
    return bits
