"""Tests of reading a final network's file that somebody has written with intent."""

import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwpf_baseline.exchange.coding import encode_number
from gwpf_baseline.learning.flat_model import buffers_to_vector, parameters_to_vector
from gwpf_baseline.methods.shared.masked_network import maskable, masked
from gwpf_baseline.methods.shared.network_file import (
    NETWORK_FILE,
    load_network,
    pack_description,
    save_network,
    unpack_description,
)
from gwpf_baseline.model import build_model
from gwpf_baseline.utils import ConfigError

MADE: dict[str, Any] = {
    "model": "conv4",
    "input_shape": [1, 8, 8],
    "num_classes": 10,
    "options": {"width": 4},
    "seed": 7,
    "level": 128,
    "bits": 8,
}


def write(folder: Path, density: float, **changes: Any) -> Path:
    """Write a sound network in which a share of the weights takes part."""
    made = {**MADE, **changes}
    shape, options = tuple(made["input_shape"]), made["options"]
    model = build_model(made["model"], shape, made["num_classes"], **options)
    model = masked(model, made["level"], made["bits"], made["seed"])
    size = parameters_to_vector(model).numel()
    mask = np.random.default_rng(1).random(size) < density
    file = folder / NETWORK_FILE
    save_network(file, made, model, mask, buffers_to_vector(model))
    return file


@pytest.fixture(name="sound", scope="module")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("network"), 0.5)


@pytest.fixture(name="little_memory")
def _little_memory() -> Iterator[None]:
    """Let whoever allocates another 2 GB fail, rather than the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def refused(content: bytes, folder: Path) -> str:
    """Return the line by which a file is refused, which takes no time."""
    (folder / "hostile").write_bytes(content)
    lines: list[str] = []

    def load() -> None:
        with pytest.raises(ConfigError, match="^network=.*hostile: must be") as caught:
            load_network(folder / "hostile")
        lines.append(str(caught.value))

    # A hang must fail the test, not keep it: the thread dies with the process.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert lines, "neither refused nor loaded within ten seconds"
    assert "\n" not in lines[0] and len(lines[0]) < 500
    return lines[0]


VALUES: dict[str, list[Any]] = {
    "model": [None, 0, [], {}, "", "con\nv4", "kws_lstm"],
    "input_shape": ["888", "abc", [1, 8.5, 8], [1, "8", 8], [1, True, 8], [0, 8, 8]]
    + [[-1, 8, 8], [], [8] * 20_000, None, {}, [[1], 8, 8]],
    "num_classes": ["10", 10.0, True, 0, -1, None, [10]],
    "options": [[], "width", None, {"width": "4"}, {"width": 4.0}, {"depth\n": 1}]
    + [{"width": 0}],
    "seed": ["7", 7.0, True, -1, None, [7]],
    "level": ["128", 128.0, True, 0, 256, -1, None],
    "bits": ["8", 8.0, True, 4, None, [8], {}],
    "checksum": ["0", 0.5, True, -1, 2**32, None],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in VALUES for value in VALUES[key]]
)
def test_every_field_is_checked_before_anything_is_built(
    sound: Path, tmp_path: Path, key: str, value: Any
) -> None:
    """Text and fractions in particular, which Python takes for sides and counts."""
    description, rest = unpack_description(sound.read_bytes())
    assert key in description
    refused(pack_description({**description, key: value}) + rest, tmp_path)


@pytest.mark.parametrize("key", [*MADE, "checksum"])
def test_no_field_may_be_missing_or_too_many(
    sound: Path, tmp_path: Path, key: str
) -> None:
    """A description holds what a run has written, neither more nor less."""
    description, rest = unpack_description(sound.read_bytes())
    assert "more" not in description
    refused(pack_description({**description, "more": 1}) + rest, tmp_path)
    del description[key]
    refused(pack_description(description) + rest, tmp_path)


@pytest.mark.parametrize("made", [[], 1, "conv4", None, [[]] * 3])
def test_a_description_is_an_object(sound: Path, tmp_path: Path, made: Any) -> None:
    """Other JSON is refused."""
    refused(
        pack_description(made) + unpack_description(sound.read_bytes())[1], tmp_path
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 10**7},
        {"num_classes": 2**31 - 1},
        {"num_classes": 10**30},
        {"input_shape": [1, 10**5, 10**5]},
        {"input_shape": [10**9, 8, 8]},
        {"input_shape": [2**31 - 1] * 3},
        {"options": {"width": 10**4}},
        {"options": {"width": 10**3000}},
        {"model": "resnet18", "num_classes": 10**6, "options": {}},
        {"model": "kws_lstm", "input_shape": [1, 9, 10**8], "options": {}},
        {"model": "transformer", "input_shape": [9], "num_classes": 10**7}
        | {"options": {}},
    ],
)
@pytest.mark.usefixtures("little_memory")
def test_a_small_file_makes_no_large_network(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Not even where its empty mask is as long as it has to be."""
    made = {**MADE, **changes, "checksum": 0}
    size = 0
    try:
        with torch.device("meta"):
            plan = build_model(
                made["model"],
                tuple(made["input_shape"]),
                made["num_classes"],
                **made["options"],
            )
            size = sum(layer.weight.numel() for layer in maskable(plan).values())
    except (ConfigError, RuntimeError, TypeError, ValueError, OverflowError):
        pass  # no such network can be built at all
    mask = encode_number(size if size < 2**31 else 0) + bytes(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(pack_description(made) + mask, tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * 1024  # kilobytes


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
def test_a_network_is_read_however_few_of_its_weights_take_part(
    tmp_path: Path, density: float
) -> None:
    """Its file is as long as it has to be for so many weights."""
    file = write(tmp_path, density, input_shape=[1, 64, 64])
    network = load_network(file)
    weights = parameters_to_vector(network)
    expected = np.random.default_rng(1).random(weights.numel()) < density
    assert np.array_equal((weights > 0).numpy(), expected)
    content = file.read_bytes()
    refused(content[:-1], tmp_path)
    refused(content + bytes(1), tmp_path)
    if density in (0, 1):
        assert content.endswith(bytes(8))
        refused(content[:-1] + b"\1", tmp_path)


def test_the_callers_random_numbers_stay_as_they_are(sound: Path) -> None:
    """What is built to be measured draws none."""
    before = torch.get_rng_state()
    load_network(sound)
    assert torch.equal(torch.get_rng_state(), before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=1000, max_examples=300)
@given(key=st.sampled_from([*MADE, "checksum"]), value=JSON)
def test_whatever_a_field_holds_it_is_refused_or_sound(
    sound: Path, key: str, value: Any
) -> None:
    """In one line, and at once; only what was written makes a network."""
    description, rest = unpack_description(sound.read_bytes())
    changed = {**description, key: value}
    hostile = sound.with_name("hostile")
    hostile.write_bytes(pack_description(changed) + rest)
    try:
        load_network(hostile)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert pack_description(changed) == pack_description(description)


def test_random_bytes_are_no_network(sound: Path, tmp_path: Path) -> None:
    """Not even behind a sound description, whose mask they would be."""
    description, _ = unpack_description(sound.read_bytes())
    rng = random.Random(0)
    for length in range(200):
        refused(pack_description(description) + rng.randbytes(length), tmp_path)
