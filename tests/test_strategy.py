"""Tests of what all methods share: messages, versions, faults, bytes, checkpoints."""

import io
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from federation import (
    KEPT,
    Federation,
    Node,
    configured,
    lose,
    payload_of,
    size,
    small,
    with_payload,
    with_tensors,
)
from flwr.common import Code, FitRes, Parameters, Status
from numpy.testing import assert_allclose, assert_array_equal
from omegaconf import DictConfig

from gwpf_baseline.callbacks import Evaluation, OnRound
from gwpf_baseline.client_app import make_client
from gwpf_baseline.config import checked, compose_config, config_dir
from gwpf_baseline.exchange.coding import (
    WireError,
    decode_bitmap,
    encode_bitmap,
    encode_number,
)
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.payload import Part, Reader, from_parameters, to_parameters
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState, InMemory
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.shared.activity import Activity
from gwpf_baseline.methods.shared.ternary import read_ternary
from gwpf_baseline.records.checkpoint import CheckpointFolder
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.utils import ConfigError

Compose = Callable[..., DictConfig]
Tamper = Callable[[Parameters], Parameters]

BRIEF = TrainingConfig(local_steps=2, batch_size=10)
# Freezes within a few rounds.
EAGER = ["method.check_every=1", "method.ema=0.5", "method.threshold=0.9"]
# What some variants need to do within a few rounds what they are there for.
HASTENED = {
    "apf": EAGER,
    "apf_aggressive": EAGER,
    "partial_sync": EAGER,
    "permanent_freeze": EAGER,
    "cmfl": ["method.threshold=0.6"],
}
METHODS = {
    file.stem: [f"method={file.stem}", *HASTENED.get(file.stem, [])]
    for file in sorted(config_dir().glob("method/*.yaml"))
} | {"gwpf_next_round": ["method=gwpf_paper", "method.thaw_exchange=next_round"]}
MASKED = [
    "method=gwpf_paper",
    "method.frozen_update=residual",
    "method.thaw_exchange=next_round",
    "method.thaw_quorum=0.6",
]
THRESHOLD = {"ema": 0.5, **KEPT}


@pytest.fixture(name="compose", scope="module")
def _compose(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    """Return a function that composes small experiments on the built-in digits."""
    cache = tmp_path_factory.mktemp("cache")

    def compose(*overrides: str) -> DictConfig:
        brief = ["num_clients=5", "local_steps=1", "batch_size=8"]
        cached = f"dataset.cache_dir={cache}"
        return checked(compose_config([*brief, cached, *overrides]))

    return compose


def bits(vector: torch.Tensor) -> list[int]:
    """Return a vector's bits, which tell 0 from -0."""
    return vector.view(torch.int32).tolist()


def skipped(federation: Federation, counts: list[int]) -> int:
    """Return how many nodes have skipped an exchange since they had sent so much."""
    return sum(
        payload_of(answer, federation).header.kind is Kind.SKIPPED
        for node, count in zip(federation.nodes, counts, strict=True)
        for answer in node.sent[count:]
    )


def two_exchanges(federation: Federation) -> bool:
    """Tell whether a method may ask a second time in a round."""
    config = federation.strategy.config
    return getattr(config, "thaw_exchange", "next_round") == "same_round"


# ---- partial participation ----------------------------------------------------------


@pytest.fixture(name="agreed")
def _agreed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Federation], list[bool]]:
    """Return a function that makes a list of whether clients hold the model."""

    def watch(federation: Federation) -> list[bool]:
        agreed: list[bool] = []
        follow = SyncClient.follow

        def watched(self: SyncClient, reader: Reader, state: ClientState) -> Task:
            task = follow(self, reader, state)
            server = federation.strategy
            agreed.append(bits(task.weights) == bits(server.weights))
            asked = server.messages.mask
            assert (task.mask is None) == (asked is None)
            if task.mask is not None and asked is not None:
                agreed.append(np.array_equal(task.mask, asked))
            if task.buffers is not None:
                agreed.append(bits(task.buffers) == bits(server.buffers))
            return task

        monkeypatch.setattr(SyncClient, "follow", watched)
        return agreed

    return watch


@pytest.mark.parametrize("method", METHODS)
def test_every_participant_holds_the_global_model_to_the_bit(
    method: str, compose: Compose, agreed: Callable[[Federation], list[bool]]
) -> None:
    """In every exchange, however many rounds it has missed."""
    federation = configured(compose(*METHODS[method], "fraction_fit=0.4"))
    same, gaps, last = agreed(federation), [], dict.fromkeys(range(5), 0)
    before = federation.strategy.weights.clone()
    for number in range(1, 15):
        counts = [len(node.sent) for node in federation.nodes]
        record = federation.play()
        assert (federation.strategy.answers, record.failures) == (2, 0)
        assert record.clients == 2 - skipped(federation, counts)
        for node, count in zip(federation.nodes, counts, strict=True):
            if len(node.sent) > count:
                gaps.append(number - last[node.partition])
                last[node.partition] = number
    assert same and all(same)
    assert max(gaps) > 4
    assert bits(before) != bits(federation.strategy.weights)


@pytest.mark.parametrize("method", METHODS)
def test_participants_hold_the_model_whatever_gets_lost(
    method: str, compose: Compose, agreed: Callable[[Federation], list[bool]]
) -> None:
    """Messages, answers, and all of a round's: then the model stays as it is."""
    federation = configured(compose(*METHODS[method], "fraction_fit=0.6"))
    same, strategy = agreed(federation), federation.strategy
    rng = np.random.default_rng(3)
    ahead = failures = 0
    for number in range(1, 15):
        silent = number in (4, 5, 9)
        for node in federation.nodes:
            node.reachable = not silent and rng.random() < 0.8
            node.tamper = lose if number == 8 or rng.random() < 0.3 else None
        before = bits(strategy.weights)
        record = federation.play()
        failures += record.failures
        if silent or number == 8:
            assert record.clients == 0 < record.failures
            assert bits(strategy.weights) == before
        ahead += sum(
            node.state.version > strategy.clients[node.partition].version
            for node in federation.nodes
            if node.partition in strategy.clients
        )
    # Otherwise no client has held more than the server knew of.
    assert ahead > 0 and 12 < failures < 42
    for node in federation.nodes:
        node.reachable, node.tamper = True, None
    counts = [len(node.sent) for node in federation.nodes]
    record = federation.play(3)
    assert record.failures == 0
    assert record.clients > 0 or skipped(federation, counts) > 0
    assert same and all(same)


def test_steps_that_a_client_holds_already_are_not_taken_twice() -> None:
    """STC sends steps, not values: after a lost answer some arrive for the second
    time."""
    federation = small([30, 40, 50], BRIEF, "stc", {"down": 0.1})
    strategy, node = federation.strategy, federation.nodes[1]
    federation.play(2)
    node.tamper = lose
    federation.play(3)
    assert strategy.clients[1].version == 1 and node.state.version == 4
    node.tamper = None
    assert federation.play().failures == 0
    reader = payload_of(node.received[-1], federation)
    assert (reader.header.kind, reader.header.base) == (Kind.CHANGES, 1)
    federation.play()
    held = [node.state.arrays["weights"] for node in federation.nodes]
    assert_array_equal(held[1], held[0])
    assert_array_equal(held[2], held[0])


