"""Tests of the payload: what is written is read, and nothing else ever is."""

import io
import math
import pickle
import tracemalloc
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
from flwr.common import Parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gwpf_baseline.exchange.coding import (
    MOST,
    WireError,
    encode_bitmap,
    encode_number,
)
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Sections,
    Writer,
    as_tensor,
    from_parameters,
    to_parameters,
    vector_checksum,
)

LENGTH = 300
BITS = np.arange(LENGTH) % 3 == 0
VALUES = np.linspace(-1, 1, LENGTH, dtype=np.float32)
HEADER = Header("gwpf", Kind.UPDATE, exchange=7, base=6, length=LENGTH)
# The bytes that announce the type of a vector's values.
FLOAT32, FLOAT16, INT8, INT16, UINT8, UINT16, INT32 = range(7)


def serialised(array: np.ndarray) -> bytes:
    """Return what NumPy, and so Flower by itself, makes of an array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def tensors(payload: bytes) -> list[bytes]:
    """Return what travels."""
    return to_parameters(payload).tensors


def parsed(*arrays: bytes) -> bytes:
    """Take the payload out of what travelled."""
    return from_parameters(Parameters(list(arrays), "uint8"))


def vector(dtype: int, length: int, data: bytes) -> bytes:
    """Code a vector, whatever it announces."""
    return bytes([dtype]) + encode_number(length) + data


# A header, two bitmaps and two vectors.
SECTIONS = [
    HEADER.pack(),
    encode_bitmap(BITS),
    encode_bitmap(~BITS[:50]),
    vector(FLOAT32, LENGTH, VALUES.tobytes()),
    vector(FLOAT32, 9, VALUES[:9].tobytes()),
]
PAYLOAD = b"".join(SECTIONS)


def written(header: Header = HEADER) -> Writer:
    """Write a payload with two bitmaps and two vectors."""
    writer = Writer(header)
    writer.bitmap(BITS)
    writer.bitmap(~BITS[:50], part=Part.VALUES)
    writer.vector(VALUES)
    writer.vector(VALUES[:9], Part.BUFFERS)
    return writer


def read(payload: bytes | memoryview) -> tuple[Header, list[np.ndarray]]:
    """Take such a payload apart as its receiver does."""
    reader = Reader(payload, "gwpf", LENGTH)
    contents = [
        reader.bitmap(LENGTH),
        reader.bitmap(50, part=Part.VALUES),
        reader.vector(LENGTH),
        reader.vector(9, part=Part.BUFFERS),
    ]
    reader.finish()
    return reader.header, contents


def with_section(place: int, section: bytes) -> bytes:
    """Return the payload with another section in one's place."""
    return b"".join([*SECTIONS[:place], section, *SECTIONS[place + 1 :]])


# ---- payloads -----------------------------------------------------------------------


def test_a_payload_is_read_as_it_was_written() -> None:
    """Through the one array that travels."""
    header, contents = read(parsed(*tensors(written().payload())))
    assert header == HEADER
    expected = (BITS, ~BITS[:50], VALUES, VALUES[:9])
    for content, value in zip(contents, expected, strict=True):
        assert_array_equal(content, value)
        assert content.dtype == value.dtype


