"""Numbers and bitmaps in as few bytes as they need.

Whole numbers are written in groups of seven bits (LEB128, as in DWARF and Protocol
Buffers), bitmaps by a range coder at their entropy: where ones (or zeros) are rare by
the gaps between them, which takes as many steps as there are of these, else bit by bit.
Both say where they end, and nothing that a decoder reads is believed before it is
checked.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

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


class Classes(Protocol):
    """A division of a bitmap's places: those of a class are expected to be alike."""

    @property
    def sizes(self) -> list[int]:
        """Return how many places each class has."""

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """Return where places stand when one class follows the other.

        Parameters
        ----------
        places : numpy.ndarray
            int64 ``(k,)``, rising.

        Returns
        -------
        numpy.ndarray
            int32 ``(k,)``, rising.
        """

    def places(self, ranks: np.ndarray) -> np.ndarray:
        """Undo :meth:`ranks`.

        Parameters
        ----------
        ranks : numpy.ndarray
            Whole numbers ``(k,)`` from 0 on, rising and below the sum of `sizes`.

        Returns
        -------
        numpy.ndarray
            int64 ``(k,)``, rising.
        """


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
        places = np.flatnonzero(bits if rarer else ~bits).astype(np.int32)
        code = _encode_gaps(places, [count], [bits.size])
    elif 0 < ones < bits.size:
        encoder = _stream.queue.RangeEncoder()
        model = _bernoulli(ones, bits.size, expected)
        encoder.encode(bits.astype(np.int32), *model)
        code = encoder.get_compressed()
    else:
        code = _NOTHING
    return _with_lengths(code, bits.size, ones)


def encode_positions(
    positions: np.ndarray, length: int, classes: Classes | None = None
) -> bytes:
    """Code a bitmap, given where its ones are.

    Parameters
    ----------
    positions : numpy.ndarray
        int64 ``(k,)``, rising.
    length : int
        The number of bits, n <= `MOST`.
    classes : Classes, optional
        What both sides expect: that places of a class are as likely to be set as each
        other. Default: all are.

    Returns
    -------
    bytes
        What :func:`encode_bitmap` returns of the bitmap, which is not made where ones
        are rare. With classes, the ones are counted class by class, and coded by the
        gaps between them within each: within a few bytes of the sum of the classes'
        entropies.
    """
    if classes is not None:
        ranks = classes.ranks(positions)
        # Of another type than the bounds, all ranks would be converted first.
        ends = ranks.searchsorted(np.cumsum(classes.sizes, dtype=np.int32)).tolist()
        ones = [end - start for start, end in pairwise([0, *ends])]
        code = _encode_gaps(ranks, ones, classes.sizes)
    elif positions.size > _RARE * length:
        return encode_bitmap(marked(positions, length))
    else:
        ones = [positions.size]
        code = _encode_gaps(positions.astype(np.int32), ones, [length])
    return _with_lengths(code, length, *ones)


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
    (ones,), decoder, end = _open(frame, offset, [length])
    if decoder is None:
        return np.full(length, ones > 0), end
    rarer, count = _rarer(ones, length)
    with _checking(decoder):
        if expected is None and count <= _RARE * length:
            bits = marked(_decode_gaps(decoder, [count], [length]), length)
            if not rarer:
                np.logical_not(bits, out=bits)
        else:
            model, *parameters = _bernoulli(ones, length, expected)
            bits = decoder.decode(model, *(parameters or [length])).astype(np.bool_)
            if np.count_nonzero(bits) != ones:
                raise WireError("a bitmap's code does not hold the ones it announces")
    return bits, end


def decode_positions(
    frame: Buffer,
    offset: int,
    length: int,
    classes: Classes | None = None,
    most: int = MOST,
) -> tuple[np.ndarray, int]:
    """Undo :func:`encode_positions`.

    Parameters
    ----------
    frame : bytes or memoryview
        Bytes that hold a coded bitmap.
    offset : int
        Where it begins.
    length : int
        The number of bits that the receiver expects.
    classes : Classes, optional
        As they were given to :func:`encode_positions`.
    most : int, default MOST
        How many ones there may be.

    Returns
    -------
    positions : numpy.ndarray
        int64 ``(k,)``, where the bitmap's ones are, rising.
    offset : int
        The first byte after the code.

    Raises
    ------
    WireError
        As of :func:`decode_bitmap`, or more ones than there may be.
    """
    sizes = [length] if classes is None else classes.sizes
    ones, decoder, end = _open(frame, offset, sizes)
    if sum(ones) > most:
        raise WireError(f"a bitmap with {sum(ones)} ones, at most {most} are allowed")
    if classes is None and (decoder is None or ones[0] > _RARE * length):
        return np.flatnonzero(decode_bitmap(frame, offset, length)[0]), end
    with _checking(decoder):
        places = _decode_gaps(decoder, ones, sizes)
    if classes is None:
        return places.astype(np.int64), end
    return classes.places(places), end


def skip_positions(
    frame: Buffer, offset: int, length: int, classes: int
) -> tuple[int, int]:
    """Pass over a bitmap that :func:`encode_positions` wrote, without decoding it.

    Parameters
    ----------
    frame : bytes or memoryview
        Bytes that hold a coded bitmap.
    offset : int
        Where it begins.
    length : int
        The number of bits that the receiver expects.
    classes : int
        How many classes it was written with; 1 if without.

    Returns
    -------
    ones : int
        How many of the bits are set.
    offset : int
        The first byte after the code.

    Raises
    ------
    WireError
        Truncated, or of another length.
    """
    ones, words, offset = _read_lengths(frame, offset, length, classes)
    return sum(ones), offset + 4 * words