def test_who_has_missed_more_steps_than_the_model_is_large_gets_the_model() -> None:
    """STC's steps are sent as long as they are the smaller message."""
    federation = small([30, 40, 50], BRIEF, "stc", {"down": 1.0})
    strategy, node = federation.strategy, federation.nodes[2]
    federation.play()
    kinds, missed = [], []
    manager = federation.server.client_manager()
    for absent in (1, 5, 40):
        manager.unregister(node)
        federation.play(absent)
        manager.register(node)
        model = strategy.weights.numpy().copy()
        assert federation.play().failures == 0
        message = payload_of(node.received[-1], federation)
        kinds.append(message.header.kind)
        missed.append(strategy.exchange - 1 - message.header.base)
        assert size(node.received[-1]) < 4 * (strategy.dimension + 11) + 150
        assert_array_equal(node.state.arrays["weights"], model)
        assert sum(step.size for step in strategy.steps) < 4 * strategy.dimension
    assert kinds == [Kind.CHANGES, Kind.CHANGES, Kind.MODEL]
    assert missed == [2, 6, 41]
    assert len(strategy.steps) < 41


def test_a_message_holds_exactly_what_changed_since(compose: Compose) -> None:
    """The union of what was synchronised after the client's last exchange."""
    federation = configured(compose(*MASKED, "fraction_fit=0.6"))
    strategy, asked, kinds, gaps = federation.strategy, [], set(), set()
    for number in range(1, 13):
        weights = strategy.weights.numpy().copy()
        seen = [len(node.received) for node in federation.nodes]
        federation.play()
        asked.append(strategy.asked.copy())
        for node, count in zip(federation.nodes, seen, strict=True):
            for message in node.received[count:]:
                reader = payload_of(message, federation)
                header = reader.header
                assert header.exchange == number
                changed = np.any([np.zeros_like(asked[0]), *asked[header.base : -1]], 0)
                if header.kind is Kind.CHANGES:
                    assert_array_equal(reader.bitmap(strategy.dimension), changed)
                values = reader.vector(int(np.count_nonzero(changed)))
                assert_array_equal(values, weights[changed])
                assert header.with_mask
                assert_array_equal(reader.bitmap(strategy.dimension), asked[-1])
                reader.finish()
                kinds.add(header.kind)
                gaps.add(number - 1 - header.base)
    assert kinds == {Kind.CHANGES, Kind.VALUES}
    assert max(gaps) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_client_that_lost_its_state_comes_back(
    method: str, compose: Compose, warnings: Callable[[], str]
) -> None:
    """It says so, is left out once, then holds all; to the others it was silent."""
    cfg = compose(*METHODS[method])
    federation, twin = configured(cfg), configured(cfg)
    federation.play(3)
    twin.play(3)
    exchange = federation.strategy.exchange
    federation.nodes[2].forget()
    twin.nodes[2].reachable = False
    counts = [len(node.sent) for node in federation.nodes]
    lost, silent = federation.play(), twin.play()
    if federation.strategy.dense_downlink:
        # It is sent everything anyway.
        assert (lost.clients, lost.failures) == (5, 0)
        return
    used = 4 - skipped(federation, counts)
    assert (lost.clients, lost.failures) == (silent.clients, silent.failures)
    assert (lost.clients, lost.failures) == (used, 1)
    assert f"client 2 left out of exchange {exchange + 1}: it no longer" in warnings()
    assert bits(federation.strategy.weights) == bits(twin.strategy.weights)
    counts = [len(node.sent) for node in federation.nodes]
    back = federation.play()
    used = 5 - skipped(federation, counts)
    assert (back.clients, back.failures) == (used, 0)
    held = federation.nodes[2].state.arrays["weights"]
    assert_array_equal(held, federation.nodes[0].state.arrays["weights"])


@pytest.mark.parametrize("method", METHODS)
def test_a_client_with_other_initial_weights_is_given_the_model(
    method: str, compose: Compose, warnings: Callable[[], str]
) -> None:
    """As another release draws them; nobody else is affected."""
    cfg = compose(*METHODS[method])
    federation, twin = configured(cfg), configured(cfg)
    build = federation.nodes[3].build

    def other_release(store: InMemory) -> SyncClient:
        client = build(store)
        client.initial = client.initial + 1e-3
        return client

    federation.nodes[3].build = other_release
    twin.nodes[3].reachable = False
    first, silent = federation.play(), twin.play()
    if federation.strategy.dense_downlink:
        # Its own initial weights do not count.
        assert (first.clients, first.failures) == (5, 0)
        return
    assert (first.clients, first.failures) == (silent.clients, silent.failures)
    assert (first.clients, first.failures) == (4, 1)
    assert bits(federation.strategy.weights) == bits(twin.strategy.weights)
    assert "client 3 left out of exchange 1: it no longer holds version 0" in warnings()
    counts = [len(node.sent) for node in federation.nodes]
    second = federation.play()
    assert second.clients == 5 - skipped(federation, counts)
    assert second.failures == 0
    message = payload_of(federation.nodes[3].received[1], federation)
    assert message.header.kind is Kind.MODEL
    held = [node.state.arrays["weights"] for node in federation.nodes]
    assert_array_equal(held[3], held[0])


@pytest.mark.parametrize("method", ["gwpf", "stc", "apf"])
def test_a_node_may_join_later(method: str, compose: Compose) -> None:
    """With nothing but its data, it starts from the seed's weights and catches up."""
    federation = configured(compose(*METHODS[method]))
    manager = federation.server.client_manager()
    federation.play()
    manager.unregister(federation.nodes[4])
    assert federation.play(4).clients == 4
    late = Node(4, federation.nodes[4].build, "late")
    manager.register(late)
    record = federation.play()
    assert (record.clients, record.failures) == (5, 0)
    held = federation.nodes[0].state.arrays["weights"]
    assert_array_equal(late.state.arrays["weights"], held)


def test_a_client_refuses_what_its_server_does_not_send(compose: Compose) -> None:
    """Another method's payload, and one of a client."""
    federation = configured(compose("method=gwpf"))
    other = configured(compose("method=fedavg"))
    federation.play()
    other.play()
    client = federation.nodes[0].build(federation.nodes[0].store)
    for message, reason in (
        (other.nodes[0].received[0], "not of method gwpf"),
        (federation.nodes[0].sent[0], "a server does not send UPDATE"),
    ):
        with pytest.raises(WireError, match=reason):
            client.fit([np.frombuffer(from_parameters(message), np.uint8)], {})


# ---- faults -------------------------------------------------------------------------


class Upload(NamedTuple):
    """What a client of :func:`eight_active` uploads next, as it is coded.

    Parameters
    ----------
    header : Header
        The header.
    votes, values, buffers : bytes
        The sections: 387 bits, 8 and 11 values.
    """

    header: Header
    votes: bytes
    values: bytes
    buffers: bytes

    def payload(self) -> bytes:
        """Return the payload."""
        return b"".join([self.header.pack(), *self[1:]])


