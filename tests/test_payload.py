"""Tests of the payload: what is written is read, and nothing else ever is."""

import io
import math
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gwpf_baseline.exchange.payload import (
    Header,
    Kind,
    Reader,
    WireError,
    Writer,
    as_tensor,
    decode_bitmap,
    encode_bitmap,
    parse_tensors,
    vector_checksum,
)

LENGTH = 300
BITS = np.arange(LENGTH) % 3 == 0
VALUES = np.linspace(-1, 1, LENGTH, dtype=np.float32)
HEADER = Header("gwpf", Kind.UPDATE, exchange=7, base=6, length=LENGTH)


def serialised(array: np.ndarray) -> bytes:
    """Return what NumPy, and so Flower, makes of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def payload(header: Header = HEADER) -> list[np.ndarray]:
    """Return a payload with two bitmaps and two vectors."""
    writer = Writer(header)
    writer.bitmap(BITS)
    writer.bitmap(~BITS[:50])
    writer.vector(VALUES)
    writer.vector(VALUES[:9])
    return writer.arrays()


def read(arrays: list[np.ndarray]) -> tuple[Header, list[np.ndarray]]:
    """Take `payload` apart as its receiver does."""
    reader = Reader(arrays, "gwpf", LENGTH)
    contents = [
        reader.bitmap(LENGTH),
        reader.bitmap(50),
        reader.vector(LENGTH),
        reader.vector(9),
    ]
    reader.finish()
    return reader.header, contents


def bitmap(size: int, density: float, seed: int = 0) -> np.ndarray:
    """Draw a bitmap."""
    return np.random.default_rng(seed).random(size) < density


# ---- bitmaps ------------------------------------------------------------------------


@given(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=200)
def test_a_bitmap_of_any_size_and_density_survives(
    size: int, density: float, seed: int
) -> None:
    """It also ends where the next one begins."""
    bits = bitmap(size, density, seed)
    code = encode_bitmap(bits)
    decoded, end = decode_bitmap(b"before" + code + b"after", 6, size)
    assert_array_equal(decoded, bits)
    assert decoded.dtype == np.bool_
    assert end == 6 + len(code)


@given(st.lists(st.booleans(), max_size=40))
@settings(deadline=None)
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
    assert len(encode_bitmap(bits)) <= 1.02 * entropy + 12 + 8


@pytest.mark.parametrize("sure", [0.5, 0.9, 255 / 256])
def test_what_is_expected_need_not_be_said(sure: float) -> None:
    """A bitmap costs what surprises in it, one percent more at most, and survives."""
    rng = np.random.default_rng(1)
    expected = np.where(rng.random(100_000) < 0.5, sure, 1 - sure)
    bits = rng.random(expected.size) < expected
    code = encode_bitmap(bits, expected)
    surprise = -np.log2(np.where(bits, expected, 1 - expected)).sum()
    assert 8 * len(code) <= 1.01 * surprise + 8 * 20
    decoded, end = decode_bitmap(code, 0, bits.size, expected)
    assert_array_equal(decoded, bits)
    assert end == len(code)


@given(st.binary(max_size=40), st.integers(0, 100), st.integers(1, 255))
def test_any_words_are_decoded_or_refused_as_expected(
    words: bytes, ones: int, level: int
) -> None:
    """Also where each bit has a probability of its own."""
    words = words[: len(words) // 4 * 4]
    expected = np.linspace(1, level, 100) / 256
    frame = struct.pack("<III", 100, ones, len(words)) + words
    try:
        bits, end = decode_bitmap(frame, 0, 100, expected)
    except WireError:
        return
    assert np.count_nonzero(bits) == ones and end == len(frame)


@pytest.mark.parametrize("value", [False, True])
def test_equal_bits_cost_nothing(value: bool) -> None:
    """Only the twelve bytes of lengths."""
    assert len(encode_bitmap(np.full(1_000_000, value))) == 12


def test_one_bit_in_a_million_survives() -> None:
    """Its probability is near the coder's resolution."""
    bits = np.zeros(2_000_000, np.bool_)
    bits[1_234_567] = True
    code = encode_bitmap(bits)
    assert len(code) <= 12 + 12
    assert_array_equal(decode_bitmap(code, 0, bits.size)[0], bits)


