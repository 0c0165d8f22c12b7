"""Tests of what a round is said to have cost, and what its bytes were spent on."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from federation import Federation, lose, payload_of, size, small, with_payload
from flwr.common import FitRes, Parameters
from omegaconf import OmegaConf
from ternary_rounds import activity_before

from gwpf_baseline.config import config_dir
from gwpf_baseline.exchange.coding import encode_bitmap, encode_positions
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.payload import Part, from_parameters
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.records.books import Books
from gwpf_baseline.records.history import RoundRecord

BRIEF = TrainingConfig(local_steps=2, batch_size=10)
SIZES = [20, 30, 40]
#: Bytes of the eleven buffers of `small`: their type, their number, and they.
BUFFERS = 1 + 1 + 4 * 11
PARTS = ("value", "position", "buffer", "overhead")
# Every variant, and those that need it with what makes them do something soon.
HASTENED: dict[str, dict[str, Any]] = {
    "apf": {"check_every": 1, "ema": 0.5, "threshold": 0.9},
    "apf_aggressive": {"check_every": 1, "ema": 0.5, "threshold": 0.9},
    "cmfl": {"threshold": 0.6},
    # One exchange a round.
    "gwpf_paper": {"thaw_exchange": "next_round"},
}
METHODS: dict[str, dict[str, Any]] = {
    file.stem: {
        **OmegaConf.to_container(OmegaConf.load(file)),  # type: ignore[dict-item]
        **HASTENED.get(file.stem, {}),
    }
    for file in sorted(config_dir().glob("method/*.yaml"))
}


def built(method: str, **strategy: Any) -> Federation:
    """Build a federation of three clients."""
    options = {k: v for k, v in METHODS[method].items() if k != "name"}
    return small(SIZES, BRIEF, options.pop("module"), options, **strategy)


def columns(record: RoundRecord, way: str) -> dict[str, int]:
    """Return a record's bytes in one direction, by what they were spent on."""
    return {part: getattr(record, f"{way}_{part}_bytes") for part in PARTS}


def head(parameters: Parameters, federation: Federation) -> tuple[Header, int]:
    """Return a message's header, and its bytes with NumPy's before it."""
    strategy, payload = federation.strategy, from_parameters(parameters)
    header, end = Header.unpack(payload, strategy.name, strategy.dimension)
    return header, size(parameters) - len(payload) + end


class Watch:
    """What travels in a round of a federation: messages, and answers with them."""

    def __init__(self, federation: Federation) -> None:
        self.nodes = federation.nodes
        self.counts = [(len(n.received), len(n.sent)) for n in self.nodes]

    def pairs(self) -> list[tuple[int, Parameters, Parameters]]:
        """Return each node's messages and the answers to them; none got lost."""
        return [
            (node.partition, message, answer)
            for node, (i, j) in zip(self.nodes, self.counts, strict=True)
            for message, answer in zip(node.received[i:], node.sent[j:], strict=True)
        ]


# ---- rounds -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_bytes_were_spent_on_adds_up(method: str) -> None:
    """In each direction: headers are overhead, buffers are theirs, and the rest says
    what changed or what was learned."""
    federation = built(method)
    beside = Counter[str]()
    for _ in range(5):
        watch = Watch(federation)
        record = federation.play()
        assert record.failures == 0
        up, down = Counter[str](), Counter[str]()
        for _, message, answer in watch.pairs():
            asked, asked_head = head(message, federation)
            answered, answered_head = head(answer, federation)
            down += Counter(overhead=asked_head, total=size(message))
            up += Counter(overhead=answered_head, total=size(answer))
            if not asked.follow_up:
                down["buffer"] += BUFFERS
                if answered.kind is Kind.UPDATE:
                    up["buffer"] += BUFFERS
        for way, expected in (("uplink", up), ("downlink", down)):
            spent = columns(record, way)
            total = getattr(record, f"{way}_bytes")
            assert sum(spent.values()) == total == expected["total"]
            assert spent["overhead"] == expected["overhead"]
            assert spent["buffer"] == expected["buffer"]
            assert all(count >= 0 for count in spent.values())
            beside[way] += spent["value"] + spent["position"]
    assert beside["uplink"] > 0 and beside["downlink"] > 0