def eight_active() -> Federation:
    """Return three clients before whose third exchange 8 of 395 coordinates are active.

    Of the method whose payloads have most in them: votes, values and buffers.
    """
    federation = small([30, 40, 50], BRIEF, "gwpf_paper", THRESHOLD)
    federation.play(2)
    _activate_eight(federation)
    # Else a skipped exchange would be refused whatever it holds.
    federation.strategy.skips = True
    return federation


def _activate_eight(federation: Federation) -> None:
    federation.strategy.mask = np.arange(395) % 50 == 0


def taken_apart(parameters: Parameters) -> Upload:
    """Take such an upload apart."""
    payload = bytes(from_parameters(parameters))
    header, start = Header.unpack(payload, "gwpf_paper", 395)
    _, first = decode_bitmap(payload, start, 387)
    second = first + 2 + 4 * 8
    assert payload[first : first + 2] == b"\x00\x08"
    assert payload[second : second + 2] == b"\x00\x0b"
    assert len(payload) == second + 2 + 4 * 11
    parts = payload[start:first], payload[first:second], payload[second:]
    return Upload(header, *parts)


def _vector(values: np.ndarray) -> bytes:
    """Code a vector of float32."""
    return b"\x00" + encode_number(values.size) + values.astype("<f4").tobytes()


def _numbers(section: bytes) -> np.ndarray:
    """Return the values of a vector of fewer than 128."""
    return np.frombuffer(section, "<f4", offset=2).copy()


def _replaced(parameters: Parameters, **parts: Any) -> Parameters:
    """Put other sections into an upload."""
    return to_parameters(taken_apart(parameters)._replace(**parts).payload())


def _tampered(change: Callable[[Upload], bytes]) -> Tamper:
    """Return what puts another payload, made of the upload's parts, into its place."""
    return lambda parameters: to_parameters(change(taken_apart(parameters)))


def _travelled(change: Callable[[bytes], list[bytes]]) -> Tamper:
    """Return what puts other arrays into the place of the one that travelled."""

    def tamper(parameters: Parameters) -> Parameters:
        return Parameters(change(parameters.tensors[0]), parameters.tensor_type)

    return tamper


