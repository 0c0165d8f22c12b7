"""Numbers and bitmaps in as few bytes as they need.

Whole numbers are written in groups of seven bits (LEB128, as in DWARF and Protocol
Buffers), bitmaps by a range coder at their entropy. Both say where they end, and
nothing that a decoder reads is believed before it is checked.
"""

import constriction
import numpy as np

from gwpf_baseline.utils import BoolVector

_stream = constriction.stream  # pylint: disable=no-member  # compiled
#: No number of a payload is larger: versions and lengths are counted in int32.
MOST = 2**31 - 1
#: Bytes that somebody else may own: what arrives is read where it lies.
Buffer = bytes | memoryview


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
    """Code a bitmap with a range coder under a Bernoulli model.

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
        encoder.encode(bits.astype(np.int32), *_bernoulli(ones, bits.size, expected))
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
