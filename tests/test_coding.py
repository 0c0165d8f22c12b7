"""Tests of numbers and bitmaps in few bytes: what is written is read, no other is."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gwpf_baseline.exchange.coding import (
    MOST,
    WireError,
    decode_bitmap,
    decode_number,
    decode_positions,
    encode_bitmap,
    encode_number,
    encode_positions,
    skip_positions,
)

LENGTH = 300
# The first is coded bit by bit, the others by gaps between ones and between zeros.
BITMAPS = [
    np.arange(LENGTH) % 3 == 0,
    np.arange(LENGTH) % 11 == 0,
    np.arange(LENGTH) % 11 != 0,
]

numbers = st.integers(0, MOST) | st.sampled_from(
    [edge + k for edge in (2**7, 2**14, 2**21, 2**28) for k in (-1, 0)] + [0, MOST]
)


def bitmap(size: int, density: float, seed: int = 0) -> np.ndarray:
    """Draw a bitmap."""
    return np.random.default_rng(seed).random(size) < density


def lengths(*values: int) -> bytes:
    """Code the numbers that a bitmap begins with: its bits, its ones, its words."""
    return b"".join(map(encode_number, values))


def lengths_of(code: bytes) -> tuple[list[int], int]:
    """Return the numbers that a bitmap begins with, and where its words begin."""
    found, offset = [], 0
    for _ in range(3):
        number, offset = decode_number(code, offset)
        found.append(number)
    return found, offset


# ---- numbers ------------------------------------------------------------------------


@given(numbers, st.binary(max_size=8), st.binary(max_size=8))
def test_every_number_survives(number: int, before: bytes, after: bytes) -> None:
    """It also ends where the next thing begins, in bytes and in a view of them."""
    code = encode_number(number)
    for frame in (before + code + after, memoryview(before + code + after)):
        assert decode_number(frame, len(before)) == (number, len(before) + len(code))


@given(numbers)
def test_a_number_takes_a_byte_for_seven_bits(number: int) -> None:
    """All but the last byte say that there are more."""
    code = encode_number(number)
    assert len(code) == max(1, math.ceil(number.bit_length() / 7))
    assert [byte >= 0x80 for byte in code] == [True] * (len(code) - 1) + [False]


@given(numbers)
def test_a_number_cut_anywhere_is_refused(number: int) -> None:
    """Whatever was written before it."""
    code = encode_number(number)
    for length in range(len(code)):
        with pytest.raises(WireError, match="cut short"):
            decode_number(b"\x05" + code[:length], 1)


@given(numbers, st.integers(1, 6))
def test_only_the_shortest_code_is_read(number: int, more: int) -> None:
    """Leading zeros are refused: what has two codes can be changed unnoticed."""
    code = encode_number(number)
    longer = code[:-1] + bytes([code[-1] | 0x80]) + b"\x80" * (more - 1) + b"\x00"
    with pytest.raises(WireError, match="a number is missing"):
        decode_number(longer, 0)


@given(st.integers(MOST + 1, 2**70))
@example(MOST + 1)
@example(2**32 - 1)
@example(2**35 - 1)
@example(2**35)
def test_a_number_beyond_int32_is_refused(number: int) -> None:
    """Although the code is that of any other number."""
    code = bytearray()
    while number > 0x7F:
        code.append(number & 0x7F | 0x80)
        number >>= 7
    code.append(number)
    with pytest.raises(WireError, match="too large"):
        decode_number(bytes(code), 0)


@given(st.binary(max_size=8), st.integers(0, 10))
@settings(max_examples=300)
def test_any_bytes_are_the_code_of_one_number_or_refused(
    frame: bytes, offset: int
) -> None:
    """What is read is exactly what its writer would write."""
    try:
        number, end = decode_number(frame, offset)
    except WireError:
        return
    assert 0 <= number <= MOST
    assert frame[offset:end] == encode_number(number)


@pytest.mark.parametrize("number", [-1, MOST + 1])
def test_no_other_number_is_written(number: int) -> None:
    """It would be a mistake of ours."""
    with pytest.raises(AssertionError):
        encode_number(number)


# ---- bitmaps ------------------------------------------------------------------------


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_a_bitmap_of_any_size_and_density_survives(
    size: int, density: float, seed: int
) -> None:
    """It also ends where the next one begins; and so do its positions, in its code."""
    bits = bitmap(size, density, seed)
    code, ones = encode_bitmap(bits), np.flatnonzero(bits)
    assert encode_positions(ones, size) == code
    for frame in (b"before" + code + b"after", memoryview(b"before" + code + b"after")):
        decoded, end = decode_bitmap(frame, 6, size)
        assert_array_equal(decoded, bits)
        assert decoded.dtype == np.bool_
        assert end == 6 + len(code)
        positions, end = decode_positions(frame, 6, size)
        assert_array_equal(positions, ones)
        assert positions.dtype == np.int64
        assert end == 6 + len(code)


@given(st.lists(st.booleans(), max_size=40))
def test_every_short_bitmap_survives(bits: list[bool]) -> None:
    """Short ones have the most extreme densities: one of many, all but one."""
    decoded, _ = decode_bitmap(encode_bitmap(np.array(bits, np.bool_)), 0, len(bits))
    assert decoded.tolist() == bits


@pytest.mark.parametrize("density", [0.0002, 0.002, 0.02, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("size", [5_000, 61_706, 600_000])
def test_a_bitmap_costs_its_entropy(size: int, density: float) -> None:
    """Two percent and a few bytes more than the entropy of its share of ones."""
    bits = bitmap(size, density)
    share = np.count_nonzero(bits) / size
    entropy = -size * sum(p * math.log2(p) for p in (share, 1 - share) if p > 0) / 8
    assert len(encode_bitmap(bits)) <= 1.02 * entropy + 9 + 8


@pytest.mark.parametrize("sure", [0.5, 0.9, 255 / 256])
def test_what_is_expected_need_not_be_said(sure: float) -> None:
    """A bitmap costs what surprises in it, one percent more at most, and survives."""
    rng = np.random.default_rng(1)
    expected = np.where(rng.random(100_000) < 0.5, sure, 1 - sure)
    bits = rng.random(expected.size) < expected
    code = encode_bitmap(bits, expected)
    surprise = -np.log2(np.where(bits, expected, 1 - expected)).sum()
    assert 8 * len(code) <= 1.01 * surprise + 8 * 17
    decoded, end = decode_bitmap(code, 0, bits.size, expected)
    assert_array_equal(decoded, bits)
    assert end == len(code)


@pytest.mark.parametrize(("value", "cost"), [(False, 5), (True, 7)])
def test_equal_bits_cost_nothing(value: bool, cost: int) -> None:
    """Only the bytes of lengths: three for a million, one for zero."""
    assert len(encode_bitmap(np.full(1_000_000, value))) == cost


def test_one_bit_in_a_million_survives() -> None:
    """Its probability is near the coder's resolution."""
    bits = np.zeros(2_000_000, np.bool_)
    bits[1_234_567] = True
    code = encode_bitmap(bits)
    assert len(code) <= 5 + 12
    assert_array_equal(decode_bitmap(code, 0, bits.size)[0], bits)