@pytest.mark.parametrize(
    ("size", "ones", "code_bytes"),
    [
        (LENGTH - 1, 100, None),  # other than the receiver's length
        (2**32 - 1, 100, None),
        (LENGTH, LENGTH + 1, None),  # more ones than bits
        (LENGTH, 99, None),  # not the ones that the code holds
        (LENGTH, 0, None),  # code where there is none to be
        (LENGTH, LENGTH, None),
        (LENGTH, 100, 0),  # no code where there must be some
        (LENGTH, 100, 3),  # not whole words
        (LENGTH, 100, 4),  # too few words
        (LENGTH, 100, 2**32 - 4),  # more than there are
    ],
)
def test_lengths_that_a_bitmap_belies_are_refused(
    size: int, ones: int, code_bytes: int | None
) -> None:
    """Size, count of ones and length of the code all have to agree."""
    code = encode_bitmap(BITS)[12:]
    lengths = struct.pack(
        "<III", size, ones, len(code) if code_bytes is None else code_bytes
    )
    with pytest.raises(WireError, match="bitmap|bytes cannot code"):
        decode_bitmap(lengths + code, 0, LENGTH)


def test_a_bitmap_cut_anywhere_is_refused() -> None:
    """Within its lengths or within its code."""
    code = encode_bitmap(BITS)
    for length in range(len(code)):
        with pytest.raises(WireError, match="short"):
            decode_bitmap(code[:length], 0, LENGTH)


# ---- payloads -----------------------------------------------------------------------


def test_a_payload_is_read_as_it_was_written() -> None:
    """Through NumPy's serialisation, as on the wire."""
    header, contents = read(parse_tensors([serialised(a) for a in payload()]))
    assert header == HEADER
    expected = (BITS, ~BITS[:50], VALUES, VALUES[:9])
    for content, value in zip(contents, expected, strict=True):
        assert_array_equal(content, value)
        assert content.dtype == value.dtype


@given(
    st.builds(
        Header,
        method=st.just("gwpf"),
        kind=st.sampled_from(Kind),
        exchange=st.integers(0, 2**31 - 1),
        base=st.integers(-1, 2**31 - 1),
        length=st.just(LENGTH),
        accepted=st.integers(0, 2**31 - 1),
        follow_up=st.booleans(),
        masked=st.booleans(),
        checksum=st.integers(0, 2**32 - 1),
    )
)
def test_every_header_survives(header: Header) -> None:
    """All its fields do."""
    assert Header.unpack(header.pack(), "gwpf", LENGTH) == header


def test_skipping_takes_back_what_was_written() -> None:
    """What is left is a header that says so, whatever had been written."""
    writer = Writer(HEADER)
    writer.bitmap(BITS)
    writer.vector(VALUES)
    assert not writer.skipped
    writer.skip()
    assert writer.skipped
    arrays = parse_tensors([serialised(a) for a in writer.arrays()])
    assert len(arrays) == 1 and arrays[0].size == len(HEADER.pack())
    reader = Reader(arrays, "gwpf", LENGTH)
    assert reader.header == replace(HEADER, kind=Kind.SKIPPED)
    reader.finish()


def test_what_follows_a_skipped_header_is_refused() -> None:
    """Nothing belongs there, neither in the frame nor beside it."""
    for add in (lambda w: w.bitmap(BITS), lambda w: w.vector(VALUES)):
        writer = Writer(HEADER)
        writer.skip()
        add(writer)
        with pytest.raises(WireError):
            Reader(writer.arrays(), "gwpf", LENGTH).finish()


def test_an_empty_vector_costs_nothing() -> None:
    """It is no array on the wire, and the reader makes it up."""
    writer = Writer(HEADER)
    writer.vector(np.zeros(0, np.float32))
    arrays = writer.arrays()
    assert len(arrays) == 1
    reader = Reader(arrays, "gwpf", LENGTH)
    assert reader.vector(0).shape == (0,)
    reader.finish()


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, 0x50, "format version"),  # the magic
        (2, 1, "format version"),
        (3, 0, "unknown kind"),
        (3, 7, "unknown kind"),
        (4, 4, "unknown kind of payload: 4, 4"),
        (4, 7, "unknown kind of payload: 4, 7"),
        (4, 0x80, "unknown kind of payload: 4, 128"),
        (5, 0x00, "not of method gwpf"),
        (21, 0xFF, "parameters, the model has 300"),
    ],
)
def test_a_wrong_header_is_refused(position: int, value: int, reason: str) -> None:
    """Each checked field, by the byte that holds it."""
    arrays = payload()
    arrays[0] = arrays[0].copy()
    assert arrays[0][position] != value
    arrays[0][position] = value
    with pytest.raises(WireError, match=reason):
        read(arrays)