def test_a_payload_is_its_header_and_its_sections_in_order() -> None:
    """Each begins where the one before ends."""
    assert written().payload() == PAYLOAD


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Draw a header; nobody builds on what is yet to come."""
    exchange = draw(st.integers(1, MOST - 1))
    return Header(
        method="gwpf",
        kind=draw(st.sampled_from(Kind)),
        exchange=exchange,
        base=draw(st.integers(-1, exchange)),
        length=LENGTH,
        used=draw(st.integers(0, exchange)),
        follow_up=draw(st.booleans()),
        with_mask=draw(st.booleans()),
        checksum=draw(st.integers(0, 2**32 - 1)),
    )


@given(headers(), st.binary(max_size=8))
def test_every_header_survives(header: Header, after: bytes) -> None:
    """All its fields do, and it ends where the next thing begins."""
    code = header.pack()
    assert Header.unpack(code + after, "gwpf", LENGTH) == (header, len(code))


@given(headers())
def test_a_header_cut_anywhere_is_refused(header: Header) -> None:
    """Before a field that it lacks is made up."""
    code = header.pack()
    for length in range(len(code)):
        with pytest.raises(WireError, match="header|number is missing, cut short"):
            Header.unpack(code[:length], "gwpf", LENGTH)


def test_skipping_takes_back_what_was_written() -> None:
    """What is left is a header that says so, whatever had been written."""
    writer = written()
    assert writer.kind is Kind.UPDATE and writer.size > 0
    writer.skip()
    assert writer.kind is Kind.SKIPPED and writer.size == 0
    payload = parsed(*tensors(writer.payload()))
    assert len(payload) == len(HEADER.pack())
    reader = Reader(payload, "gwpf", LENGTH)
    assert reader.header == replace(HEADER, kind=Kind.SKIPPED)
    reader.finish()


def test_what_follows_a_skipped_header_is_refused() -> None:
    """Nothing belongs there, neither a bitmap nor a vector."""
    for add in (lambda w: w.bitmap(BITS), lambda w: w.vector(VALUES)):
        writer = Writer(HEADER)
        writer.skip()
        add(writer)
        with pytest.raises(WireError, match="bytes too many"):
            Reader(writer.payload(), "gwpf", LENGTH).finish()


def test_an_empty_vector_costs_nothing() -> None:
    """It is no byte on the wire, and the reader makes it up."""
    writer = Writer(HEADER)
    writer.vector(np.zeros(0, np.float32))
    assert writer.payload() == HEADER.pack()
    reader = Reader(writer.payload(), "gwpf", LENGTH)
    assert reader.vector(0).shape == (0,)
    reader.finish()


def test_another_kind_may_be_set_while_writing() -> None:
    """The header says what became of it; nothing else of it changes."""
    writer = written()
    writer.kind = Kind.VALUES
    header, _ = read(writer.payload())
    assert header == replace(HEADER, kind=Kind.VALUES)


def test_both_sides_count_alike_what_bytes_are_spent_on() -> None:
    """By section; all that is not counted is the header."""
    writer = written()
    expected = {
        Part.POSITIONS: len(SECTIONS[1]),
        Part.VALUES: len(SECTIONS[2]) + len(SECTIONS[3]),
        Part.BUFFERS: len(SECTIONS[4]),
    }
    assert writer.sizes == expected
    assert writer.size == len(PAYLOAD) - len(HEADER.pack())
    reader = Reader(writer.payload(), "gwpf", LENGTH)
    reader.bitmap(LENGTH)
    assert reader.sizes == {Part.POSITIONS: len(SECTIONS[1])}
    reader.bitmap(50, part=Part.VALUES)
    reader.vector(LENGTH)
    reader.vector(9, part=Part.BUFFERS)
    assert reader.sizes == expected


def test_sections_can_be_kept_and_appended_to_many_payloads() -> None:
    """As they are, from their bytes as well, and beside what else is written."""
    kept = Sections()
    kept.bitmap(~BITS[:50], part=Part.VALUES)
    kept.vector(VALUES)
    code = kept.code()
    for sections in (kept, Sections(code, kept.sizes), kept):
        writer = Writer(HEADER)
        writer.bitmap(BITS)
        writer.splice(sections)
        writer.vector(VALUES[:9], Part.BUFFERS)
        assert writer.payload() == PAYLOAD
        assert writer.sizes == written().sizes
    assert kept.code() == code and kept.size == len(code)


# magic 0-1, version 2, kind and flags 3, method 4-7, then the numbers: length 8-9,
# exchange 10, exchanges since the base 11, since an upload was used 12
@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (0, 0x50, "format version"),
        (1, 0x50, "format version"),
        (2, 6, "format version"),
        (2, 8, "format version"),
        (3, 0, "unknown kind"),
        (3, 8, "unknown kind"),
        (3, 0x84, "unknown kind of payload: 4, 128"),
        (3, 0xF4, "unknown kind of payload: 4, 240"),
        (4, 0x00, "not of method gwpf"),
        (7, 0x00, "not of method gwpf"),
        (8, 0xFF, "for 383 parameters, the model has 300"),
        (9, 0x01, "for 172 parameters, the model has 300"),
        (9, 0x82, "parameters, the model has 300"),  # the number goes on
        (9, 0x00, "a number is missing"),  # not its shortest code
        (11, 9, "a version before the first"),
        (12, 8, "a version before the first"),
    ],
)
def test_a_wrong_header_is_refused(position: int, value: int, reason: str) -> None:
    """Each checked field, by the byte that holds it."""
    damaged = bytearray(PAYLOAD)
    assert damaged[position] != value
    damaged[position] = value
    with pytest.raises(WireError, match=reason):
        read(bytes(damaged))


def test_the_positions_above_are_those_of_the_fields() -> None:
    """A header of thirteen bytes, and four of a checksum where there is one."""
    code = HEADER.pack()
    assert len(code) == 13
    assert code[:4] == b"GW\x07\x04"
    assert code[8:] == b"\xac\x02\x07\x01\x07"
    checked = replace(HEADER, checksum=0x01020304, follow_up=True, with_mask=True)
    assert checked.pack()[3] == 0x74
    assert checked.pack()[13:] == b"\x04\x03\x02\x01"


def test_another_method_or_length_is_refused() -> None:
    """The receiver's own method and length count, not the payload's."""
    with pytest.raises(WireError, match="not of method apf"):
        Reader(PAYLOAD, "apf", LENGTH)
    with pytest.raises(WireError, match="for 300 parameters, the model has 301"):
        Reader(PAYLOAD, "gwpf", LENGTH + 1)


@pytest.mark.parametrize(
    "payload",
    [b"", PAYLOAD[:7], PAYLOAD[:12], VALUES.tobytes(), b"".join(SECTIONS[1:])],
    ids=["empty", "no method", "no number", "values", "no header"],
)
def test_what_does_not_begin_with_a_header_is_refused(payload: bytes) -> None:
    """A reader is not even built for it."""
    with pytest.raises(WireError, match="no header|number is missing|format version"):
        Reader(payload, "gwpf", LENGTH)


def test_a_payload_cut_anywhere_is_refused() -> None:
    """Although the array that it travels in announces the bytes that are left."""
    for length in range(len(PAYLOAD)):
        with pytest.raises(WireError):
            read(parsed(*tensors(PAYLOAD[:length])))


def _ending_in(value: float) -> bytes:
    return np.append(VALUES[:-1], np.float32(value)).tobytes()


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (vector(FLOAT32, 299, VALUES[1:].tobytes()), "300 float32 values, got 299 of"),
        (vector(FLOAT32, 301, bytes(1204)), "300 float32 values, got 301 of float32"),
        (vector(FLOAT32, 0, b""), "300 float32 values, got 0 of float32"),
        (vector(FLOAT32, MOST, bytes(1200)), "300 float32 values, got 2147483647 of"),
        (vector(FLOAT16, 300, bytes(600)), "expected 300 float32 values, got 300 of f"),
        (vector(INT8, 300, bytes(300)), "300 float32 values, got 300 of int8"),
        (vector(INT16, 300, bytes(600)), "300 float32 values, got 300 of int16"),
        (vector(UINT8, 300, bytes(300)), "300 float32 values, got 300 of uint8"),
        (vector(UINT16, 300, bytes(600)), "300 float32 values, got 300 of uint16"),
        (vector(INT32, 300, bytes(1200)), "300 float32 values, got 300 of int32"),
        (vector(7, 300, bytes(2400)), "a vector of 300 values is missing"),
        (vector(255, 300, bytes(2400)), "a vector of 300 values is missing"),
        (b"\x00\xac\x82\x00" + VALUES.tobytes(), "a number is missing"),
        (b"\x00\xff\xff\xff\xff\x0f" + VALUES.tobytes(), "too large"),
        (vector(FLOAT32, LENGTH, _ending_in(np.nan)), "NaN or infinite"),
        (vector(FLOAT32, LENGTH, _ending_in(np.inf)), "NaN or infinite"),
        (vector(FLOAT32, LENGTH, _ending_in(-np.inf)), "NaN or infinite"),
    ],
)
def test_a_vector_that_is_not_what_belongs_there_is_refused(
    section: bytes, reason: str
) -> None:
    """Length, type and finiteness are checked before a value is used or room made."""
    payload = with_section(3, section)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=reason):
            read(payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("dtype", [np.float64, np.uint32, np.int64, np.bool_, object])
def test_other_types_are_not_written(dtype: type) -> None:
    """It would be a mistake of ours: nobody could announce them."""
    with pytest.raises(ValueError, match="not in"):
        Writer(HEADER).vector(VALUES.astype(dtype))


def test_how_a_vector_lies_in_memory_does_not_travel() -> None:
    """Neither the order of its bytes nor the gaps between its values."""
    codes = set()
    for values in (VALUES, VALUES.astype(">f4"), np.repeat(VALUES, 2)[::2]):
        writer = Writer(HEADER)
        writer.vector(values)
        codes.add(writer.code())
    assert codes == {SECTIONS[3]}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.int16, np.uint8])
def test_values_are_aligned_wherever_they_began(dtype: type) -> None:
    """PyTorch may not compute with values at odd addresses."""
    values: np.ndarray = np.arange(20).astype(dtype)
    for blanks in range(8):
        writer = Writer(HEADER)
        writer.vector(values)
        payload = bytearray(blanks) + writer.payload()
        found = Reader(memoryview(payload)[blanks:], "gwpf", LENGTH).vector(20, dtype)
        assert found.flags.aligned
        assert_array_equal(found, values)


@pytest.mark.filterwarnings("error")
def test_opposite_infinities_do_not_cancel() -> None:
    """Nor do the largest finite values overflow."""
    spoiled = VALUES.copy()
    spoiled[:2] = np.inf, -np.inf
    with pytest.raises(WireError, match="NaN or infinite"):
        read(with_section(3, vector(FLOAT32, LENGTH, spoiled.tobytes())))
    largest = np.full_like(VALUES, np.finfo(np.float32).max)
    sound = with_section(3, vector(FLOAT32, LENGTH, largest.tobytes()))
    assert_array_equal(read(sound)[1][2], largest)


def test_what_is_missing_or_left_over_is_refused() -> None:
    """A payload holds exactly what its receiver asks for."""
    with pytest.raises(WireError, match="a vector of 9 values is missing"):
        read(b"".join(SECTIONS[:-1]))
    with pytest.raises(WireError, match=f"{len(SECTIONS[-1])} bytes too many"):
        read(PAYLOAD + SECTIONS[-1])
    with pytest.raises(WireError, match="2 bytes too many"):
        read(PAYLOAD + bytes(2))


# ---- what they cost -----------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.01, 0.02, 0.1, 0.5])
def test_votes_and_values_cost_what_they_say(density: float) -> None:
    """For LeNet-5: 175 bytes at most beside them; at 2 %, a fiftieth of all."""
    dimension = 61_706
    active = round(density * dimension)
    rng = np.random.default_rng(0)
    votes = rng.random(dimension - active) < density
    writer = Writer(Header("gwpf", Kind.UPDATE, 2, 1, dimension))
    writer.bitmap(votes)
    writer.vector(rng.standard_normal(active, np.float32))
    (tensor,) = tensors(writer.payload())
    share = votes.mean()
    entropy = -votes.size * sum(p * math.log2(p) for p in (share, 1 - share))
    code = encode_bitmap(votes)
    ones = int(np.count_nonzero(votes))
    announced = b"".join(map(encode_number, (votes.size, ones, len(code) // 4)))
    words = len(code) - len(announced)
    assert words % 4 == 0 and 8 * words <= 1.01 * entropy + 64
    assert len(tensor) - words - 4 * active <= 175
    if density == 0.02:
        assert 8 * len(tensor) <= 1.02 * (32 * active + entropy)


# ---- arrays -------------------------------------------------------------------------


@given(st.binary(max_size=2000))
def test_a_payload_travels_as_its_plain_bytes(payload: bytes) -> None:
    """Nothing is put before them, and nothing is copied."""
    parameters = to_parameters(payload)
    assert parameters.tensors == [payload] and parameters.tensor_type == "uint8"
    assert from_parameters(parameters) is payload


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ([], "uint8"),
        ([PAYLOAD, PAYLOAD], "uint8"),
        ([PAYLOAD, b""], "uint8"),
        ([PAYLOAD], "numpy.ndarray"),
        ([serialised(np.frombuffer(PAYLOAD, np.uint8))], "numpy.ndarray"),
        ([serialised(VALUES)], "numpy.ndarray"),
        ([PAYLOAD], ""),
    ],
)
def test_a_payload_is_exactly_one_array_of_bytes(
    arrays: list[bytes], kind: str
) -> None:
    """Neither none, nor another one beside it, nor one in NumPy's format."""
    with pytest.raises(WireError, match="a payload is one of type uint8"):
        from_parameters(Parameters(arrays, kind))