@pytest.mark.parametrize("bits", BITMAPS)
@pytest.mark.parametrize(
    ("size", "more", "words"),
    [
        (LENGTH - 1, 0, None),  # other than the receiver's length
        (MOST, 0, None),
        (LENGTH, LENGTH, None),  # more ones than bits
        (LENGTH, MOST - LENGTH, None),
        (LENGTH, 1, None),  # not the ones that the code holds
        (LENGTH, -1, None),
        (LENGTH, -LENGTH, None),  # code where there is none to be
        (LENGTH, 0, 0),  # no code where there must be some
        (LENGTH, 0, 1),  # too few words
        (LENGTH, 0, 1000),  # more than there are
        (LENGTH, 0, MOST),
    ],
)
def test_lengths_that_a_bitmap_belies_are_refused(
    bits: np.ndarray, size: int, more: int, words: int | None
) -> None:
    """Size, count of ones and length of the code all have to agree; no room is made."""
    code = encode_bitmap(bits)
    (_, true_ones, true_words), start = lengths_of(code)
    ones = max(0, true_ones + more)
    announced = lengths(size, ones, true_words if words is None else words)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="bitmap|words cannot code"):
            decode_bitmap(announced + code[start:], 0, LENGTH)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_length_beyond_int32_is_refused(place: int) -> None:
    """As any number is."""
    code = encode_bitmap(BITMAPS[0])
    found, start = lengths_of(code)
    parts = [encode_number(number) for number in found]
    parts[place] = b"\xff\xff\xff\xff\x0f"
    with pytest.raises(WireError, match="too large"):
        decode_bitmap(b"".join(parts) + code[start:], 0, LENGTH)