def test_another_method_or_length_is_refused() -> None:
    """The receiver's own method and length count, not the payload's."""
    with pytest.raises(WireError, match="not of method apf"):
        Reader(payload(), "apf", LENGTH)
    with pytest.raises(WireError, match="for 300 parameters, the model has 301"):
        Reader(payload(), "gwpf", LENGTH + 1)


@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [VALUES],
        [np.frombuffer(HEADER.pack(), np.uint8).reshape(1, -1)],
        [np.frombuffer(HEADER.pack()[:-1], np.uint8)],
        [np.zeros(0, np.uint8)],
    ],
    ids=["nothing", "no frame", "two dimensions", "cut short", "empty"],
)
def test_what_does_not_begin_with_a_frame_is_refused(arrays: list[np.ndarray]) -> None:
    """A reader is not even built for it."""
    with pytest.raises(WireError, match="frame"):
        Reader(arrays, "gwpf", LENGTH)


def _with_nan(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(vector: np.ndarray) -> np.ndarray:
        return np.concatenate([vector[:-1], np.full(1, value, np.float32)])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda v: v[:-1], "expected 300 float32 values"),
        (lambda v: np.append(v, v[:1]), "expected 300 float32 values"),
        (lambda v: v.astype(np.float64), "expected 300 float32 values, got float64"),
        (lambda v: v.astype(np.float16), "expected 300 float32 values, got float16"),
        (lambda v: v.astype(">f4"), "expected 300 float32 values, got >f4"),
        (lambda v: v.view(np.int32), "expected 300 float32 values, got int32"),
        (lambda v: v.reshape(2, -1), "expected 300 float32 values"),
        (lambda v: v.astype(object), "expected 300 float32 values, got object"),
        (_with_nan(np.nan), "NaN or infinite"),
        (_with_nan(np.inf), "NaN or infinite"),
        (_with_nan(-np.inf), "NaN or infinite"),
    ],
)
def test_a_vector_that_is_not_what_belongs_there_is_refused(
    spoil: Callable[[np.ndarray], np.ndarray], reason: str
) -> None:
    """Length, type, shape and finiteness are checked before a value is used."""
    frame, values, more = payload()
    with pytest.raises(WireError, match=reason):
        read([frame, spoil(values), more])


@pytest.mark.filterwarnings("error")
def test_opposite_infinities_do_not_cancel() -> None:
    """Nor do the largest finite values overflow."""
    frame, values, more = payload()
    spoiled = values.copy()
    spoiled[:2] = np.inf, -np.inf
    with pytest.raises(WireError, match="NaN or infinite"):
        read([frame, spoiled, more])
    largest = np.full_like(values, np.finfo(np.float32).max)
    assert_array_equal(read([frame, largest, more])[1][2], largest)


def test_what_is_missing_or_left_over_is_refused() -> None:
    """A payload holds exactly what its receiver asks for."""
    frame, values, more = payload()
    with pytest.raises(WireError, match="a vector of 9 values is missing"):
        read([frame, values])
    with pytest.raises(WireError, match="1 vectors too many"):
        read([frame, values, more, more])
    with pytest.raises(WireError, match="2 bytes too many"):
        read([np.append(frame, np.zeros(2, np.uint8)), values, more])


# ---- serialised arrays --------------------------------------------------------------


TYPES = [np.uint8, np.int8, np.uint16, np.int16, np.float16, np.float32]


@given(st.integers(0, 2000), st.sampled_from(TYPES))
@settings(deadline=None)
def test_numpys_own_bytes_are_read(length: int, dtype: type) -> None:
    """For every length, since NumPy pads its header by it."""
    array: np.ndarray = np.arange(length).astype(dtype)
    (parsed,) = parse_tensors([serialised(array)])
    assert_array_equal(parsed, array)
    assert parsed.dtype == array.dtype
    assert parsed.flags.aligned