def _valued(change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    """Return what puts other values into an upload's."""
    return lambda parameters: _replaced(
        parameters, values=_vector(change(_numbers(taken_apart(parameters).values)))
    )


def _spoiled(value: float) -> Tamper:
    def spoil(values: np.ndarray) -> np.ndarray:
        values[3] = value
        return values

    return _valued(spoil)


def _announced(dtype: int, data: Callable[[np.ndarray], bytes]) -> Tamper:
    """Return what announces an upload's values as those of another type."""
    return lambda parameters: _replaced(
        parameters,
        values=bytes([dtype, 8]) + data(_numbers(taken_apart(parameters).values)),
    )


def _in_numpys_format(parameters: Parameters) -> Parameters:
    """Return what Flower would make of the payload, and release 1.0 did."""
    array = np.frombuffer(from_parameters(parameters), np.uint8)
    return Parameters([_saved(array)], "numpy.ndarray")


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def _reframed(parameters: Parameters, **changes: Any) -> Parameters:
    header = replace(taken_apart(parameters).header, **changes)
    return _replaced(parameters, header=header)


def _flagged(parameters: Parameters, flags: int) -> Parameters:
    payload = bytearray(from_parameters(parameters))
    assert payload[3] == Kind.UPDATE
    payload[3] |= flags
    return to_parameters(bytes(payload))


def _renumbered(parameters: Parameters, place: int, code: bytes) -> Parameters:
    """Put other bytes in the place of one of the header's."""
    payload = bytes(from_parameters(parameters))
    return to_parameters(payload[:place] + code + payload[place + 1 :])


def _skipped(parameters: Parameters, left_over: bytes = b"", **changes: Any) -> Any:
    header = replace(taken_apart(parameters).header, kind=Kind.SKIPPED, **changes)
    return to_parameters(header.pack() + left_over)


HOSTILE: dict[str, Tamper] = {
    "nothing": _travelled(lambda t: []),
    "an empty array": _travelled(lambda t: [b""]),
    "no bytes": lambda p: to_parameters(b""),
    "a header alone": _tampered(lambda u: u.header.pack()),
    "no vectors": _tampered(lambda u: u.header.pack() + u.votes),
    "no votes": _tampered(lambda u: u.header.pack() + u.values + u.buffers),
    "truncated": _travelled(lambda t: [t[:-3]]),
    "truncated, which it says": lambda p: to_parameters(from_parameters(p)[:-3]),
    "a value short": _valued(lambda v: v[:-1]),
    "over-long": _travelled(lambda t: [t + bytes(4)]),
    "over-long, which it says": _tampered(lambda u: u.payload() + bytes(4)),
    "a value more": _valued(lambda v: np.zeros(9, np.float32)),
    "a vector more": _tampered(lambda u: u.payload() + u.values),
    "an array more": _travelled(lambda t: [t, t]),
    "exchanged vectors": lambda p: _replaced(
        p, values=taken_apart(p).buffers, buffers=taken_apart(p).values
    ),
    "float64": _announced(6, lambda v: v.astype("<f8").tobytes()),
    "float16": _announced(1, lambda v: v.astype("<f2").tobytes()),
    "bytes as values": _announced(2, lambda v: v.astype("i1").tobytes()),
    "integers as values": _announced(3, lambda v: v.astype("<i2").tobytes()),
    "an unknown type": _announced(255, lambda v: v.tobytes()),
    "an array in NumPy's format": _in_numpys_format,
    "the same, said to be bytes": _travelled(
        lambda t: [_saved(np.frombuffer(t, np.uint8))]
    ),
    "another type of tensor": lambda p: Parameters(p.tensors, "numpy.ndarray"),
    "NaN": _spoiled(np.nan),
    "infinity": _spoiled(np.inf),
    "minus infinity": _spoiled(-np.inf),
    "NaN in the buffers": partial(
        _replaced, buffers=_vector(np.full(11, np.nan, np.float32))
    ),
    "huge vector": lambda p: _replaced(
        p, values=b"\x00\xff\xff\xff\xff\x07" + taken_apart(p).values[2:]
    ),
    "absurd vector": lambda p: _replaced(
        p, values=b"\x00\xff\xff\xff\xff\x7f" + taken_apart(p).values[2:]
    ),
    "object array": _travelled(lambda t: [_saved(np.array([{"weights": 1}], object))]),
    "pickle": _travelled(lambda t: [pickle.dumps({"weights": [1.0]})]),
    "noise": _travelled(lambda t: [bytes(range(256)) * 8]),
    "noise in an array": lambda p: to_parameters(bytes(range(256)) * 8),
    "later exchange": partial(_reframed, exchange=4),
    "earlier exchange": partial(_reframed, exchange=2),
    "later mask": partial(_reframed, base=3),
    "earlier mask": partial(_reframed, base=1),
    "other method": partial(_reframed, method="fedavg"),
    "other model": partial(_reframed, length=396),
    # The numbers stand at 8 (395 parameters, two bytes), 10, 11 and 12.
    "a base before the first": partial(_renumbered, place=11, code=b"\x05"),
    "an upload before the first": partial(_renumbered, place=12, code=b"\x04"),
    "a number that is too long": partial(_renumbered, place=10, code=b"\x83\x00"),
    "a number that is too large": partial(
        _renumbered, place=10, code=b"\xff\xff\xff\xff\x0f"
    ),
    "a server's message": partial(_reframed, kind=Kind.MODEL),
    "lost, but how": partial(_reframed, kind=Kind.LOST, base=2),
    "lost": partial(_reframed, kind=Kind.LOST, base=-1),
    "a fourth flag": partial(_flagged, flags=0x80),
    "all flags": partial(_flagged, flags=0xF0),
    "a checksum that is not there": partial(_flagged, flags=0x40),
    "skipped, with all of it": partial(_reframed, kind=Kind.SKIPPED),
    "skipped, with a bitmap": partial(_skipped, left_over=b"\1\0\0"),
    "skipped, with a byte": partial(_skipped, left_over=b"\0"),
    "skipped, with a vector": lambda p: _skipped(p, taken_apart(p).values),
    "skipped, from an earlier version": partial(_skipped, base=1),
    "skipped, in an earlier exchange": partial(_skipped, exchange=2),
    "votes for active coordinates": partial(
        _replaced, votes=encode_bitmap(np.ones(395, np.bool_))
    ),
}


def _answering(tamper: Tamper) -> Callable[[FitRes], FitRes]:
    return lambda answer: replace(answer, parameters=tamper(answer.parameters))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_that_clients_failure(
    name: str, warnings: Callable[[], str]
) -> None:
    """The round goes on as if the client had not answered, and says who it was."""
    federation, twin = eight_active(), eight_active()
    federation.nodes[1].tamper = _answering(HOSTILE[name])
    twin.nodes[1].tamper = lose
    record, silent = federation.play(), twin.play()
    assert (record.clients, record.failures) == (2, 1)
    assert (silent.clients, silent.failures) == (2, 1)
    lines = [m for m in warnings().split("\n") if "the answer got lost" not in m]
    assert len(lines) == 1
    assert lines[0].startswith("client 1 left out of exchange 3: ")
    _assert_same(federation, twin)
    # What the client has learned is still pending, and it is welcome again.
    federation.nodes[1].tamper = twin.nodes[1].tamper = None
    assert federation.play().clients == twin.play().clients == 3
    _assert_same(federation, twin)


def _assert_same(one: Federation, other: Federation) -> None:
    mine, theirs = one.strategy.state(), other.strategy.state()
    for key, value in mine.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key
            if value.dtype == torch.float32:
                assert bits(value) == bits(theirs[key]), key


def _assert_same_state(one: ClientState, other: ClientState) -> None:
    assert one.values() == other.values()
    assert one.arrays.keys() == other.arrays.keys()
    for key, value in one.arrays.items():
        assert_array_equal(value, other.arrays[key], err_msg=key)


def test_the_tampered_payloads_are_sound_before() -> None:
    """Each is refused for its own reason: untouched, or put together again, it is
    used."""
    sound: list[Tamper] = [
        lambda p: p,
        _replaced,
        _spoiled(0.01),
        _valued(lambda v: v),
        _announced(0, lambda v: v.tobytes()),
        _reframed,
        _tampered(Upload.payload),
        _travelled(lambda t: [t]),
        partial(_flagged, flags=0),
        partial(_renumbered, place=10, code=b"\x03"),
        partial(_renumbered, place=11, code=b"\x01"),
        lambda p: to_parameters(from_parameters(p)),
    ]
    for tamper in sound:
        federation = eight_active()
        federation.nodes[1].tamper = _answering(tamper)
        record = federation.play()
        assert (record.clients, record.failures) == (3, 0)
        assert [len(n.sent[-1].tensors) for n in federation.nodes] == [1] * 3
    _activate_eight(federation)
    federation.nodes[1].tamper = _answering(_skipped)
    record = federation.play()
    assert (record.clients, record.failures) == (2, 0)


def test_an_older_answer_is_not_used_again(warnings: Callable[[], str]) -> None:
    """A replayed payload was valid once, but for another exchange."""
    federation, twin = (small([30, 40, 50], BRIEF) for _ in range(2))
    federation.play(3)
    twin.play(3)
    old = bytes(from_parameters(federation.nodes[1].sent[1]))
    federation.nodes[1].tamper = lambda answer: with_payload(answer, old)
    twin.nodes[1].tamper = lose
    assert federation.play().failures == twin.play().failures == 1
    assert "client 1 left out of exchange 4: an answer to exchange 2" in warnings()
    _assert_same(federation, twin)


def test_a_client_that_reports_an_error_is_left_out(
    warnings: Callable[[], str],
) -> None:
    """Its status says why."""
    federation = small([30, 40, 50], BRIEF)
    federation.nodes[2].tamper = lambda answer: replace(
        answer, status=Status(Code.FIT_NOT_IMPLEMENTED, "out of memory")
    )
    record = federation.play()
    assert (record.clients, record.failures) == (2, 1)
    assert "client 2 left out of exchange 1: out of memory" in warnings()


def test_silent_clients_are_named(warnings: Callable[[], str]) -> None:
    """Flower does not say who raised an exception; those who are missing are."""
    federation = small([30, 40, 50], BRIEF)
    federation.nodes[0].reachable = federation.nodes[2].reachable = False
    record = federation.play()
    assert (record.clients, record.failures) == (1, 2)
    assert "client 0 or 2 left out of exchange 1: the node does not" in warnings()


@pytest.mark.parametrize("name", ["silent", "lost", "NaN", "nothing"])
@pytest.mark.parametrize("method", ["gwpf", "gwpf_paper", "fedavg", "stc"])
def test_a_round_in_which_all_fail_changes_nothing(name: str, method: str) -> None:
    """Neither weights, buffers, mask nor averages; the next one goes on."""
    options = THRESHOLD if method == "gwpf_paper" else None
    federation = small([30, 40, 50], BRIEF, method, options)
    federation.play(3)
    counted = ["exchange", "records", "clients", "standings"]
    if method in ("gwpf", "stc"):
        # A step that leads nowhere.
        counted += ["method.steps", "method.step_sizes"]
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in federation.strategy.state().items()
        if key not in counted
    }
    for node in federation.nodes:
        node.reachable = name != "silent"
        if name == "lost":
            node.tamper = lose
        elif name == "NaN":
            node.tamper = _answering(_ending_in_nan)
        elif name == "nothing":
            node.tamper = _answering(HOSTILE[name])
    record = federation.play()
    assert (record.clients, record.failures) == (0, 3)
    assert record.train_loss is record.frozen_fraction is record.sent_fraction is None
    after = federation.strategy.state()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[key], value), key
        else:
            assert after[key] == value, key
    for node in federation.nodes:
        node.reachable, node.tamper = True, None
    record = federation.play()
    assert (record.clients, record.failures) == (3, 0)
    assert not torch.equal(federation.strategy.weights, before["weights"])


def _ending_in_nan(parameters: Parameters) -> Parameters:
    """Spoil the last value of an upload, whose buffers are its last section."""
    payload = bytes(from_parameters(parameters))
    return to_parameters(payload[:-4] + np.float32(np.nan).tobytes())