@pytest.mark.parametrize("bits", BITMAPS)
def test_a_bitmap_cut_anywhere_is_refused(bits: np.ndarray) -> None:
    """Within its lengths or within its code."""
    code = encode_bitmap(bits)
    for length in range(len(code)):
        with pytest.raises(WireError, match="short"):
            decode_bitmap(code[:length], 0, LENGTH)


def test_gaps_longer_than_any_symbol_survive() -> None:
    """They are written in pieces; a bitmap may end in one."""
    bits = np.zeros(100_000, np.bool_)
    bits[[0, 1, 4095, 8191, 8192, 12_289, 60_000]] = True
    for each in (bits, bits[::-1], ~bits):
        decoded, _ = decode_bitmap(encode_bitmap(each), 0, each.size)
        assert_array_equal(decoded, each)


# ---- classes ------------------------------------------------------------------------


class Kinds:
    """Classes of places whose kinds are given: the slow, obvious ones."""

    def __init__(self, kinds: np.ndarray, count: int) -> None:
        self.kinds = kinds
        self.order = np.argsort(kinds, kind="stable")
        self.sizes = np.bincount(kinds, minlength=count).tolist()

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """Look every place up."""
        return np.sort(np.argsort(self.order)[places]).astype(np.int32)

    def places(self, ranks: np.ndarray) -> np.ndarray:
        """Look every rank up."""
        return np.sort(self.order[ranks])


@st.composite
def classed(draw: st.DrawFn) -> tuple[np.ndarray, Kinds]:
    """Draw a bitmap, of whose places some classes are rare, common, all or none."""
    shares = draw(
        st.lists(st.sampled_from([0, 0.01, 0.2, 0.7, 1]), min_size=1, max_size=5)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = rng.integers(0, len(shares), draw(st.integers(1, 600)), np.uint8)
    bits = rng.random(kinds.size) < np.array(shares)[kinds]
    return bits, Kinds(kinds, len(shares))


@given(classed(), st.binary(max_size=8))
def test_positions_of_any_classes_survive(
    drawn: tuple[np.ndarray, Kinds], after: bytes
) -> None:
    """Whatever follows them; who knows no classes can pass over them."""
    bits, classes = drawn
    positions = np.flatnonzero(bits)
    code = encode_positions(positions, bits.size, classes)
    frame = b"before" + code + after
    found, end = decode_positions(frame, 6, bits.size, classes)
    assert_array_equal(found, positions)
    assert found.dtype == positions.dtype and end == 6 + len(code)
    passed = skip_positions(frame, 6, bits.size, len(classes.sizes))
    assert passed == (positions.size, end)


def test_a_single_class_says_nothing() -> None:
    """Positions are then coded as without classes, and passed over alike."""
    classes = Kinds(np.zeros(5000, np.uint8), 1)
    positions = np.flatnonzero(bitmap(5000, 0.05))
    code = encode_positions(positions, 5000)
    assert encode_positions(positions, 5000, classes) == code
    assert skip_positions(code, 0, 5000, 1) == (positions.size, len(code))


def test_classes_cost_the_sum_of_their_entropies() -> None:
    """And a few bytes: here two thirds of what a single class would take."""
    kinds = (np.arange(50_000) % 8).astype(np.uint8)
    shares = np.array([0.3, 0.06, *[0.002] * 6])
    bits = np.random.default_rng(0).random(kinds.size) < shares[kinds]
    classes = Kinds(kinds, 8)
    entropy = 0.0
    for members in np.split(classes.order, np.cumsum(classes.sizes)[:-1]):
        share = bits[members].mean()
        rest = 1 - share
        entropy -= members.size * (share * math.log2(share) + rest * math.log2(rest))
    positions = np.flatnonzero(bits)
    code = encode_positions(positions, kinds.size, classes)
    assert entropy / 8 < len(code) < entropy / 8 + 40
    assert len(code) < 2 / 3 * len(encode_positions(positions, kinds.size))


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((9, 1, 1, 1), "a bitmap of 9 bits"),
        ((10, 5, 6, 1), "11 set"),
        ((10, 6, 2, 1), "6 ones in 5 places"),
        ((10, 5, 0, 1), "1 words cannot code"),
        ((10, 5, 1, 0), "0 words cannot code"),
        ((10, 5, 1, 2), "cut short"),
        ((10, 5), "number is missing"),
        ((10, 5, MOST, MOST), "set, not of 10 bits"),
    ],
)
def test_counts_that_classes_belie_are_refused(
    numbers: tuple[int, ...], reason: str
) -> None:
    """Of each class on its own."""
    classes = Kinds((np.arange(10) % 2).astype(np.uint8), 2)
    frame = lengths(*numbers) + (b"\0" * 4 if len(numbers) == 4 else b"")
    with pytest.raises(WireError, match=reason):
        decode_positions(frame, 0, 10, classes)


