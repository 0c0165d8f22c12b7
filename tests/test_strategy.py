"""Tests of what all methods share: messages, versions, faults, bytes, checkpoints."""

import io
import logging
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    Federation,
    Node,
    configured,
    lose,
    npy,
    size,
    small,
    with_tensors,
)
from flwr.common import Code, Context, FitRes, Parameters, Status
from numpy.testing import assert_allclose, assert_array_equal
from omegaconf import DictConfig

from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.payload import (
    Header,
    Kind,
    Reader,
    WireError,
    encode_bitmap,
    parse_tensors,
)
from gwpf_baseline.learning.client import ClientState, SyncClient, Task
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.utils import ConfigError

Compose = Callable[..., DictConfig]
Tamper = Callable[[list[bytes]], list[bytes]]

BRIEF = TrainingConfig(local_steps=2, batch_size=10)
# Freezes within a few rounds.
EAGER = ["method.check_every=1", "method.ema=0.5", "method.threshold=0.9"]
METHODS = {
    "gwpf": ["method=gwpf"],
    "gwpf_same_round": ["method=gwpf", "method.thaw_exchange=same_round"],
    "gwpf_paper": ["method=gwpf_paper"],
    "fedavg": ["method=fedavg"],
    "apf": ["method=apf", *EAGER],
    "apf_aggressive": ["method=apf_aggressive", *EAGER],
    "gaia": ["method=gaia"],
    "cmfl": ["method=cmfl", "method.threshold=0.6"],
}
THRESHOLD = {"freeze_rule": "threshold", "ema": 0.5}


@pytest.fixture(name="compose", scope="module")
def _compose(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    """Return a function that composes small experiments on the built-in digits."""
    cache = tmp_path_factory.mktemp("cache")

    def compose(*overrides: str) -> DictConfig:
        brief = ["num_clients=5", "local_steps=1", "batch_size=8"]
        cached = f"dataset.cache_dir={cache}"
        return checked(compose_config([*brief, cached, *overrides]))

    return compose


@pytest.fixture(name="warnings")
def _warnings(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], str]:
    """Return a function that returns what the strategy has warned of."""
    # The command line, which other tests may have run, keeps the log to itself.
    monkeypatch.setattr(logging.getLogger("gwpf_baseline"), "propagate", True)
    caplog.set_level(logging.WARNING, "gwpf_baseline")
    return lambda: "\n".join(caplog.messages)


def bits(vector: torch.Tensor) -> list[int]:
    """Return a vector's bits, which tell 0 from -0."""
    return vector.view(torch.int32).tolist()


def payload(parameters: Parameters, federation: Federation) -> Reader:
    """Open a message."""
    strategy = federation.strategy
    arrays = parse_tensors(parameters.tensors)
    return Reader(arrays, strategy.name, strategy.dimension)


# ---- partial participation ----------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_participant_holds_the_global_model_to_the_bit(
    method: str, compose: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every exchange, however many rounds it has missed."""
    cfg = compose(*METHODS[method], "fraction_fit=0.4")
    federation = configured(cfg)
    agreed, gaps, last = [], [], dict.fromkeys(range(5), 0)
    follow = SyncClient.follow

    def watched(self: SyncClient, reader: Reader, state: ClientState) -> Task:
        task = follow(self, reader, state)
        server = federation.strategy
        agreed.append(bits(task.weights) == bits(server.weights))
        if task.buffers is not None:
            agreed.append(bits(task.buffers) == bits(server.buffers))
            gaps.append(federation.rounds - last[self.batches.client])
            last[self.batches.client] = federation.rounds
        return task

    monkeypatch.setattr(SyncClient, "follow", watched)
    before = federation.strategy.weights.clone()
    for _ in range(14):
        record = federation.play()
        assert (federation.strategy.answers, record.failures) == (2, 0)
        assert record.clients == 2 or method == "cmfl"
    assert agreed and all(agreed)
    assert max(gaps) > 4
    assert bits(before) != bits(federation.strategy.weights)


def test_a_message_holds_exactly_what_changed_since(compose: Compose) -> None:
    """The union of what was synchronised after the client's last exchange."""
    federation = configured(compose("method=gwpf", "fraction_fit=0.6"))
    strategy, asked, kinds, gaps = federation.strategy, [], set(), set()
    for number in range(1, 13):
        weights = strategy.weights.numpy().copy()
        seen = [len(node.received) for node in federation.nodes]
        federation.play()
        asked.append(strategy.asked.numpy().copy())
        for node, count in zip(federation.nodes, seen, strict=True):
            for message in node.received[count:]:
                reader = payload(message, federation)
                header = reader.header
                assert header.exchange == number
                changed = np.any([np.zeros_like(asked[0]), *asked[header.base : -1]], 0)
                if header.kind is Kind.CHANGES:
                    assert_array_equal(reader.bitmap(strategy.dimension), changed)
                assert_array_equal(reader.bitmap(strategy.dimension), asked[-1])
                values = reader.vector(int(np.count_nonzero(changed)))
                assert_array_equal(values, weights[changed])
                reader.finish()
                kinds.add(header.kind)
                gaps.add(number - 1 - header.base)
    assert kinds == {Kind.CHANGES, Kind.MASKED}
    assert max(gaps) > 2


