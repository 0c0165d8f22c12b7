"""What is on the wire, byte for byte.

Messages, checkpoints and files of one format version are read by all that know it:
whoever changes a code below gives the format another version.
"""

from typing import Any

import numpy as np
import pytest

from gwpf_baseline.exchange.coding import encode_bitmap, encode_positions
from gwpf_baseline.exchange.header import FORMAT_VERSION, Header, Kind
from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.methods.shared.activity import Activity
from gwpf_baseline.methods.shared.ternary import Ternary, write_ternary
from gwpf_baseline.utils import derive_seed

PLACES = np.arange(300)
VALUES = np.array([0, 1, -1, 2, -3, 0.1, 0.2, -0.25], np.float32)
HEADER = Header("gwpf", Kind.UPDATE, exchange=3, base=2, length=15)


def sections(writer: Writer) -> str:
    """Return what follows the header."""
    return writer.payload()[len(HEADER.pack()) :].hex()


def activity() -> Activity:
    """Return where a matrix of three rows and a bias have moved."""
    moved = Activity([Layer(slice(0, 12), (3, 4)), Layer(slice(12, 15), (3,))])
    moved.note(np.array([0, 1, 5, 13]))
    moved.note(np.array([1, 4, 5]))
    return moved


def test_the_codes_below_are_of_this_version() -> None:
    """Another one has others."""
    assert FORMAT_VERSION == 7


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, number) for number, kind in enumerate(Kind, 1)]
)
def test_every_kind_of_message_has_its_number(kind: Kind, number: int) -> None:
    """The fourth byte; the others are alike."""
    code = Header("gwpf", kind, exchange=3, base=2, length=300).pack().hex()
    assert code == f"4757070{number}e8d3e55dac02030103"
    assert (
        kind.name
        == (["MODEL", "CHANGES", "VALUES", "UPDATE", "LOST", "SKIPPED", "DIVERGED"])[
            number - 1
        ]
    )


@pytest.mark.parametrize(
    ("bits", "code"),
    [
        (PLACES % 31 == 0, "ac020a028b7b830511b9bdd4"),
        (PLACES % 31 != 0, "ac02a202028b7b830511b9bdd4"),
        (
            PLACES % 3 == 0,
            (
                "ac026409580a59c891889fffeb2795f6b4a2c4b320e26f4e3f4afcd2d9a9aa8639a7b687"
                "22137e2c"
            ),
        ),
        (
            PLACES % 5 == 0,
            "ac023c07a50013df347c9e334a0b0742e4525eed6b458938363c6db7135acc99",
        ),
        (PLACES % 9 == 0, "ac022205b9b9bd12f551b63c12d165bb061fafbfc6c6120e"),
        (np.isin(PLACES, [5, 299]), "ac020201ec95d609"),
        (np.isin(np.arange(30_000), [7, 29_000]), "b0ea01020153552200"),
        (PLACES < 0, "ac020000"),
        (PLACES >= 0, "ac02ac0200"),
    ],
    ids=["few", "most", "a third", "a fifth", "a ninth"]
    + ["far apart", "farther", "none", "all"],
)
def test_a_bitmap(bits: np.ndarray, code: str) -> None:
    """By the gaps between ones or zeros where these are rare, else bit by bit."""
    assert encode_bitmap(bits).hex() == code


def test_a_bitmap_of_which_something_is_expected() -> None:
    """A probability for each bit."""
    bits, expected = PLACES[:40] % 3 == 0, np.linspace(0.1, 0.9, 40)
    assert encode_bitmap(bits, expected).hex() == "280e0292a467f891d48c9c"


def test_positions_and_a_step_where_the_model_has_moved_before() -> None:
    """Class by class of rows and columns."""
    code = encode_positions(np.array([1, 5, 9, 14]), 15, activity().classes)
    assert code.hex() == "0f00000000020002000001e80ccdc2"
    signs = np.array([True, False, True])
    step = Ternary(np.array([1, 5, 14]), signs, np.float32(0.25))
    writer = Writer(HEADER)
    write_ternary(writer, step, 15, activity())
    assert sections(writer) == (
        "0f0000000001000200000100697a9a030201a2d94b6800010000803e"
    )


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (
            {},
            "0008000000000000803f000080bf00000040000040c0cdcccc3dcdcc4c3e000080be",
        ),
        ({"fp16": True}, "01080000003c00bc004000c2662e663200b4"),
        ({"bits": 16}, "00028001c0380001003703080000aa2a56d555550180333366660180"),
        ({"bits": 8}, "00020683c13c0402013b0208002ad65581336681"),
        (
            {"bits": 4},
            (
                "0002b76ddb3e2549123d08070100000000070401ee5aec92070700070501862603110504"
                "017edbf46704040004030100000025030201a2d94b68020000"
            ),
        ),
        (
            {"bits": 3},
            (
                "00020000803fabaaaa3d08070100000000070401ee5aec92070401972a19240402010000"
                "0050020000"
            ),
        ),
        ({"bits": 2}, "0002000040400000803e0804010000001b040201000000a0040000"),
    ],
    ids=["32 bits", "half precision", "16", "8", "4", "3", "2"],
)
def test_an_update_of_two_tensors(options: dict[str, Any], code: str) -> None:
    """A step for each, and levels; few levels at their entropy."""
    writer = Writer(HEADER)
    Quantization(**options).write_update(writer, VALUES, [5, 3])
    assert sections(writer) == code


def test_seeds_follow_from_names_and_from_nothing_else() -> None:
    """A run of another release draws the same; names that touch are kept apart."""
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(7, "batches", 1, 12) == 7387409534655404405
    assert derive_seed(7, "batches", 11, 2) == 8796279983022714727