# ---- fuzzing ------------------------------------------------------------------------


@given(
    st.integers(0, 400),
    st.integers(0, 400),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
)
@settings(max_examples=400)
def test_any_words_are_decoded_or_refused(
    size: int, ones: int, words: list[int]
) -> None:
    """The coder panics on some words; a panic is no ``Exception``, nor is it let
    out."""
    code = np.array(words, "<u4").tobytes()
    frame = lengths(size, ones, len(words)) + code
    try:
        bits, end = decode_bitmap(frame, 0, size)
    except WireError:
        with pytest.raises(WireError):
            decode_positions(frame, 0, size)
        return
    assert np.count_nonzero(bits) == ones
    assert end == len(frame)
    positions, end = decode_positions(frame, 0, size)
    assert_array_equal(positions, np.flatnonzero(bits))
    assert end == len(frame)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=10),
    st.integers(0, 100),
    st.integers(1, 255),
)
def test_any_words_are_decoded_or_refused_as_expected(
    words: list[int], ones: int, level: int
) -> None:
    """Also where each bit has a probability of its own."""
    expected = np.linspace(1, level, 100) / 256
    code = struct.pack(f"<{len(words)}I", *words)
    frame = lengths(100, ones, len(words)) + code
    try:
        bits, end = decode_bitmap(frame, 0, 100, expected)
    except WireError:
        return
    assert np.count_nonzero(bits) == ones and end == len(frame)


@given(
    classed(),
    st.lists(st.integers(0, 30), min_size=5, max_size=5),
    st.lists(st.integers(0, 2**32 - 1), max_size=10),
)
@settings(max_examples=300)
def test_any_words_are_decoded_by_class_or_refused(
    drawn: tuple[np.ndarray, Kinds], counts: list[int], words: list[int]
) -> None:
    """Into as many ones in each class as are announced, each of them once."""
    bits, classes = drawn
    ones = counts[: len(classes.sizes)]
    code = np.array(words, "<u4").tobytes()
    frame = lengths(bits.size, *ones, len(words)) + code
    try:
        positions, end = decode_positions(frame, 0, bits.size, classes)
    except WireError:
        return
    assert end == len(frame)
    assert (np.diff(positions) > 0).all()
    found = np.bincount(classes.kinds[positions], minlength=len(ones))
    assert found.tolist() == ones