@pytest.mark.parametrize(
    "tensor",
    [
        b"",
        b"GW",
        serialised(np.frombuffer(PAYLOAD, np.uint8)),
        serialised(np.array([{"a": 1}], object)),
        pickle.dumps(PAYLOAD),
        b" " + PAYLOAD,
        PAYLOAD[1:],
    ],
)
def test_no_other_bytes_are_a_payload(tensor: bytes) -> None:
    """They are refused for how they begin, without room being made for anything."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="payload"):
            read(parsed(tensor))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


# ---- fuzzing ------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, original: bytes, start: int, stop: int) -> bytes:
    """Draw a copy of some bytes that is damaged between two places."""
    data = bytearray(original[start:stop])
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
            first, last = sorted((draw(place), draw(place)))
            data[draw(place) : draw(place)] = data[first:last]
    return original[:start] + bytes(data) + original[stop:]


def _read_or_refuse(*arrays: bytes) -> None:
    """Read; whatever gets through has to be all that the receiver relies on."""
    try:
        header, contents = read(parsed(*arrays))
    except WireError:
        return
    assert header.length == LENGTH
    assert header.kind in set(Kind)
    assert -1 <= header.base <= header.exchange <= MOST
    assert 0 <= header.used <= header.exchange
    assert [c.size for c in contents] == [LENGTH, 50, LENGTH, 9]
    assert [c.dtype for c in contents] == [np.bool_, np.bool_, np.float32, np.float32]
    assert all(np.isfinite(c).all() for c in contents[2:])


TENSOR = tensors(PAYLOAD)[0]
SPANS = list(pairwise(accumulate(map(len, SECTIONS), initial=0)))
NAMES = ["header", "bitmap", "short bitmap", "vector", "short vector"]


@given(damaged(PAYLOAD, 0, len(PAYLOAD)))
@settings(max_examples=400)
def test_a_damaged_payload_is_read_or_refused(payload: bytes) -> None:
    """Damage reaches the header, the coder and the vectors, and ends in no other
    exception."""
    _read_or_refuse(*tensors(payload))


@pytest.mark.parametrize("span", SPANS, ids=NAMES)
@given(st.data())
@settings(max_examples=200)
def test_a_payload_with_a_damaged_section_is_read_or_refused(
    span: tuple[int, int], data: st.DataObject
) -> None:
    """Each section by itself, between sound ones."""
    payload = data.draw(damaged(PAYLOAD, *span))
    _read_or_refuse(*tensors(payload))


@given(st.lists(st.sampled_from(SECTIONS), max_size=7))
def test_shuffled_sections_are_read_or_refused(sections: list[bytes]) -> None:
    """Missing, repeated and exchanged sections, with and without a header."""
    for first in (b"", SECTIONS[0]):
        _read_or_refuse(*tensors(first + b"".join(sections)))


@given(st.lists(st.sampled_from([TENSOR, serialised(VALUES), b""]), max_size=3))
def test_several_arrays_are_read_or_refused(arrays: list[bytes]) -> None:
    """Only the payload alone is one."""
    _read_or_refuse(*arrays)


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_after_a_header_are_read_or_refused(rest: bytes) -> None:
    """Nothing of them has to be a section."""
    _read_or_refuse(*tensors(SECTIONS[0] + rest))


# ---- small things -------------------------------------------------------------------


def test_the_checksum_tells_weights_apart() -> None:
    """By a single bit, and not by how they lie in memory."""
    changed = VALUES.copy()
    changed.view(np.uint32)[123] ^= 1
    assert vector_checksum(VALUES) != vector_checksum(changed)
    assert vector_checksum(np.repeat(VALUES, 2)[::2]) == vector_checksum(VALUES)


@pytest.mark.filterwarnings("error")
def test_as_tensor_copies_nothing() -> None:
    """A read-only array is viewed without a warning."""
    array = np.frombuffer(VALUES.tobytes(), np.float32)
    assert as_tensor(array).data_ptr() == array.ctypes.data