def _read_gwpf_paper(
    message: Parameters, answer: Parameters, federation: Federation, held: int
) -> Any:
    spent = Counter[str]()
    reader = payload_of(message, federation)
    if reader.header.kind is Kind.CHANGES:
        changed = reader.bitmap(395)
        spent["down position"] += len(encode_bitmap(changed))
        count = int(np.count_nonzero(changed))
    else:
        count = held
    spent["down value"] += _vector(reader.vector(count))
    mask = reader.bitmap(395)
    spent["down position"] += len(encode_bitmap(mask))
    reader = payload_of(answer, federation)
    asked = int(np.count_nonzero(mask))
    spent["up position"] += len(encode_bitmap(reader.bitmap(395 - asked)))
    spent["up value"] += _vector(reader.vector(asked))
    return spent


def _read_ternary(
    message: Parameters, answer: Parameters, federation: Federation, held: int
) -> Any:
    spent = Counter[str]()
    activity = activity_before(message, federation)
    for way, parameters in (("down", message), ("up", answer)):
        reader = payload_of(parameters, federation)
        classes = None if activity is None else activity.classes
        positions = reader.positions(395, classes)
        signs = reader.bitmap(positions.size)
        magnitude = reader.vector(1)
        spent[f"{way} position"] += len(encode_positions(positions, 395, classes))
        spent[f"{way} value"] += len(encode_bitmap(signs)) + _vector(magnitude)
        if activity is not None:
            activity.note(positions)
    return spent


def _read_fedavg(
    message: Parameters, answer: Parameters, federation: Federation, held: int
) -> Any:
    dense = _vector(np.zeros(395, np.float32))
    return Counter({"down value": dense, "up value": dense})


def _read_apf(
    message: Parameters, answer: Parameters, federation: Federation, held: int
) -> Any:
    asked = int(np.count_nonzero(federation.strategy.messages.mask))
    down, up = payload_of(message, federation), payload_of(answer, federation)
    assert down.header.kind is Kind.VALUES and not down.header.with_mask
    return Counter(
        {
            "down value": _vector(down.vector(held)),
            "up value": _vector(up.vector(asked)),
        }
    )


def _read_fedpm(
    message: Parameters, answer: Parameters, federation: Federation, held: int
) -> Any:
    dimension = federation.strategy.dimension
    reader = payload_of(message, federation)
    changed = reader.bitmap(dimension)
    count = int(np.count_nonzero(changed))
    bits = size(answer) - head(answer, federation)[1] - BUFFERS
    return Counter(
        {
            "down position": len(encode_bitmap(changed)),
            "down value": _vector(reader.vector(count, np.uint8)),
            "up value": bits,
        }
    )


def _vector(values: np.ndarray) -> int:
    """Return the bytes of a vector: type, number and data."""
    if not values.size:
        return 0
    return 1 + (1 if values.size < 128 else 2) + values.nbytes


READERS = {
    "gwpf": _read_ternary,
    "gwpf_paper": _read_gwpf_paper,
    "stc": _read_ternary,
    "fedavg": _read_fedavg,
    "apf": _read_apf,
    "fedpm": _read_fedpm,
}