# ---- bytes and records --------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_counted_bytes_are_those_exchanged(method: str, compose: Compose) -> None:
    """Both ways, follow-ups and refused answers included."""
    federation = configured(compose(*METHODS[method], "fraction_fit=0.6"))
    federation.nodes[1].tamper = lambda answer: with_tensors(
        answer, [*answer.parameters.tensors, b"more"]
    )
    up = down = failures = 0
    for _ in range(6):
        record = federation.play()
        sent = sum(size(p) for n in federation.nodes for p in n.sent)
        received = sum(size(p) for n in federation.nodes for p in n.received)
        assert (record.uplink_bytes, record.downlink_bytes) == (
            sent - up,
            received - down,
        )
        assert record.cumulative_uplink_bytes == sent
        assert record.cumulative_downlink_bytes == received
        up, down, failures = sent, received, failures + record.failures
    assert failures > 0
    assert (federation.strategy.exchange > 6) == two_exchanges(federation)


def test_dense_bytes_are_the_values_that_fedavg_sends(compose: Compose) -> None:
    """Every method is compared with the same number of bytes, of which none is a
    header."""
    federation = configured(compose("method=fedavg", "fraction_fit=0.6"))
    dense = federation.play(3)
    values = 3 * 3 * 2 * 4 * federation.strategy.dimension
    assert dense.dense_bytes == values
    total = dense.cumulative_uplink_bytes + dense.cumulative_downlink_bytes
    assert values < total < values + 3 * 3 * 2 * 120
    sparse = configured(compose("method=gwpf", "fraction_fit=0.6")).play(3)
    assert sparse.dense_bytes == values
    assert sparse.cumulative_uplink_bytes < total / 20


def test_dense_bytes_hold_the_buffers_too() -> None:
    """FedAvg sends them both ways."""
    record = small([30, 40], BRIEF, "fedavg").play(2)
    assert record.dense_bytes == 2 * 2 * 2 * 4 * (395 + 11)


def test_an_upload_costs_hardly_more_than_what_it_says(compose: Compose) -> None:
    """Of LeNet-5's: 175 bytes at most beside values, positions and buffers."""
    federation = configured(compose(*MASKED))
    assert federation.strategy.dimension == 61_706
    federation.play(3)
    for node in federation.nodes:
        for answer, message in zip(node.sent[1:], node.received[1:], strict=True):
            for parameters in (answer, message):
                assert len(from_parameters(parameters)) > 1000
        answer = node.sent[-1]
        reader = payload_of(answer, federation)
        asked = int(np.count_nonzero(federation.strategy.asked))
        votes = reader.bitmap(61_706 - asked)
        values = reader.vector(asked)
        reader.finish()
        share = votes.mean()
        entropy = -np.sum([p * np.log2(p) for p in (share, 1 - share)]) * votes.size
        beside = size(answer) - values.nbytes - len(encode_bitmap(votes))
        assert 0 < beside <= 175 - 12
        assert 8 * size(answer) <= 1.02 * (8 * values.nbytes + entropy) + 8 * 32


def test_flower_is_given_the_model_of_now(compose: Compose) -> None:
    """Nobody serialises it for us; whoever reads it finds it as it is then."""
    federation = configured(compose("method=gwpf"))
    played = federation.server.fit_round(1, None)
    assert played is not None and isinstance(played[0], Parameters)
    federation.strategy.weights += 1
    expected = federation.strategy.parameters()
    assert played[0].tensors == expected.tensors
    assert played[0].tensor_type == expected.tensor_type


def test_records_hold_what_was_measured() -> None:
    """What was not measured is empty, never zero; losses are the clients' mean."""
    measured: list[tuple[int, torch.Tensor]] = []
    told: list[RoundRecord] = []

    def evaluate(
        number: int, weights: torch.Tensor, buffers: torch.Tensor
    ) -> tuple[float, float] | None:
        measured.append((number, weights.clone()))
        return (0.5, 0.25) if number % 2 == 0 else None

    callbacks = [Evaluation(evaluate), OnRound(told.append)]
    federation = small([30, 40], BRIEF, "fedavg", callbacks=callbacks)
    federation.play()
    after_first = federation.strategy.weights.clone()
    federation.play()
    first, second = federation.strategy.records
    assert told == [first, second]
    assert [record.round for record in told] == [1, 2]
    assert (first.test_loss, first.test_accuracy) == (None, None)
    assert (second.test_loss, second.test_accuracy) == (0.5, 0.25)
    assert [number for number, _ in measured] == [1, 2]
    assert torch.equal(measured[0][1], after_first)
    assert 0 < first.seconds < second.seconds
    assert first.train_loss is not None and 1 < first.train_loss < 4
    assert first.frozen_fraction is None


# ---- modelled time ------------------------------------------------------------------

# So slow that what is sent outweighs all computing: 300 bits of ours take 1 ms.
SLOW = Network(uplink_mbps=0.3, downlink_mbps=0.9)


def _legs(federation: Federation, seen: list[tuple[int, int]]) -> list[list[tuple]]:
    """Return each node's exchanges since: what it was sent and what it answered."""
    return [
        [
            (size(ins), size(answer))
            for ins, answer in zip(node.received[i:], node.sent[j:], strict=True)
        ]
        for node, (i, j) in zip(federation.nodes, seen, strict=True)
    ]


@pytest.mark.parametrize("method", ["gwpf", "gwpf_paper", "apf", "cmfl", "stc"])
def test_modelled_seconds_are_those_of_a_slow_reference(
    method: str, compose: Compose
) -> None:
    """The slowest client of each exchange, and beside it the server's own time."""
    cfg = compose(*METHODS[method], "fraction_fit=0.6")
    federation = configured(cfg, network=SLOW)
    times: dict[int, list[float]] = {}

    def watch(node: Node, answer: FitRes) -> FitRes:
        reported = answer.metrics["compute_seconds"]
        assert isinstance(reported, float)
        times[node.partition].append(reported)
        return answer

    for node in federation.nodes:
        node.tamper = partial(watch, node)
    total, exchanges = 0.0, 0
    for _ in range(6):
        times.update({i: [] for i in range(5)})
        seen = [(len(node.received), len(node.sent)) for node in federation.nodes]
        started = time.perf_counter()
        record = federation.play()
        wall = time.perf_counter() - started
        assert record.failures == 0
        legs = _legs(federation, seen)
        reference = 0.0
        for k in range(max(map(len, legs))):
            slowest = 0.0
            for i, mine in enumerate(legs):
                if k < len(mine):
                    down, up = 8 * mine[k][0] / 0.9e6, 8 * mine[k][1] / 0.3e6
                    slowest = max(slowest, down + times[i][k] + up)
            reference += slowest
            exchanges += 1
        computed = [sum(mine) for mine in times.values() if mine]
        assert record.compute_seconds == pytest.approx(np.mean(computed))
        assert record.modelled_seconds is not None
        assert total + reference <= record.modelled_seconds
        assert record.modelled_seconds <= total + reference + wall
        total = record.modelled_seconds
    assert (exchanges > 6) == (method == "gwpf_paper")


def test_without_a_network_nothing_is_modelled() -> None:
    """What clients computed for is measured all the same."""
    federation = small([30, 40], BRIEF)
    for _ in range(2):
        record = federation.play()
        assert record.modelled_seconds is None
        assert record.compute_seconds is not None
        assert 0 < record.compute_seconds < record.seconds