def _with_lengths(code: np.ndarray, *lengths: int) -> bytes:
    """Return a bitmap's code after what must be known to read it: its size and ones."""
    numbers = b"".join(map(encode_number, (*lengths, code.size)))
    return numbers + code.astype("<u4", copy=False).tobytes()


def _read_lengths(
    frame: Buffer, offset: int, length: int, classes: int
) -> tuple[list[int], int, int]:
    """Return how many ones each class has and the words of the code, which follow."""
    size, offset = decode_number(frame, offset)
    ones = []
    for _ in range(classes):
        count, offset = decode_number(frame, offset)
        ones.append(count)
    words, offset = decode_number(frame, offset)
    if size != length or sum(ones) > size:
        raise WireError(
            f"a bitmap of {size} bits, {sum(ones)} set, not of {length} bits"
        )
    if 4 * words > len(frame) - offset:
        raise WireError("a bitmap's code is cut short")
    return ones, words, offset


def _open(
    frame: Buffer, offset: int, sizes: Sequence[int]
) -> tuple[list[int], Any, int]:
    """Return how many ones each class has, what decodes them, if any, and the end."""
    ones, words, offset = _read_lengths(frame, offset, sum(sizes), len(sizes))
    beyond = [f"{o} ones in {s}" for o, s in zip(ones, sizes, strict=True) if o > s]
    if beyond:
        raise WireError(f"a class of a bitmap with {beyond[0]} places")
    told = all(o in (0, s) for o, s in zip(ones, sizes, strict=True))
    if (words == 0) != told:
        raise WireError(f"{words} words cannot code {ones} ones in {sizes} bits")
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
    if decoder is not None and not decoder.maybe_exhausted():
        raise WireError("a bitmap's code does not end with its last one")


def _bernoulli(ones: int, size: int, expected: np.ndarray | None) -> tuple:
    """Return the coder's model, and each bit's parameter if they differ."""
    if expected is None:
        return (_stream.model.Bernoulli(ones / size, perfect=False),)
    return _stream.model.Bernoulli(perfect=False), expected


def _rarer(ones: int, size: int) -> tuple[bool, int]:
    """Return which bit is the rarer one, and how many there are."""
    return (True, ones) if 2 * ones <= size else (False, size - ones)


# Whoever plays many clients decodes the same step for each of them.
@lru_cache(maxsize=32)
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


def _model(count: int, size: int) -> tuple[Any, int]:
    """Return :func:`_gaps` of a class, and no model where all of its bits are equal."""
    return (None, 1) if count in (0, size) else _gaps(count / size)


def _encode_gaps(
    places: np.ndarray, ones: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
    """Code the gaps before the ones of a bitmap, by the share that each class has.

    Parameters
    ----------
    places : numpy.ndarray
        int32 ``(k,)``, rising, where they are: the classes stand one after the other.
    ones : sequence of int
        How many of them each class has.
    sizes : sequence of int
        How many places each class has.
    """
    models, longest = zip(*map(_model, ones, sizes), strict=True)
    ends, starts = np.cumsum(ones), np.cumsum(sizes) - sizes
    gaps = places.copy()
    gaps[1:] -= places[:-1] + 1
    # The first gap of a class begins with the class.
    some = np.flatnonzero(ones)
    firsts = ends[some] - np.take(ones, some)
    gaps[firsts] = places[firsts] - starts[some]
    limits = np.repeat(np.array(longest, np.int32), ones)
    pieces, rest = np.divmod(gaps, limits)
    pieces += 1
    stops = np.cumsum(pieces)
    symbols = np.repeat(limits, pieces)
    symbols[stops - 1] = rest
    encoder, first = _stream.queue.RangeEncoder(), 0
    for model, last in zip(models, np.concatenate([[0], stops])[ends], strict=True):
        if model is not None:
            encoder.encode(symbols[first:last], model)
        first = last
    return encoder.get_compressed()


def _decode_gaps(decoder: Any, ones: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """Undo :func:`_encode_gaps`."""
    coded = [_decode_symbols(decoder, *each) for each in zip(ones, sizes, strict=True)]
    parts, longest = zip(*coded, strict=True)
    passed = np.array([part.sum(dtype=np.int64) for part in parts]) + ones
    if (passed > sizes).any():
        raise WireError("a bitmap's code goes beyond its end")
    # So no sum is above the bitmap's length.
    places = np.concatenate(parts)
    limits = np.array(longest, np.int32).repeat([part.size for part in parts])
    ends = places < limits
    places += ends
    places = places.cumsum(out=places)[ends]
    # What a class has after its last one is not passed.
    rest = np.array(sizes) - passed
    places += (rest.cumsum() - rest - 1).astype(np.int32).repeat(ones)
    return places


def _decode_symbols(decoder: Any, count: int, size: int) -> tuple[np.ndarray, int]:
    """Decode the symbols of a class's gaps, and return how long one can be, too."""
    model, longest = _model(count, size)
    if model is None:
        return np.zeros(count, np.int32), longest  # Of what is full, all gaps are 0.
    parts, room = [], count + size // longest
    while count:
        # At least as many symbols follow as gaps are left.
        symbols = decoder.decode(model, count)
        parts.append(symbols)
        count -= int(np.count_nonzero(symbols < longest))
        room -= symbols.size
        # So that no code makes this go on for ever.
        if room < 0:
            raise WireError("a bitmap's code goes beyond its end")
    return np.concatenate(parts), longest
