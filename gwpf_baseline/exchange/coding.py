"""Numbers and bitmaps in as few bytes as they need.

Whole numbers are written in groups of seven bits (LEB128, as in DWARF and Protocol
Buffers), bitmaps by a range coder at their entropy: where ones (or zeros) are rare by
the gaps between them, which takes as many steps as there are of these, else bit by bit.
Both say where they end, and nothing that a decoder reads is believed before it is
checked.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import constriction
import numpy as np

from gwpf_baseline.coordinates import marked
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
_NOTHING = np.zeros(0, np.uint32)


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
    rarer, count = _rarer(ones, bits.size)
    if expected is None and count <= _RARE * bits.size:
        code = _encode_gaps(np.flatnonzero(bits if rarer else ~bits), bits.size)
    elif 0 < ones < bits.size:
        encoder = _stream.queue.RangeEncoder()
        model = _bernoulli(ones, bits.size, expected)
        encoder.encode(bits.astype(np.int32), *model)
        code = encoder.get_compressed()
    else:
        code = _NOTHING
    return _with_lengths(bits.size, ones, code)


def encode_positions(positions: np.ndarray, length: int) -> bytes:
    """Code a bitmap, given where its ones are.

    Parameters
    ----------
    positions : numpy.ndarray
        int64 ``(k,)``, rising.
    length : int
        The number of bits, n <= `MOST`.

    Returns
    -------
    bytes
        What :func:`encode_bitmap` returns of the bitmap, which is not made where ones
        are rare.
    """
    if positions.size > _RARE * length:
        return encode_bitmap(marked(positions, length))
    return _with_lengths(length, positions.size, _encode_gaps(positions, length))


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
    ones, decoder, end = _open(frame, offset, length)
    if decoder is None:
        return np.full(length, ones > 0), end
    rarer, count = _rarer(ones, length)
    with _checking(decoder):
        if expected is None and count <= _RARE * length:
            bits = marked(_decode_gaps(decoder, count, length), length)
            if not rarer:
                np.logical_not(bits, out=bits)
        else:
            model, *parameters = _bernoulli(ones, length, expected)
            bits = decoder.decode(model, *(parameters or [length])).astype(np.bool_)
            if np.count_nonzero(bits) != ones:
                raise WireError("a bitmap's code does not hold the ones it announces")
    return bits, end


def decode_positions(frame: Buffer, offset: int, length: int) -> tuple[np.ndarray, int]:
    """Undo :func:`encode_positions`.

    Parameters
    ----------
    frame : bytes or memoryview
        Bytes that hold a coded bitmap.
    offset : int
        Where it begins.
    length : int
        The number of bits that the receiver expects.

    Returns
    -------
    positions : numpy.ndarray
        int64 ``(k,)``, where the bitmap's ones are, rising.
    offset : int
        The first byte after the code.

    Raises
    ------
    WireError
        As of :func:`decode_bitmap`.
    """
    ones, decoder, end = _open(frame, offset, length)
    if decoder is None or ones > _RARE * length:
        return np.flatnonzero(decode_bitmap(frame, offset, length)[0]), end
    with _checking(decoder):
        positions = _decode_gaps(decoder, ones, length)
    return positions, end


def _with_lengths(size: int, ones: int, code: np.ndarray) -> bytes:
    """Return a bitmap's code after what must be known to read it."""
    lengths = b"".join(map(encode_number, (size, ones, code.size)))
    return lengths + code.astype("<u4", copy=False).tobytes()


def _open(frame: Buffer, offset: int, length: int) -> tuple[int, Any, int]:
    """Return how many ones a bitmap has, what decodes it, if any, and its end."""
    size, offset = decode_number(frame, offset)
    ones, offset = decode_number(frame, offset)
    words, offset = decode_number(frame, offset)
    if size != length or ones > size:
        raise WireError(f"a bitmap of {size} bits, {ones} set, not of {length} bits")
    if 4 * words > len(frame) - offset:
        raise WireError("a bitmap's code is cut short")
    if (words == 0) != (ones in (0, size)):
        raise WireError(f"{words} words cannot code {ones} ones in {size} bits")
    if words == 0:
        return ones, None, offset
    code = np.frombuffer(frame, "<u4", words, offset).astype(np.uint32)
    return ones, _stream.queue.RangeDecoder(code), offset + 4 * words


@contextmanager
def _checking(decoder: Any) -> Iterator[None]:
    """Raise what is wrong with the words that are decoded meanwhile."""
    try:
        yield
    except WireError:
        raise
    # The coder panics on some words that no encoder writes; a panic is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise WireError("a bitmap's code is damaged") from None
    if not decoder.maybe_exhausted():
        raise WireError("a bitmap's code does not end with its last one")


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


def _encode_gaps(positions: np.ndarray, size: int) -> np.ndarray:
    """Code the gaps before each of so many positions."""
    if not positions.size:
        return _NOTHING
    model, longest = _gaps(positions.size / size)
    pieces, rest = np.divmod(np.diff(positions, prepend=-1) - 1, longest)
    ends = np.cumsum(pieces + 1) - 1
    symbols = np.full(ends[-1] + 1, longest, np.int32)
    symbols[ends] = rest
    encoder = _stream.queue.RangeEncoder()
    encoder.encode(symbols, model)
    return encoder.get_compressed()


def _decode_gaps(decoder: Any, count: int, size: int) -> np.ndarray:
    """Decode the gaps before so many positions, and return these."""
    model, longest = _gaps(count / size)
    parts, found, passed = [], 0, 0
    while found < count:
        # At least as many symbols follow as positions are left.
        symbols = decoder.decode(model, count - found)
        ends = symbols < longest
        found += int(np.count_nonzero(ends))
        places = passed + np.cumsum(symbols + ends, dtype=np.int64)
        passed = int(places[-1])
        # Also so that no code makes this go on for ever.
        if passed > size:
            raise WireError("a bitmap's code goes beyond its end")
        parts.append(places[ends] - 1)
    return np.concatenate(parts)