def test_a_round_without_an_answer_takes_hardly_any_modelled_time() -> None:
    """Nobody is waited for in the model; the sum so far goes on."""
    federation = small([30, 40], BRIEF, network=SLOW)
    before = federation.play().modelled_seconds
    for node in federation.nodes:
        node.tamper = lose
    record = federation.play()
    assert record.compute_seconds is None
    assert before is not None and record.modelled_seconds is not None
    assert before <= record.modelled_seconds < before + record.seconds
    for node in federation.nodes:
        node.tamper = None
    message = min(size(node.received[-1]) for node in federation.nodes)
    after = federation.play().modelled_seconds
    assert after is not None
    assert after > record.modelled_seconds + 8 * message / 0.9e6


def test_modelled_seconds_go_on_after_a_resume(
    compose: Compose, tmp_path: Path
) -> None:
    """As the bytes do: from the checkpoint's last record."""
    cfg = compose("method=gwpf", "checkpoint_every=2")
    first = configured(cfg, tmp_path / "first", network=SLOW)
    first.play(2)
    resume = f"resume={tmp_path / 'first'}"
    second = configured(compose("method=gwpf", resume), network=SLOW)
    assert second.strategy.records == first.strategy.records
    saved = first.strategy.records[-1].modelled_seconds
    record = second.play()
    assert saved > 0 and record.modelled_seconds is not None
    least = max(size(n.received[0]) / 0.9e6 for n in second.nodes) * 8
    assert record.modelled_seconds > saved + least
    assert record.modelled_seconds < saved + least + 100


UNBELIEVABLE: dict[str, list[Any]] = {
    "nothing": [],
    "NaN": [np.nan],
    "infinity": [np.inf],
    "negative": [-5.0],
    "huge": [1e308],
    "a day": [86400.0],
    "no number": ["long"],
    "a whole number": [10**400],
    "a list": [[1.0, 2.0]],
    "bytes": [b"1.0"],
    "true": [True],
}


@pytest.mark.parametrize("name", UNBELIEVABLE)
def test_a_client_that_reports_an_unbelievable_time_harms_nobody(
    name: str, warnings: Callable[[], str]
) -> None:
    """Its upload is used; no time is longer than the server has waited."""
    federation, twin = (
        small([30, 40, 50], BRIEF, network=SLOW, weighting="examples") for _ in range(2)
    )

    def lie(answer: FitRes) -> FitRes:
        metrics = dict(answer.metrics)
        del metrics["compute_seconds"]
        for value in UNBELIEVABLE[name]:
            metrics["compute_seconds"] = value
        return replace(answer, metrics=metrics)

    federation.nodes[1].tamper = lie
    for _ in range(3):
        before = federation.strategy.records[-1:]
        counts = [len(node.sent) for node in federation.nodes]
        started = time.perf_counter()
        record, honest = federation.play(), twin.play()
        wall = time.perf_counter() - started
        assert (record.clients, record.failures) == (3, 0)
        assert record.train_loss == honest.train_loss
        _assert_same(federation, twin)
        assert record.compute_seconds is not None
        assert 0 < record.compute_seconds < wall
        sent = [
            8 * size(node.received[k]) / 0.9e6 + 8 * size(node.sent[k]) / 0.3e6
            for node, k in zip(federation.nodes, counts, strict=True)
        ]
        modelled = record.modelled_seconds
        assert modelled is not None
        modelled -= before[0].modelled_seconds if before else 0.0
        assert max(sent) < modelled < max(sent) + 2 * wall
    assert not warnings()


# ---- aggregation --------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("method", ["gwpf_paper", "fedavg"])
def test_updates_and_buffers_are_averaged(method: str, weighting: str) -> None:
    """All clients count alike or by their examples, batch statistics too."""
    sizes = [10, 30, 60]
    options = THRESHOLD if method == "gwpf_paper" else None
    federation = small(sizes, BRIEF, method, options, weighting=weighting)
    strategy = federation.strategy
    before = strategy.weights.numpy().copy()
    federation.play()
    shares = np.array(sizes if weighting == "examples" else [1, 1, 1]) / 1.0
    sent = []
    for node in federation.nodes:
        reader = payload_of(node.sent[0], federation)
        if method == "gwpf_paper":
            reader.bitmap(0)
        sent.append([reader.vector(395), reader.vector(11, part=Part.BUFFERS)])
        reader.finish()
    update, buffers = (
        np.average([vectors[k] for vectors in sent], axis=0, weights=shares)
        for k in range(2)
    )
    assert_allclose(strategy.weights, before + update, atol=1e-6)
    assert_allclose(strategy.buffers, buffers, rtol=1e-6)
    # Five means, five variances and the counter of two batches.
    assert buffers.shape == (11,) and buffers[-1] == 2
    assert np.abs(update).max() > 1e-3


@pytest.mark.parametrize(
    "number", [0, -5, 11, 2**31 - 1, 2**40, 10.0, True, "10", b"10", [10], None]
)
def test_a_client_weighs_as_much_as_it_has_examples(number: Any) -> None:
    """Whatever else it claims, of whatever type, is that client's failure."""
    for weighting, failures in (("examples", 1), ("uniform", 0)):
        federation = small([10, 30], BRIEF, "fedavg", weighting=weighting)
        federation.nodes[0].tamper = partial(replace, num_examples=number)
        record = federation.play()
        assert (record.clients, record.failures) == (2 - failures, failures)


def test_buffers_are_sent_in_full_and_counted() -> None:
    """Both ways, also while nothing else is sent."""
    federation = small([30, 40], BRIEF)
    federation.play()
    for node in federation.nodes:
        # No step has been taken yet; then there are votes.
        for message, votes in ((node.received[0], False), (node.sent[0], True)):
            reader = payload_of(message, federation)
            if votes:
                read_ternary(reader, 395, Activity(federation.strategy.layers))
            assert reader.vector(11, part=Part.BUFFERS).shape == (11,)
            reader.finish()
    record = federation.strategy.records[0]
    assert record.uplink_bytes == sum(size(n.sent[0]) for n in federation.nodes)
    assert record.uplink_buffer_bytes == record.downlink_buffer_bytes == 2 * (2 + 44)


@pytest.mark.parametrize("method", ["gwpf", "gwpf_paper", "fedavg", "stc"])
def test_the_order_of_arrival_does_not_matter(method: str) -> None:
    """Floating-point sums depend on their order; the model does not, to the bit."""
    options = THRESHOLD if method == "gwpf_paper" else None
    sizes = [20, 30, 40, 50, 60, 70]
    federations = [small(sizes, BRIEF, method, options) for _ in range(4)]
    orders = [np.random.default_rng(k).permutation(6) for k in range(4)]
    for number in range(1, 4):
        for federation, order in zip(federations, orders, strict=True):
            strategy = federation.strategy
            instructions = strategy.configure_fit(
                number, strategy.parameters(), federation.server.client_manager()
            )
            results = [(node, node.fit(ins, None, None)) for node, ins in instructions]
            strategy.aggregate_fit(number, [results[k] for k in order], [])
            _assert_same(federation, federations[0])