@pytest.mark.parametrize("method", ["gwpf", "gwpf_same_round", "gwpf_paper"])
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
    lost, silent = federation.play(), twin.play()
    assert (lost.clients, lost.failures) == (silent.clients, silent.failures) == (4, 1)
    assert f"client 2 left out of exchange {exchange + 1}: it no longer" in warnings()
    assert bits(federation.strategy.weights) == bits(twin.strategy.weights)
    back = federation.play()
    assert (back.clients, back.failures) == (5, 0)
    held = federation.nodes[2].state.arrays["weights"]
    assert_array_equal(held, federation.nodes[0].state.arrays["weights"])


@pytest.mark.parametrize("method", ["gwpf", "gwpf_paper"])
def test_a_client_with_other_initial_weights_is_given_the_model(
    method: str, compose: Compose, warnings: Callable[[], str]
) -> None:
    """As another release draws them; nobody else is affected."""
    cfg = compose(*METHODS[method])
    federation, twin = configured(cfg), configured(cfg)
    build = federation.nodes[3].build

    def other_release(context: Context) -> SyncClient:
        client = build(context)
        client.initial = client.initial + 1e-3
        return client

    federation.nodes[3].build = other_release
    twin.nodes[3].reachable = False
    first, silent = federation.play(), twin.play()
    assert (
        (first.clients, first.failures) == (silent.clients, silent.failures) == (4, 1)
    )
    assert bits(federation.strategy.weights) == bits(twin.strategy.weights)
    assert "client 3 left out of exchange 1: it no longer holds version 0" in warnings()
    second = federation.play()
    assert (second.clients, second.failures) == (5, 0)
    message = payload(federation.nodes[3].received[1], federation)
    assert message.header.kind is Kind.MODEL
    held = [node.state.arrays["weights"] for node in federation.nodes]
    assert_array_equal(held[3], held[0])


def test_a_node_may_join_later(compose: Compose) -> None:
    """It starts from the seed's weights and catches up at once."""
    federation = configured(compose("method=gwpf"), num_clients=4)
    late = federation.nodes[4]
    manager = federation.server.client_manager()
    manager.unregister(late)
    assert federation.play(4).clients == 4
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
    client = federation.nodes[0].build(federation.nodes[0].context)
    for message, reason in (
        (other.nodes[0].received[0], "not of method gwpf"),
        (federation.nodes[0].sent[0], "a server does not send UPDATE"),
    ):
        with pytest.raises(WireError, match=reason):
            client.fit(list(parse_tensors(message.tensors)), {})


# ---- faults -------------------------------------------------------------------------


def _spoiled(value: float) -> Tamper:
    def tamper(tensors: list[bytes]) -> list[bytes]:
        values = parse_tensors(tensors)[1].copy()
        values[3] = value
        return [tensors[0], npy(values), *tensors[2:]]

    return tamper


def _recast(dtype: Any) -> Tamper:
    def tamper(tensors: list[bytes]) -> list[bytes]:
        values = parse_tensors(tensors)[1]
        return [tensors[0], npy(values.astype(dtype)), *tensors[2:]]

    return tamper