@pytest.mark.parametrize("method", READERS)
def test_values_and_positions_are_what_messages_hold(method: str) -> None:
    """Taken apart by hand: which coordinates, and what of them."""
    federation = built(method)
    federation.play(4)
    watch = Watch(federation)
    strategy = federation.strategy
    # All clients hold all but the last exchange's changes.
    held = int(np.count_nonzero(strategy.changed_since(strategy.exchange - 1)))
    record = federation.play()
    expected = Counter[str]()
    for _, message, answer in watch.pairs():
        expected += READERS[method](message, answer, federation, held)
    for way, direction in (("uplink", "up"), ("downlink", "down")):
        spent = columns(record, way)
        for part in ("value", "position"):
            assert spent[part] == expected[f"{direction} {part}"], (way, part)
    assert expected["up value"] > 0 and expected["down value"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_refused_answer_counts_as_overhead(method: str) -> None:
    """All of it, although its sections were sound as far as they were read."""
    federation, twin = built(method), built(method)
    federation.play()
    twin.play()
    federation.nodes[1].tamper = _one_byte_more
    twin.nodes[1].tamper = lose
    watch = Watch(federation)
    record, silent = federation.play(), twin.play()
    assert record.failures == silent.failures == 1
    refused = sum(size(answer) for node, _, answer in watch.pairs() if node == 1)
    assert refused > 0
    mine, theirs = columns(record, "uplink"), columns(silent, "uplink")
    assert mine == {**theirs, "overhead": theirs["overhead"] + refused}
    assert record.uplink_bytes == silent.uplink_bytes + refused
    assert columns(record, "downlink") == columns(silent, "downlink")


def _one_byte_more(answer: FitRes) -> FitRes:
    return with_payload(answer, bytes(from_parameters(answer.parameters)) + b"\0")


@pytest.mark.parametrize("method", ["gwpf_paper", "stc"])
def test_an_answer_without_content_is_overhead(method: str) -> None:
    """Of a client that has lost its state; one that is lost costs nothing."""
    federation = built(method)
    federation.play(2)
    federation.nodes[0].forget()
    federation.nodes[1].tamper = lose
    counts = [len(node.sent) for node in federation.nodes]
    record = federation.play()
    assert (record.clients, record.failures) == (1, 2)
    answers = [
        n.sent[count:] for n, count in zip(federation.nodes, counts, strict=True)
    ]
    assert [len(some) for some in answers] == [1, 0, 1]
    lost, sound = answers[0][0], answers[2][0]
    assert payload_of(lost, federation).header.kind is Kind.LOST
    spent = columns(record, "uplink")
    assert spent["overhead"] == size(lost) + head(sound, federation)[1]
    assert sum(spent.values()) == size(lost) + size(sound)


def test_an_answer_that_skips_is_overhead() -> None:
    """CMFL's is a header."""
    options = {"threshold": 1.0}
    federation = small(SIZES, BRIEF, "cmfl", options)
    federation.play()
    watch = Watch(federation)
    record = federation.play()
    assert (record.clients, record.failures) == (0, 0)
    spent = columns(record, "uplink")
    assert spent == {
        "value": 0,
        "position": 0,
        "buffer": 0,
        "overhead": spent["overhead"],
    }
    assert spent["overhead"] == sum(size(answer) for _, _, answer in watch.pairs())


def test_unreachable_clients_were_sent_their_messages() -> None:
    """The server has spent those bytes, and on what is in them."""
    federation, twin = built("gwpf"), built("gwpf")
    federation.play(2)
    twin.play(2)
    federation.nodes[2].reachable = False
    record, whole = federation.play(), twin.play()
    assert columns(record, "downlink") == columns(whole, "downlink")
    assert columns(record, "uplink") != columns(whole, "uplink")


# ---- the books by themselves --------------------------------------------------------


def test_a_round_is_the_sum_of_its_messages() -> None:
    """Also over two exchanges; the next one begins afresh, but for what runs on."""
    books = Books(dense_bytes=40, dimension=10, network=None)
    books.open_round(asked=2)
    for client in (0, 1):
        books.sent(client, 100, Counter({Part.VALUES: 60, Part.BUFFERS: 8}))
    assert books.waiting_for == {0, 1}
    books.all_sent(0.0)
    books.received(50, Counter({Part.VALUES: 20, Part.POSITIONS: 25}))
    books.received(30, Counter())
    books.close_exchange(0.0)
    assert books.waiting_for == set()
    books.sent(0, 10, Counter({Part.POSITIONS: 3}))
    books.all_sent(0.0)
    books.close_exchange(0.0)
    books.tally.used = 1
    first = books.close_round(1, {"test_loss": 0.5})
    assert columns(first, "uplink") == dict(zip(PARTS, (20, 25, 0, 35), strict=True))
    down = dict(zip(PARTS, (120, 3, 16, 71), strict=True))
    assert columns(first, "downlink") == down
    assert (first.uplink_bytes, first.downlink_bytes) == (80, 210)
    assert first.uplink_bits_per_parameter == 8 * 80 / 20
    assert first.downlink_bits_per_parameter == 8 * 210 / 20
    assert (first.dense_bytes, first.clients, first.test_loss) == (160, 1, 0.5)
    assert first.modelled_seconds is None and first.train_loss is None
    assert first.slowest_client_seconds is first.median_client_seconds is None
    books.open_round(asked=1)
    books.sent(0, 7, Counter())
    second = books.close_round(2, {})
    assert columns(second, "uplink") == dict.fromkeys(PARTS, 0)
    assert columns(second, "downlink") == {**dict.fromkeys(PARTS, 0), "overhead": 7}
    assert (second.cumulative_uplink_bytes, second.cumulative_downlink_bytes) == (
        80,
        217,
    )
    assert second.dense_bytes == 240
    assert books.records == [first, second]


def test_a_resumed_run_goes_on_with_its_sums() -> None:
    """Flower's rounds begin with 1 again; ours go on."""
    books = Books(40, 10, Network(uplink_mbps=1, downlink_mbps=1))
    books.open_round(1)
    books.sent(0, 100, Counter())
    books.all_sent(1.0)
    first = books.close_round(1, {})
    resumed = Books(40, 10, Network(uplink_mbps=1, downlink_mbps=1))
    resumed.restore([replace(first, round=7)])
    assert [resumed.absolute(number) for number in (1, 2)] == [8, 9]
    resumed.open_round(1)
    resumed.sent(0, 11, Counter())
    resumed.all_sent(0.5)
    record = resumed.close_round(8, {})
    assert record.cumulative_downlink_bytes == 111
    assert record.modelled_seconds == 1.5
    assert record.seconds >= first.seconds


def test_a_round_has_a_slowest_and_a_median_client() -> None:
    """Of those that answered, over all exchanges of the round; waits are not theirs."""
    network = Network(8, 8, latency_ms=250, overhead_bytes=10**6, slowness=[1, 1, 3, 1])
    books = Books(40, 10, network)
    books.open_round(4)
    for client in range(4):
        books.sent(client, 10**6, Counter())
    books.all_sent(seconds=100.0)
    for client, compute in ((0, 1.0), (1, 4.0), (2, 2.0)):
        books.received(3 * 10**6, Counter())
        books.worked(client, 3 * 10**6, compute, waited=10.0)
    books.close_exchange(0.0)
    books.sent(0, 0, Counter())
    books.all_sent(0.0)
    books.worked(0, 0, 0.0, waited=10.0)
    books.close_exchange(0.0)
    record = books.close_round(1, {})
    # Two seconds down, four up, twice a quarter; then one down, one up and as much.
    assert record.slowest_client_seconds == pytest.approx(6.5 + 6)
    assert record.median_client_seconds == pytest.approx(6.5 + 4)
    assert record.modelled_seconds == pytest.approx(100 + 12.5 + 2.5)
    # Neither the transport's bytes nor a modelled slowness are in what was measured.
    assert (record.uplink_bytes, record.downlink_bytes) == (9 * 10**6, 4 * 10**6)
    assert record.compute_seconds == pytest.approx(7 / 3)
    books.open_round(1)
    books.sent(0, 0, Counter())
    books.all_sent(0.0)
    books.close_exchange(0.0)
    silent = books.close_round(2, {})
    assert silent.slowest_client_seconds is silent.median_client_seconds is None
    assert silent.modelled_seconds == record.modelled_seconds


def test_a_client_that_is_asked_twice_takes_both_times() -> None:
    """As the slowest in neither exchange it may be the slowest of the round."""
    books = Books(40, 10, Network(8, 8))
    books.open_round(3)
    for sizes in ((10, 8, 0), (0, 8, 10)):
        for client, size_of_it in enumerate(sizes):
            books.sent(client, size_of_it * 10**6, Counter())
        books.all_sent(0.0)
        for client in range(3):
            books.worked(client, 0, 0.0, waited=0.0)
        books.close_exchange(0.0)
    record = books.close_round(1, {})
    assert record.slowest_client_seconds == pytest.approx(16)
    assert record.median_client_seconds == pytest.approx(10)
    assert record.modelled_seconds == pytest.approx(20)


def test_a_round_that_nobody_takes_part_in_costs_nothing() -> None:
    """And has no bits a parameter, rather than a division by zero."""
    books = Books(40, 10, None)
    books.open_round(0)
    record = books.close_round(1, {})
    assert columns(record, "uplink") == columns(record, "downlink")
    assert columns(record, "uplink") == dict.fromkeys(PARTS, 0)
    assert record.uplink_bits_per_parameter is None
    assert record.downlink_bits_per_parameter is None
    assert record.dense_bytes == 0