# ---- who takes part -----------------------------------------------------------------


def _sampled(federation: Federation, rounds: int = 6) -> list[list[int]]:
    sampled = []
    for _ in range(rounds):
        seen = [len(node.received) for node in federation.nodes]
        federation.play()
        asked = [
            node.partition
            for node, count in zip(federation.nodes, seen, strict=True)
            if len(node.received) > count
        ]
        sampled.append(sorted(asked))
    return sampled


def test_sampling_follows_from_the_seed_not_from_node_ids() -> None:
    """Flower's ids are random and nodes connect in any order."""
    brief = TrainingConfig(local_steps=1, batch_size=4)

    def sampled(seed: int, ids: str) -> list[list[int]]:
        plain = small([10] * 6, brief, fraction_fit=0.5, seed=seed)
        for node, cid in zip(plain.nodes, ids, strict=True):
            node.cid = cid
        nodes = sorted(plain.nodes, key=lambda node: node.cid)
        return _sampled(Federation(plain.strategy, nodes))

    first = sampled(0, "abcdef")
    assert first == sampled(0, "fbdace")
    assert first != sampled(1, "abcdef")
    assert all(len(round_) == 3 for round_ in first)
    assert {client for round_ in first for client in round_} == set(range(6))


@pytest.mark.parametrize(("fraction", "clients"), [(0.01, 1), (0.5, 2), (1.0, 5)])
def test_a_share_of_the_clients_takes_part(fraction: float, clients: int) -> None:
    """At least one."""
    brief = TrainingConfig(local_steps=1, batch_size=4)
    assert small([10] * 5, brief, fraction_fit=fraction).play().clients == clients


def test_nodes_that_cannot_be_told_apart_are_left_out(
    warnings: Callable[[], str],
) -> None:
    """A second one for a partition, and one that does not say which it serves."""
    federation = small([30, 40, 50], BRIEF)
    twin = small([30, 40, 50], BRIEF)

    def broken(store: InMemory) -> SyncClient:
        raise ConfigError("partition-id", None, "in the node's configuration")

    nodes = [
        *federation.nodes,
        Node(1, federation.nodes[1].build, cid="second"),
        Node(7, broken, cid="third"),
    ]
    crowded = Federation(federation.strategy, nodes)
    assert crowded.play(2).clients == 3
    twin.play(2)
    _assert_same(crowded, twin)
    assert warnings().count("node second also claims partition 1") == 1
    assert "node third gave no answer: partition-id=None" in warnings()


def test_too_few_nodes_end_the_run_with_a_way_out(
    warnings: Callable[[], str],
) -> None:
    """The message says how many there are and what to change."""
    federation = small([30, 40, 50], BRIEF, connect_timeout=0)
    alone = Federation(federation.strategy, federation.nodes[:2])
    with pytest.raises(ConfigError, match="num_clients=3: .* serve, 2"):
        alone.play()
    assert "waiting for clients: 2 of 3 partitions are served" in warnings()


def test_rounds_without_nodes_are_empty_and_do_not_end_the_run(
    warnings: Callable[[], str],
) -> None:
    """When nodes come back, even fewer than at first, they go on."""
    federation = small([30, 40, 50], BRIEF, connect_timeout=0)
    manager = federation.server.client_manager()
    federation.play(2)
    for node in federation.nodes:
        manager.unregister(node)
    before = bits(federation.strategy.weights)
    for number in (3, 4):
        record = federation.play()
        assert (record.round, record.clients, record.failures) == (number, 0, 0)
        assert record.uplink_bytes == record.downlink_bytes == 0
        assert f"round {number}: no client" in warnings()
    assert bits(federation.strategy.weights) == before
    for node in federation.nodes[:2]:
        manager.register(node)
    record = federation.play()
    assert (record.clients, record.failures) == (2, 0)


# ---- what a strategy is given -------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_clients": 0},
        {"num_clients": "x"},
        {"fraction_fit": 5},
        {"fraction_fit": -1},
        {"weighting": "foo"},
        {"weighting": "examples", "num_examples": None},
        {"weighting": "examples", "num_examples": [1]},
        {"callbacks": [print]},
        {"norm_bound": 0},
    ],
)
def test_a_strategy_takes_no_option_that_it_cannot_use(
    options: dict[str, Any], compose: Compose
) -> None:
    """Whoever builds one is told at once, and not in the rounds."""
    [key, *_] = options
    with pytest.raises(ConfigError, match=f"^{key}="):
        configured(compose("method=gwpf"), **options)


def test_a_configured_strategy_has_what_is_configured(compose: Compose) -> None:
    """What stands in its own configuration, and not only what has another default."""
    cfg = compose(
        *("method=gaia", "server_optimizer=fedadam", "server_optimizer.lr=0.02"),
        *("quantization.bits=8", "norm_bound=7", "seed=5", "max_empty_rounds=3"),
        *("weighting=examples", "fraction_fit=0.4", "round_timeout=9"),
    )
    strategy = configured(cfg).strategy
    assert strategy.optimizer.config.name == "fedadam"
    assert strategy.optimizer.config.lr == 0.02
    assert strategy.quantization.bits == 8
    assert strategy.update_bound.multiple == strategy.buffer_bound.multiple == 7
    assert (strategy.seed, strategy.max_empty_rounds) == (5, 3)
    assert (strategy.weighting, sum(strategy.num_examples)) == ("examples", 1437)
    roster = strategy.roster
    assert (roster.num_clients, roster.fraction, roster.seed) == (5, 0.4, 5)
    assert (roster.answer_timeout, roster.connect_timeout) == (9, 120)


def test_a_configured_client_has_what_is_configured(compose: Compose) -> None:
    """Its data, how it trains, and where its part of a checkpoint is."""
    options = ["method=gwpf", "dataset.augment=true", "momentum=0.9", "seed=5"]
    cfg = compose(*options, "checkpoint_every=1")
    client = make_client(cfg, 2, "run")
    batches = client.batches
    assert (batches.client, batches.seed, batches.augment) == (2, 5, True)
    assert (client.training.momentum, client.training.batch_size) == (0.9, 8)
    assert client.saved is not None
    assert client.saved.path == client.found[0].path == Path("run/checkpoints")
    homeless = make_client(cfg, 2, "", InMemory())
    assert homeless.saved is None and not homeless.found


def test_no_more_messages_of_a_second_exchange_are_on_their_way_than_of_the_first(
    compose: Compose,
) -> None:
    """As many as whoever plays the rounds has said."""
    federation = configured(compose("method=gwpf_paper"))
    here, most = [0], [0]
    for node in federation.nodes:

        def watched(ins: Any, fit: Any = node.fit, **how: Any) -> FitRes:
            here[0] += 1
            most[0] = max(most[0], here[0])
            time.sleep(0.02)
            answer: FitRes = fit(ins, **how)
            here[0] -= 1
            return answer

        node.fit = watched  # type: ignore[assignment, method-assign]
    federation.play(6)
    assert federation.strategy.exchange > 6
    assert most == [1]