def _reframed(tensors: list[bytes], **changes: Any) -> list[bytes]:
    frame = parse_tensors(tensors)[0].tobytes()
    header = Header.unpack(frame, "gwpf", 395)
    changed = replace(header, **changes).pack() + frame[len(header.pack()) :]
    return [npy(np.frombuffer(changed, np.uint8)), *tensors[1:]]


def _flagged(tensors: list[bytes], flags: int) -> list[bytes]:
    frame = bytearray(parse_tensors(tensors)[0].tobytes())
    assert frame[4] == 0
    frame[4] = flags
    return [npy(np.frombuffer(bytes(frame), np.uint8)), *tensors[1:]]


def _skipped(tensors: list[bytes], left_over: bytes = b"") -> list[bytes]:
    frame = parse_tensors(tensors)[0].tobytes()
    header = Header.unpack(frame, "gwpf", 395)
    alone = replace(header, kind=Kind.SKIPPED).pack() + left_over
    return [npy(np.frombuffer(alone, np.uint8))]


def _all_vote(tensors: list[bytes]) -> list[bytes]:
    frame = parse_tensors(tensors)[0].tobytes()
    header = Header.unpack(frame, "gwpf", 395).pack()
    votes = encode_bitmap(np.ones(395, np.bool_))
    return [npy(np.frombuffer(header + votes, np.uint8)), *tensors[1:]]


def _announce(tensors: list[bytes], count: int) -> list[bytes]:
    values = tensors[1].replace(b"(8,), }", f"({count},), }}".encode(), 1)
    padding = len(values) - len(tensors[1])
    return [tensors[0], values.replace(b" " * padding + b"\n", b"\n", 1), *tensors[2:]]


def _object_array(tensors: list[bytes]) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"weights": 1}], object), allow_pickle=True)
    return [tensors[0], buffer.getvalue(), *tensors[2:]]