def _announcing(shape: str, descr: str = "<f4") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "tensor",
    [
        b"",
        b"\x93NUMPY",
        _announcing(f"({2**60},)"),
        _announcing("(999999999999,)"),
        _announcing("(17,)"),
        _announcing("(15,)"),
        _announcing("(-1,)"),
        _announcing("()"),
        _announcing("(4, 4)"),
        _announcing("(8,)", "<f8"),
        _announcing("(31,)", "<f2"),
        _announcing("(16,)", "<i4"),
        _announcing("(16,)", "|f4"),
        _announcing("(64,)", "|b1"),
        _announcing("(16,)", ">f4"),
        _announcing("(8,)", "|O"),
        _announcing("(__import__('os').getpid(),)"),
        serialised(np.array([{"a": 1}], object)),
        serialised(np.asfortranarray(np.ones((2, 2), np.float32))),
        pickle.dumps(VALUES),
        b"\x93NUMPY\x02\x00" + serialised(VALUES)[8:],
        serialised(VALUES)[:8] + b"\x00\x00" + serialised(VALUES)[10:],
        serialised(VALUES)[:-1],
        serialised(VALUES) + b"\x00",
    ],
)
def test_no_other_bytes_are_an_array(tensor: bytes) -> None:
    """They are refused for what they say, without room being made for it."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="tensor 0"):
            parse_tensors([tensor])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_the_announcement_used_above_is_sound() -> None:
    """The tests of wrong announcements would otherwise refuse for another reason."""
    assert_array_equal(parse_tensors([_announcing("(16,)")])[0], np.zeros(16))


# ---- fuzzing ------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """Draw a damaged copy of some bytes."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        place = st.integers(0, len(data))
        kind = draw(st.sampled_from(("truncate", "extend", "flip", "splice")))
        if kind == "truncate":
            del data[draw(place) :]
        elif kind == "extend":
            data += draw(st.binary(max_size=64))
        elif kind == "flip" and data:
            data[draw(place) % len(data)] ^= draw(st.integers(1, 255))
        else:
            start, stop = sorted((draw(place), draw(place)))
            data[draw(place) : draw(place)] = data[start:stop]
    return bytes(data)


def _read_or_refuse(tensors: list[bytes]) -> None:
    """Read; whatever gets through has to be all that the receiver relies on."""
    try:
        header, contents = read(parse_tensors(tensors))
    except WireError:
        return
    assert header.length == LENGTH
    assert [c.size for c in contents] == [LENGTH, 50, LENGTH, 9]
    assert [c.dtype for c in contents] == [np.bool_, np.bool_, np.float32, np.float32]
    assert all(np.isfinite(c).all() for c in contents[2:])


TENSORS = [serialised(array) for array in payload()]


@given(
    st.sampled_from(range(len(TENSORS))).flatmap(
        lambda i: st.tuples(st.just(i), damaged(TENSORS[i]))
    )
)
@settings(deadline=None, max_examples=400)
def test_damaged_tensors_are_read_or_refused(change: tuple[int, bytes]) -> None:
    """Damage to the serialised arrays ends in no other exception."""
    index, tensor = change
    _read_or_refuse([*TENSORS[:index], tensor, *TENSORS[index + 1 :]])


@given(damaged(payload()[0].tobytes()))
@settings(deadline=None, max_examples=400)
def test_a_damaged_frame_is_read_or_refused(frame: bytes) -> None:
    """Damage inside a sound array reaches the header and the coder."""
    tensor = serialised(np.frombuffer(frame, np.uint8))
    _read_or_refuse([tensor, *TENSORS[1:]])


@given(st.lists(st.sampled_from(TENSORS), max_size=5))
@settings(deadline=None)
def test_shuffled_tensors_are_read_or_refused(tensors: list[bytes]) -> None:
    """Missing, repeated and exchanged arrays."""
    _read_or_refuse(tensors)


@given(
    st.integers(0, 400),
    st.integers(0, 400),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
)
@settings(deadline=None, max_examples=400)
def test_any_words_are_decoded_or_refused(
    size: int, ones: int, words: list[int]
) -> None:
    """The coder panics on some words; a panic is no ``Exception``, nor is it let
    out."""
    code = np.array(words, "<u4").tobytes()
    frame = struct.pack("<III", size, ones, len(code)) + code
    try:
        bits, end = decode_bitmap(frame, 0, size)
    except WireError:
        return
    assert np.count_nonzero(bits) == ones
    assert end == len(frame)


# ---- small things -------------------------------------------------------------------


def test_the_checksum_tells_weights_apart() -> None:
    """By a single bit, and not by how they lie in memory."""
    changed = VALUES.copy()
    changed.view(np.uint32)[123] ^= 1
    assert vector_checksum(VALUES) != vector_checksum(changed)
    assert vector_checksum(np.repeat(VALUES, 2)[::2]) == vector_checksum(VALUES)


def test_as_tensor_copies_nothing() -> None:
    """A read-only array is viewed without a warning."""
    (array,) = parse_tensors([serialised(VALUES)])
    assert as_tensor(array).data_ptr() == array.ctypes.data