# ---- checkpoints --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_goes_on_to_the_bit(
    method: str, compose: Compose, tmp_path: Path
) -> None:
    """Twice over, although some clients take no part between the two checkpoints."""
    overrides = [
        *METHODS[method],
        "fraction_fit=0.4",
        "checkpoint_every=2",
        "optimizer=adam",
        "lr=0.001",
        "persist_optimizer=true",
        "seed=5",
    ]

    def begun(folder: str, *resume: str) -> Federation:
        federation = configured(compose(*overrides, *resume), tmp_path / folder)
        # One that fails whenever it is asked, and therefore rests.
        federation.nodes[3].tamper = lose
        return federation

    whole = begun("whole")
    whole.play(10)
    begun("first").play(4)
    second = begun("second", f"resume={tmp_path / 'first'}")
    second.play(2)
    third = begun("third", f"resume={tmp_path / 'second'}")
    third.play(4)

    _assert_same(third, whole)
    for mine, theirs in zip(third.nodes, whole.nodes, strict=True):
        # Of who was not asked since, it is where it was.
        if mine.received:
            _assert_same_state(mine.state, theirs.state)
    state, expected = third.strategy.state(), whole.strategy.state()
    for key in state.keys() - {"records"}:
        if not isinstance(state[key], torch.Tensor):
            assert state[key] == expected[key], key
    assert state["standings"] and state["clients"]
    for mine, theirs in zip(
        third.strategy.records, whole.strategy.records, strict=True
    ):
        assert _timeless(mine) == _timeless(theirs)
    # Otherwise there would be little to go on with.
    happened = {
        "apf": lambda r: 0 < r.frozen_fraction < 1,
        "apf_aggressive": lambda r: 0 < r.frozen_fraction < 1,
        "gaia": lambda r: 0 < r.sent_fraction < 1,
        "cmfl": lambda r: r.clients + r.failures < 2,
        "stc": lambda r: 0 < r.sent_fraction < 0.02,
        "zerofl": lambda r: 0 < r.sent_fraction < 1,
        "gradient_pruning": lambda r: 0 < r.sent_fraction < 1,
    }
    if method in happened:
        assert any(map(happened[method], whole.strategy.records[:6]))
    # Otherwise the second checkpoint would be as good as the first.
    rested = [not second.nodes[i].received for i in range(5)]
    returned = [bool(third.nodes[i].received) for i in range(5)]
    assert any(r and b for r, b in zip(rested, returned, strict=True))


@pytest.mark.parametrize("method", ["apf", "apf_aggressive"])
def test_masks_are_derived_as_before_after_a_resume(
    method: str, compose: Compose, tmp_path: Path
) -> None:
    """No mask is sent, and what was checked before the checkpoint counts."""
    overrides = [*METHODS[method], "checkpoint_every=3"]
    whole = configured(compose(*overrides), tmp_path / "whole")
    whole.play(7)
    configured(compose(*overrides), tmp_path / "first").play(3)
    resume = f"resume={tmp_path / 'first'}"
    resumed = configured(compose(*overrides, resume), tmp_path / "resumed")
    record = resumed.play(4)
    _assert_same(resumed, whole)
    for mine, theirs in zip(resumed.nodes, whole.nodes, strict=True):
        _assert_same_state(mine.state, theirs.state)
        assert [payload_of(m, resumed).header.with_mask for m in mine.received] == [
            False
        ] * 4
    assert record.frozen_fraction is not None and record.frozen_fraction > 0
    assert record.clients == 5
    for one, other in zip(
        resumed.strategy.records, whole.strategy.records, strict=True
    ):
        assert _timeless(one) == _timeless(other)


def test_clients_write_their_parts_before_the_server(
    monkeypatch: pytest.MonkeyPatch, compose: Compose, tmp_path: Path
) -> None:
    """So that a checkpoint with the server's part is whole, whenever it is killed."""
    there = []

    def commit(self: CheckpointFolder, checkpoint: str, state: Any) -> None:
        del state
        there.append(sorted(path.name for path in (self.path / checkpoint).iterdir()))

    monkeypatch.setattr(CheckpointFolder, "commit", commit)
    cfg = compose("method=gwpf", "checkpoint_every=1")
    configured(cfg, tmp_path).play()
    assert there == [[f"client-{client}.safetensors" for client in range(5)]]


def test_who_starts_again_in_mid_run_goes_on_from_its_part_of_the_checkpoint(
    compose: Compose, tmp_path: Path
) -> None:
    """The server tells it which one counts; the older ones are gone."""
    cfg = compose("method=gwpf", "checkpoint_every=1")
    federation = configured(cfg, tmp_path / "one")
    twin = configured(cfg, tmp_path / "other")
    for _ in range(4):
        assert federation.play().failures == twin.play().failures == 0
        _assert_same(federation, twin)
        federation.nodes[1].forget()
    assert len(list(tmp_path.glob("one/checkpoints/*/client-1.*"))) == 1


@pytest.mark.parametrize("limit", [None, 7.0])
def test_nobody_is_asked_without_a_limit(
    limit: float | None, compose: Compose, tmp_path: Path
) -> None:
    """Who it is, and for its part of a checkpoint, where answers have none."""
    cfg = compose("method=gwpf", "checkpoint_every=1", "connect_timeout=33")
    federation = configured(cfg, tmp_path, round_timeout=limit)
    limits = []
    for node in federation.nodes:

        def watched(
            ins: Any, timeout: Any, group_id: Any, ask: Any = node.get_properties
        ) -> Any:
            limits.append((bool(ins.config), timeout))
            return ask(ins, timeout, group_id)

        node.get_properties = watched  # type: ignore[method-assign]
    federation.play()
    assert sorted(limits) == [(False, 33)] * 5 + [(True, limit or 600)] * 5


def test_each_client_has_its_own_time_to_write_its_part_of_a_checkpoint(
    tmp_path: Path, compose: Compose, warnings: Callable[[], str]
) -> None:
    """Whoever comes last has as much as whoever comes first."""
    cfg = compose("method=fedavg", "checkpoint_every=1")
    federation = configured(cfg, tmp_path, round_timeout=0.5)
    for node in federation.nodes:

        def slow(store: InMemory, build: Any = node.build) -> SyncClient:
            time.sleep(0.2)
            client: SyncClient = build(store)
            return client

        node.build = slow
    federation.play()
    assert "did not write" not in warnings()
    assert len(list(tmp_path.glob("checkpoints/*/client-*"))) == len(federation.nodes)


def test_a_client_that_cannot_write_does_not_stop_the_checkpoint(
    tmp_path: Path, compose: Compose, warnings: Callable[[], str]
) -> None:
    """It says that it lost its state when the run is resumed; the others go on."""
    cfg = compose("method=gwpf", "checkpoint_every=2")
    federation = configured(cfg, tmp_path / "first")
    build = federation.nodes[2].build

    def without_disk(store: InMemory) -> SyncClient:
        client = build(store)
        client.saved = None
        return client

    federation.nodes[2].build = without_disk
    federation.play(2)
    assert "client 2" not in warnings()
    resumed = configured(compose("method=gwpf", f"resume={tmp_path / 'first'}"))
    record = resumed.play()
    assert (record.round, record.clients, record.failures) == (3, 4, 1)
    record = resumed.play()
    assert (record.round, record.clients, record.failures) == (4, 5, 0)


def _timeless(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0, compute_seconds=None, modelled_seconds=None)