HOSTILE: dict[str, Tamper] = {
    "nothing": lambda t: [],
    "no vectors": lambda t: t[:1],
    "truncated": lambda t: [t[0], t[1][:-3], *t[2:]],
    "a value short": lambda t: [t[0], npy(parse_tensors(t)[1][:-1]), *t[2:]],
    "over-long": lambda t: [t[0], t[1] + bytes(4), *t[2:]],
    "a value more": lambda t: [t[0], npy(np.zeros(9, np.float32)), *t[2:]],
    "a vector more": lambda t: [*t, t[1]],
    "exchanged vectors": lambda t: [t[0], t[2], t[1]],
    "float64": _recast(np.float64),
    "float16": _recast(np.float16),
    "big endian": _recast(">f4"),
    "integers": _recast(np.int32),
    "NaN": _spoiled(np.nan),
    "infinity": _spoiled(np.inf),
    "minus infinity": _spoiled(-np.inf),
    "NaN in the buffers": lambda t: [*t[:2], npy(np.full(11, np.nan, np.float32))],
    "huge length": partial(_announce, count=10**11),
    "absurd length": partial(_announce, count=2**60),
    "object array": _object_array,
    "pickle": lambda t: [pickle.dumps({"weights": [1.0]})],
    "noise": lambda t: [bytes(range(256)) * 8],
    "later exchange": partial(_reframed, exchange=4),
    "earlier exchange": partial(_reframed, exchange=2),
    "later mask": partial(_reframed, base=3),
    "earlier mask": partial(_reframed, base=1),
    "other method": partial(_reframed, method="fedavg"),
    "other model": partial(_reframed, length=396),
    "a server's message": partial(_reframed, kind=Kind.MODEL),
    "lost, but how": partial(_reframed, kind=Kind.LOST, base=2),
    "lost": partial(_reframed, kind=Kind.LOST, base=-1),
    "a fourth flag": partial(_flagged, flags=4),
    "all flags": partial(_flagged, flags=0xFF),
    "skipped, with all of it": partial(_reframed, kind=Kind.SKIPPED),
    "skipped, with a bitmap": partial(_skipped, left_over=b"\1\0\0\0"),
    "skipped, with a byte": partial(_skipped, left_over=b"\0"),
    "skipped, with a vector": lambda t: [*_skipped(t), t[1]],
    "skipped, from an earlier version": lambda t: _reframed(_skipped(t), base=1),
    "skipped, in an earlier exchange": lambda t: _reframed(_skipped(t), exchange=2),
    "votes for active coordinates": _all_vote,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_that_clients_failure(
    name: str, warnings: Callable[[], str]
) -> None:
    """The round goes on as if the client had not answered, and says who it was."""
    federation, twin = (small([30, 40, 50], BRIEF) for _ in range(2))
    federation.play(2)
    twin.play(2)
    federation.nodes[1].tamper = lambda answer: with_tensors(
        answer, HOSTILE[name](answer.parameters.tensors)
    )
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
    for tamper in (lambda t: t, _spoiled(0.5), _recast(np.float32), _reframed):
        federation = small([30, 40, 50], BRIEF)
        federation.play(2)
        federation.nodes[1].tamper = lambda answer, tamper=tamper: with_tensors(
            answer, tamper(answer.parameters.tensors)
        )
        record = federation.play()
        assert (record.clients, record.failures) == (3, 0)
        assert [len(parse_tensors(n.sent[-1].tensors)) for n in federation.nodes] == [
            3
        ] * 3


def test_an_older_answer_is_not_used_again(warnings: Callable[[], str]) -> None:
    """A replayed payload was valid once, but for another exchange."""
    federation, twin = (small([30, 40, 50], BRIEF) for _ in range(2))
    federation.play(3)
    twin.play(3)
    old = federation.nodes[1].sent[1].tensors
    federation.nodes[1].tamper = lambda answer: with_tensors(answer, old)
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
@pytest.mark.parametrize("method", ["gwpf", "fedavg"])
def test_a_round_in_which_all_fail_changes_nothing(name: str, method: str) -> None:
    """Neither weights, buffers, mask nor averages; the next one goes on."""
    options = THRESHOLD if method == "gwpf" else None
    federation = small([30, 40, 50], BRIEF, method, options)
    federation.play(3)
    before = {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in federation.strategy.state().items()
        if key not in ("exchange", "records", "clients")
    }
    for node in federation.nodes:
        node.reachable = name != "silent"
        if name == "lost":
            node.tamper = lose
        elif name != "silent":
            node.tamper = lambda answer: with_tensors(
                answer, HOSTILE[name](answer.parameters.tensors)
            )
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
    same_round = method in ("gwpf_same_round", "gwpf_paper")
    assert (federation.strategy.exchange > 6) == same_round


def test_dense_bytes_are_what_fedavg_sends(compose: Compose) -> None:
    """Every method is compared with the same number of bytes."""
    dense = configured(compose("method=fedavg", "fraction_fit=0.6")).play(3)
    total = dense.cumulative_uplink_bytes + dense.cumulative_downlink_bytes
    assert dense.dense_bytes == total
    sparse = configured(compose("method=gwpf", "fraction_fit=0.6")).play(3)
    assert sparse.dense_bytes == total
    assert sparse.cumulative_uplink_bytes < total / 20


def test_records_hold_what_was_measured() -> None:
    """What was not measured is empty, never zero; losses are the clients' mean."""
    measured: list[tuple[int, torch.Tensor]] = []
    told: list[RoundRecord] = []

    def evaluate(
        number: int, weights: torch.Tensor, buffers: torch.Tensor
    ) -> tuple[float, float] | None:
        measured.append((number, weights.clone()))
        return (0.5, 0.25) if number % 2 == 0 else None

    federation = small(
        [30, 40], BRIEF, "fedavg", evaluate_fn=evaluate, on_round=told.append
    )
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


@pytest.mark.parametrize("method", ["gwpf", "gwpf_same_round", "apf", "cmfl"])
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
    assert (exchanges > 6) == (method == "gwpf_same_round")


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
@pytest.mark.parametrize("method", ["gwpf", "fedavg"])
def test_updates_and_buffers_are_averaged(method: str, weighting: str) -> None:
    """All clients count alike or by their examples, batch statistics too."""
    sizes = [10, 30, 60]
    options = THRESHOLD if method == "gwpf" else None
    federation = small(sizes, BRIEF, method, options, weighting=weighting)
    strategy = federation.strategy
    before = strategy.weights.numpy().copy()
    federation.play()
    shares = np.array(sizes if weighting == "examples" else [1, 1, 1]) / 1.0
    sent = [parse_tensors(node.sent[0].tensors)[1:] for node in federation.nodes]
    update, buffers = (
        np.average([vectors[k] for vectors in sent], axis=0, weights=shares)
        for k in range(2)
    )
    assert_allclose(strategy.weights, before + update, atol=1e-6)
    assert_allclose(strategy.buffers, buffers, rtol=1e-6)
    # Five means, five variances and the counter of two batches.
    assert buffers.shape == (11,) and buffers[-1] == 2
    assert np.abs(update).max() > 1e-3


def test_a_client_without_examples_has_no_weight() -> None:
    """Nor one with a negative or an absurd number of them."""
    for number in (0, -5, 2**40):
        federation = small([10, 30], BRIEF, "fedavg", weighting="examples")
        federation.nodes[0].tamper = partial(replace, num_examples=number)
        record = federation.play()
        assert (record.clients, record.failures) == (1, 1)


def test_buffers_are_sent_in_full_and_counted() -> None:
    """Both ways, also while nothing else is sent."""
    federation = small([30, 40], BRIEF)
    federation.play()
    for node in federation.nodes:
        for message in (node.received[0], node.sent[0]):
            _, buffers = parse_tensors(message.tensors)
            assert buffers.shape == (11,)
    record = federation.strategy.records[0]
    assert record.uplink_bytes == sum(size(n.sent[0]) for n in federation.nodes)


@pytest.mark.parametrize("method", ["gwpf", "fedavg"])
def test_the_order_of_arrival_does_not_matter(method: str) -> None:
    """Floating-point sums depend on their order; the model does not, to the bit."""
    options = THRESHOLD if method == "gwpf" else None
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

    def broken(context: Context) -> SyncClient:
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
    assert "node second also claims partition 1: left out" in warnings()
    assert "node third gave no answer: partition-id=None" in warnings()


def test_too_few_nodes_end_the_run_with_a_way_out() -> None:
    """The message says how many there are and what to change."""
    federation = small([30, 40, 50], BRIEF, connect_timeout=0)
    alone = Federation(federation.strategy, federation.nodes[:2])
    with pytest.raises(ConfigError, match="num_clients=3: .* connected nodes, 2"):
        alone.play()


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
    whole = configured(compose(*overrides), tmp_path / "whole")
    whole.play(10)
    configured(compose(*overrides), tmp_path / "first").play(4)
    resume = f"resume={tmp_path / 'first'}"
    second = configured(compose(*overrides, resume), tmp_path / "second")
    second.play(2)
    resume = f"resume={tmp_path / 'second'}"
    third = configured(compose(*overrides, resume), tmp_path / "third")
    third.play(4)

    _assert_same(third, whole)
    for mine, theirs in zip(third.nodes, whole.nodes, strict=True):
        _assert_same_state(mine.state, theirs.state)
    assert third.strategy.exchange == whole.strategy.exchange
    assert third.strategy.clients == whole.strategy.clients
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
        assert [payload(m, resumed).header.masked for m in mine.received] == [False] * 4
    assert record.frozen_fraction is not None and record.frozen_fraction > 0
    assert record.clients == 5
    for one, other in zip(
        resumed.strategy.records, whole.strategy.records, strict=True
    ):
        assert _timeless(one) == _timeless(other)


def test_a_client_that_cannot_write_does_not_stop_the_checkpoint(
    tmp_path: Path, compose: Compose, warnings: Callable[[], str]
) -> None:
    """It says that it lost its state when the run is resumed; the others go on."""
    cfg = compose("method=gwpf", "checkpoint_every=2")
    federation = configured(cfg, tmp_path / "first")
    build = federation.nodes[2].build

    def without_disk(context: Context) -> SyncClient:
        client = build(context)
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
