"""What clients can do to a run: nothing beyond their own failure."""

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, Node, payload_of, scripted, small
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Status,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gwpf_baseline.exchange.coding import MOST, WireError
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Writer,
    from_parameters,
    to_parameters,
)
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.state import InMemory
from gwpf_baseline.learning.training import Batches, TrainingConfig, evaluate
from gwpf_baseline.methods.shared.ternary import Ternary, write_ternary
from gwpf_baseline.utils import ConfigError, RunError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
# pylint: disable-next=wrong-import-position,import-error
import outlier  # noqa: E402
from outlier import attacking  # noqa: E402

BRIEF = TrainingConfig(local_steps=2, batch_size=10)
THREE = [30, 40, 50]


class Claiming(Node):
    """A node that says of itself what it likes, and counts how often it is asked.

    Attributes
    ----------
    claim : object
        What it says that its partition is; an event: it says so once that is set.
    asked : int
        How often it was asked.
    """

    claim: Any = None
    asked = 0

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Answer with the claim."""
        self.asked += 1
        claim = self.claim
        if isinstance(claim, threading.Event):
            claim.wait()
            claim = self.partition
        return GetPropertiesRes(Status(Code.OK, ""), {"partition-id": claim})


def claiming(federation: Federation, cid: str, claim: Any, partition: int) -> Claiming:
    """Return another node for a federation's partition."""
    node = Claiming(partition, federation.nodes[partition].build, cid)
    node.claim = claim
    return node


# ---- who they are -------------------------------------------------------------------


@pytest.mark.parametrize(
    "claim",
    [-1, 3, 10**6, 2**63 - 1, "1", "18446744073709551615", b"1", True, 1.0, 1.7, None],
)
def test_only_whole_numbers_below_the_number_of_clients_are_partitions(
    claim: Any, warnings: Callable[[], str]
) -> None:
    """Any other node is left out, and not asked again in every round."""
    federation, twin = (small(THREE, BRIEF) for _ in range(2))
    stranger = claiming(federation, "stranger", claim, 1)
    federation.server.client_manager().register(stranger)
    assert federation.play(8).clients == twin.play(8).clients == 3
    assert torch.equal(federation.strategy.weights, twin.strategy.weights)
    assert not stranger.received
    # In rounds 1, 2, 4, 8.
    assert stranger.asked == 4
    assert warnings().count("node stranger claims partition") == 4


def test_who_holds_a_partition_keeps_it_while_it_answers() -> None:
    """Also against a node whose id comes first; when it is silent, that one serves."""
    federation = small(THREE, BRIEF, "fedavg")
    holder = federation.nodes[1]
    federation.play()
    rival = claiming(federation, "a rival", 1, 1)
    federation.server.client_manager().register(rival)
    federation.play(2)
    assert (len(holder.received), len(rival.received)) == (3, 0)
    holder.reachable = False
    assert federation.play().failures == 1
    # The next round asks the rival, and goes on doing so while it answers.
    assert federation.play(2).clients == 3
    assert (len(holder.received), len(rival.received)) == (4, 2)
    rival.reachable, holder.reachable = False, True
    assert federation.play().failures == 1
    assert federation.play().clients == 3
    assert (len(holder.received), len(rival.received)) == (5, 3)


def test_the_live_one_of_two_nodes_serves_when_a_server_starts_again() -> None:
    """The dead one is still listed, but does not say what it serves."""
    federation = small(THREE, BRIEF)
    dead = claiming(federation, "dead", threading.Event(), 1)
    federation.server.client_manager().register(dead)
    assert federation.play(2).clients == 3
    assert not dead.received
    dead.claim.set()


def test_a_node_that_leaves_is_followed_by_who_waits() -> None:
    """At once, without a failed round."""
    federation = small(THREE, BRIEF, "fedavg")
    federation.play()
    rival = claiming(federation, "rival", 1, 1)
    manager = federation.server.client_manager()
    manager.register(rival)
    federation.play()
    manager.unregister(federation.nodes[1])
    record = federation.play()
    assert (record.clients, record.failures) == (3, 0)
    assert len(rival.received) == 1


def test_nobody_waits_for_a_node_that_does_not_say_who_it_is() -> None:
    """Rounds are played while it still thinks; once it has said so, it takes part."""
    federation = small(THREE, BRIEF)
    manager = federation.server.client_manager()
    federation.play()
    manager.unregister(federation.nodes[2])
    thinking = claiming(federation, "thinking", threading.Event(), 2)
    manager.register(thinking)
    assert [federation.play().clients for _ in range(3)] == [2, 2, 2]
    assert thinking.asked == 1
    thinking.claim.set()
    while federation.play().clients == 2:
        pass
    assert thinking.received


def test_a_hundred_that_do_not_say_who_they_are_keep_nobody_waiting() -> None:
    """Though they came first, and are asked first."""
    federation = small(THREE, BRIEF, connect_timeout=5)
    thinking = threading.Event()
    nodes = [claiming(federation, f"quiet {n}", thinking, 0) for n in range(100)]
    crowd = Federation(federation.strategy, [*nodes, *federation.nodes])
    try:
        assert crowd.play().clients == 3
        federation.strategy.roster.ask_to_save(1, "round-000001-00000000", "")
    finally:
        thinking.set()


def test_who_stumbles_before_the_first_round_is_asked_again() -> None:
    """After a second, within the time that there is to connect."""
    federation = small(THREE, BRIEF, connect_timeout=30)
    stumbling = claiming(federation, "stumbling", "", 1)
    others = [federation.nodes[0], federation.nodes[2]]
    timer = threading.Timer(0.5, setattr, (stumbling, "claim", 1))
    timer.start()
    assert Federation(federation.strategy, [*others, stumbling]).play().clients == 3
    assert stumbling.asked == 2


def test_a_run_that_cannot_begin_names_who_is_silent() -> None:
    """Whoever is online and says nothing is to be started again."""
    federation = small(THREE, BRIEF, connect_timeout=1)
    thinking = threading.Event()
    silent = claiming(federation, "sphinx", thinking, 1)
    others = [federation.nodes[0], federation.nodes[2]]
    try:
        with pytest.raises(
            ConfigError, match="2 .nodes: 3, without an answer.* sphinx"
        ):
            Federation(federation.strategy, [*others, silent]).play()
    finally:
        thinking.set()


def test_distinct_partitions_count_before_the_first_round() -> None:
    """Three nodes are not three clients."""
    federation = small(THREE, BRIEF, connect_timeout=0)
    nodes = [federation.nodes[0]]
    nodes += [claiming(federation, f"twin {n}", 0, 0) for n in range(2)]
    alone = Federation(federation.strategy, nodes)
    with pytest.raises(ConfigError, match=r"num_clients=3: .* 1 \(nodes: 3\)"):
        alone.play()


def test_who_goes_on_failing_is_asked_ever_less_often() -> None:
    """And every round again once it answers."""
    federation = small(THREE, BRIEF)
    node = federation.nodes[1]
    node.reachable = False
    asked = []
    for number in range(1, 41):
        before = len(node.received)
        federation.play()
        if len(node.received) > before:
            asked.append(number)
    assert asked == [1, 2, 3, 5, 9, 17, 33]
    node.reachable = True
    clients = [federation.play().clients for _ in range(100)]
    assert clients[-10:] == [3] * 10


def test_resting_clients_are_asked_if_there_is_nobody_else() -> None:
    """An outage of all must not outlast itself."""
    federation = small(THREE, BRIEF, max_empty_rounds=100)
    federation.play()
    for node in federation.nodes:
        node.reachable = False
    federation.play(20)
    for node in federation.nodes:
        node.reachable = True
    assert federation.play().clients == 3


def test_a_run_without_answers_ends_with_an_error() -> None:
    """After as many empty rounds in a row as configured; one answer starts anew."""
    federation = small(THREE, BRIEF, max_empty_rounds=3)
    for reachable in (True, False, False, True, False, False):
        for node in federation.nodes:
            node.reachable = reachable
        federation.play()
    with pytest.raises(RunError, match="in the last 3 rounds"):
        federation.play()
    assert len(federation.strategy.records) == 7


# ---- what they say ------------------------------------------------------------------


def test_words_of_clients_stay_in_their_line(warnings: Callable[[], str]) -> None:
    """No line end, no escape sequence, not a megabyte."""
    words = "first\n12:00 INFO all is well\r\x1b[31m\u202ered" + "\n" * 10**6
    federation = small(THREE, BRIEF)
    federation.play()

    def shout(answer: FitRes) -> FitRes:
        raise ConnectionError(words)

    federation.nodes[1].tamper = shout
    federation.nodes[2].tamper = lambda answer: replace(
        answer, status=Status(Code.FIT_NOT_IMPLEMENTED, words)
    )
    stranger = claiming(federation, "stranger", words, 1)
    federation.server.client_manager().register(stranger)
    assert federation.play().failures == 2
    lines = warnings().split("\n")
    assert len(lines) == 3
    for line in lines:
        assert line.isprintable() and len(line) < 600
        assert r"first\n12:00 INFO all is well\r\x1b[31m\u202ered" in line or (
            r"first\\n12:00" in line
        )


@pytest.mark.parametrize(
    "value", [None, "1", [1.0], b"\x1b", float("nan"), 10**400, -1e200, 1.7e308]
)
def test_metrics_of_any_type_harm_nobody(value: Any) -> None:
    """They are not in the record, and the upload is used."""
    federation = small(THREE, BRIEF)
    metrics = {"train_loss": value, "compute_seconds": value, "more": value}
    federation.nodes[1].tamper = partial(replace, metrics=metrics)
    record = federation.play()
    assert (record.clients, record.failures) == (3, 0)
    assert record.train_loss is not None and 0 < record.train_loss < 10


def test_who_says_that_it_is_lost_in_every_round_gets_the_model_ever_less_often() -> (
    None
):
    """And all who are lost share one message."""
    federation = small(THREE, BRIEF, "gradient_pruning", {"keep": 0.05})
    federation.play(5)

    def deny(answer: FitRes) -> FitRes:
        header = payload_of(answer.parameters, federation).header
        lost = replace(header, kind=Kind.LOST, base=-1, checksum=0)
        return replace(answer, parameters=to_parameters(lost.pack()))

    for node in federation.nodes[1:]:
        node.tamper = deny
    federation.play(60)
    models = [
        [
            message
            for message in node.received
            if payload_of(message, federation).header.kind is Kind.MODEL
        ]
        for node in federation.nodes
    ]
    assert [len(each) for each in models] == [0, 3, 3]
    for one, other in zip(models[1], models[2], strict=True):
        assert one.tensors[0] is other.tensors[0]


def test_what_was_used_is_not_sent_again_by_who_was_lost() -> None:
    """The client settles before it says that it is lost: the server then forgets."""
    steps = np.full((1, 24), 0.5, np.float32)
    federation = scripted("gaia", lambda c, e: steps * (e == 1), num_clients=3)
    federation.play()
    node = federation.nodes[1]
    state = node.state
    del state.arrays["weights"]
    node.store.save(state)
    assert federation.play(3).failures == 0
    # Everybody's step of a half arrived once: the mean of the three.
    assert torch.allclose(federation.strategy.weights, torch.full((24,), 1.5))


# ---- how far they can move the model ------------------------------------------------


class Attacker(Node):
    """A node whose client sends something else than it has learned."""

    attack: dict[str, float]

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client answer, but not what it would."""
        with attacking(self.attack):
            return super().fit(ins, timeout, group_id)


ATTACKS = {**outlier.ATTACKS, "1e10": {"value": 1e10}}


def ten(method: str, attack: str | None, **options: Any) -> Federation:
    """Build a federation of ten, one of which attacks."""
    training = TrainingConfig(local_steps=5, batch_size=20, lr=0.2)
    federation = small(
        [150] * 10, training, method, METHOD_OPTIONS.get(method), **options
    )
    if attack is not None:
        honest = federation.nodes[4]
        attacker = Attacker(4, honest.build)
        attacker.attack = ATTACKS[attack]
        manager = federation.server.client_manager()
        manager.unregister(honest)
        manager.register(attacker)
        federation.nodes[4] = attacker
    return federation


# What makes a method learn the small network within 20 rounds.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "gwpf": {"vote_fraction": 0.2, "thaw_budget": 0.2},
    "stc": {"up": 0.2, "down": 0.2},
    "cmfl": {"threshold": 0.5},
    "zerofl": {"sparsity": 0.5, "mask_ratio": 0.3},
}


def accuracy(federation: Federation) -> float:
    """Return the test accuracy of a federation's model."""
    strategy = federation.strategy
    data = federation.nodes[0].build(federation.nodes[0].store).batches.data
    model = FlatModel(strategy.model)
    model.load(strategy.measured_weights(), strategy.buffers)
    return evaluate(model, data)[1]


METHODS = ["fedavg", "gwpf", "apf", "gaia", "cmfl", "gradient_pruning", "zerofl", "stc"]


@pytest.mark.parametrize("method", METHODS)
def test_one_of_ten_cannot_keep_the_others_from_learning(method: str) -> None:
    """Whatever finite values it sends for 20 rounds."""
    honest = ten(method, None)
    assert honest.play(20).failures == 0
    reached = accuracy(honest)
    assert reached > 0.6
    for attack in ATTACKS:
        federation = ten(method, attack)
        federation.play(20)
        assert accuracy(federation) > reached - 0.05, attack


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_moments_of_the_server_stay_finite(optimizer: str) -> None:
    """Whatever finite values are sent."""
    for attack in ATTACKS:
        config = ServerOptimizerConfig(optimizer, lr=0.03, beta1=0.9)
        federation = ten("fedavg", attack, server_optimizer=config)
        federation.play(5)
        for name, moment in federation.strategy.optimizer.state().items():
            assert np.isfinite(moment).all(), (attack, name)
        assert torch.isfinite(federation.strategy.weights).all()


@settings(max_examples=25)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=4,
        max_size=4,
    )
)
def test_the_model_stays_finite_whatever_all_clients_send(values: list[float]) -> None:
    """Even with no bound and no honest client at all."""
    federation = scripted(
        "fedavg",
        lambda client, _: np.full((1, 24), values[client], np.float32),
        norm_bound=None,
        max_empty_rounds=100,
    )
    federation.play(5)
    assert torch.isfinite(federation.strategy.weights).all()


def test_an_update_beyond_the_bound_is_left_out(warnings: Callable[[], str]) -> None:
    """The others' are used as if it had not come, and it is not settled."""
    lengths = [1.0, 2.0, 3.0, 500.0]
    steps = [np.eye(24, dtype=np.float32)[[c]] * lengths[c] for c in range(4)]
    federation = scripted("gaia", lambda c, _: steps[c], norm_bound=20.0)
    record = federation.play()
    assert (record.clients, record.failures) == (3, 1)
    moved = federation.strategy.weights.numpy() - 1
    np.testing.assert_allclose(moved[:4], np.array([1, 2, 3, 0]) / 3, rtol=1e-6)
    assert not moved[4:].any()
    assert federation.strategy.clients[3].used == 0
    assert warnings().startswith(
        "client 3 left out of exchange 1: an update of norm 500, buffers 0 away: "
        "at most 40 and"
    )


def test_a_bad_day_is_forgotten_once_it_was_left_out() -> None:
    """What was far too long would else be part of all that this client ever sends."""
    federation = scripted(
        "gwpf",
        lambda c, e: np.full((1, 24), 1e3 if (c, e) == (3, 4) else 1.0, np.float32),
        {"half_life": 1e6},
    )
    sound = [federation.play().clients for _ in range(8)]
    assert sound == [4, 4, 4, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("taking_part", [1, 2])
@pytest.mark.parametrize("value", [1e-20, 1e-8, 1e3])
def test_the_first_of_few_sets_no_scale_that_shuts_out_the_others(
    taking_part: int, value: float
) -> None:
    """Where too few take part for a median, that of the last rounds soon is theirs."""
    federation = scripted(
        "fedavg",
        lambda _, e: np.full((1, 24), value if e == 1 else 1.0, np.float32),
        num_clients=10,
        fraction_fit=taking_part / 10,
        max_empty_rounds=5,
    )
    sound = [federation.play().clients for _ in range(10)]
    assert sum(sound) >= 9 * taking_part
    assert sound[2:] == [taking_part] * 8


def test_what_got_lost_on_its_way_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server has not seen it, so the client sends it with what comes next."""
    federation = scripted("gaia", lambda c, e: np.ones((1, 24), np.float32))
    federation.play(2)
    node = federation.nodes[3]
    fit = node.fit

    def drop(*arguments: Any, **named: Any) -> FitRes:
        fit(*arguments, **named)
        raise ConnectionError("the cable")

    monkeypatch.setattr(node, "fit", drop)
    assert federation.play().clients == 3
    monkeypatch.setattr(node, "fit", fit)
    before = federation.strategy.weights.clone()
    federation.play()
    moved = federation.strategy.weights - before
    np.testing.assert_allclose(moved, np.full(24, (1 + 1 + 1 + 2) / 4), rtol=1e-6)


def test_counters_that_are_told_too_large_shut_nobody_out() -> None:
    """Who goes on counting from a mean at the limit stays within it."""
    training = TrainingConfig(local_steps=150, batch_size=2)
    federation = small(THREE, training, "fedavg")

    def spoil(answer: FitRes) -> FitRes:
        payload = bytearray(from_parameters(answer.parameters))
        np.frombuffer(payload, "<f4", 11, len(payload) - 44)[10] = 2.0**31
        return replace(answer, parameters=to_parameters(bytes(payload)))

    for node in federation.nodes:
        node.tamper = spoil
    assert federation.play().clients == 3
    for node in federation.nodes:
        node.tamper = None
    assert [federation.play().failures for _ in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        ("gradient_pruning", {"keep": 0.05}, 24),
        ("zerofl", {"upload": "top_k_diff", "sparsity": 0.9, "mask_ratio": 0.0}, 99),
    ],
)
def test_nobody_names_more_values_than_a_clients_share(
    method: str, options: dict[str, Any], most: int
) -> None:
    """Though an update of zeros is not long, all would be sent what it names."""
    federation = small(THREE, BRIEF, method, options)
    strategy = federation.strategy

    def spoil(answer: FitRes) -> FitRes:
        writer = Writer(payload_of(answer.parameters, federation).header)
        writer.bitmap(np.ones(strategy.dimension, np.bool_))
        writer.vector(np.zeros(strategy.dimension, np.float32))
        writer.vector(strategy.buffers.numpy(), part=Part.BUFFERS)
        return replace(answer, parameters=to_parameters(writer.payload()))

    federation.nodes[1].tamper = spoil
    record = federation.play()
    assert (record.clients, record.failures) == (2, 1)
    changed = np.count_nonzero(strategy.changed_since(0))
    assert 0 < changed <= 2 * most < strategy.dimension


@pytest.mark.parametrize("method", ["fedavg", "gaia", "gwpf", "gwpf_paper", "fedpm"])
def test_only_those_skip_whose_method_does(method: str) -> None:
    """A run in which nobody sends anything would go on for ever."""
    federation = small(THREE, BRIEF, method, METHOD_OPTIONS.get(method))

    def skip(answer: FitRes) -> FitRes:
        writer = Writer(payload_of(answer.parameters, federation).header)
        writer.skip()
        return replace(answer, parameters=to_parameters(writer.payload()))

    federation.nodes[1].tamper = skip
    record = federation.play()
    assert (record.clients, record.failures) == (2, 1)


def test_who_never_saves_its_state_is_not_waited_for_in_every_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is one of those that fail, and rest."""
    federation = small(THREE, BRIEF)
    federation.play()
    node = federation.nodes[1]

    def silent(*_: Any) -> GetPropertiesRes:
        raise TimeoutError

    monkeypatch.setattr(node, "get_properties", silent)
    roster = federation.strategy.roster
    for number in range(1, 4):
        roster.ask_to_save(number, f"round-{number:06d}-00000000", "")
    assert roster.state() == {"1": [3, 5]}


def test_within_the_bound_and_without_one_nothing_is_cut() -> None:
    """The same bits, with a bound that nobody meets and with none."""
    models = []
    for bound, longest in ((20.0, 39.0), (None, 39.0), (None, 500.0)):
        lengths = [1.0, 2.0, 3.0, longest]
        steps = [np.eye(24, dtype=np.float32)[[c]] * lengths[c] for c in range(4)]
        federation = scripted(
            "fedavg", lambda c, _, s=steps: s[c], norm_bound=bound  # type: ignore
        )
        federation.play()
        models.append(federation.strategy.weights.numpy().copy())
    np.testing.assert_array_equal(models[0], models[1])
    assert models[2][3] == 126


def test_where_few_take_part_the_norms_before_count() -> None:
    """A client that is alone in a round is no measure of itself."""
    federation = scripted(
        "fedavg",
        lambda c, e: np.full((1, 24), 1e6 if e == 5 else 1.0, np.float32),
        fraction_fit=0.25,
    )
    federation.play(4)
    before = federation.strategy.weights.numpy().copy()
    federation.play()
    np.testing.assert_array_equal(federation.strategy.weights, before)
    assert federation.play().clients == 1


def test_buffers_are_bounded_as_well() -> None:
    """A variance below 0 is refused, and so are means and counters far out.

    That counters move by as many iterations as there are allows nobody's means more.
    """
    for place, value, failures, steps in (
        (5, -1e30, 1, 2),
        (5, -1e-6, 1, 2),
        (0, 1e20, 1, 2),
        (0, 1e6, 1, 2),
        (10, 3e9, 1, 2),
        (0, 300.0, 1, 50),
    ):
        training = replace(BRIEF, local_steps=steps)
        federation, twin = (small([50] * 5, training, "fedavg") for _ in range(2))

        def spoil(answer: FitRes, place: int = place, value: float = value) -> FitRes:
            payload = bytearray(from_parameters(answer.parameters))
            buffers = np.frombuffer(payload, "<f4", 11, len(payload) - 44)
            buffers[place] = value
            return replace(answer, parameters=to_parameters(bytes(payload)))

        federation.nodes[1].tamper = spoil
        record = federation.play()
        twin.play()
        assert record.failures == failures
        distance = federation.strategy.buffers - twin.strategy.buffers
        assert distance.abs().max() < 0.5
        assert (federation.strategy.buffers[5:10] >= 0).all()


def test_follow_ups_are_no_measure_of_whole_updates() -> None:
    """Theirs can be a thousandth as long; nobody honest is left out for that."""
    training = TrainingConfig(local_steps=20, batch_size=20, lr=0.2)
    options = {"thaw_threshold": 1.0}
    federation = small([150] * 2, training, "gwpf_paper", options)
    failures = [federation.play().failures for _ in range(30)]
    assert failures == [0] * 30
    assert federation.strategy.exchange > 30


def _crowd(federation: Federation, votes: int, answer: FitRes) -> FitRes:
    """Answer with so many votes, each of them small."""
    strategy: Any = federation.strategy
    writer = Writer(payload_of(answer.parameters, federation).header)
    places = np.arange(votes)
    update = Ternary(places, places % 2 == 0, np.float32(1e-3))
    write_ternary(writer, update, 395, strategy.activity)
    writer.vector(strategy.buffers.numpy(), part=Part.BUFFERS)
    return replace(answer, parameters=to_parameters(writer.payload()))


@pytest.mark.parametrize(
    ("method", "options"), [("gwpf", {"vote_fraction": 0.04}), ("stc", {"up": 0.04})]
)
def test_nobody_votes_for_more_than_its_share(
    method: str, options: dict[str, float]
) -> None:
    """However short the update is; of 395 coordinates 4 % are sixteen."""
    for votes, failures in ((16, 0), (17, 1), (395, 1)):
        federation = small([50] * 4, BRIEF, method, options)
        federation.nodes[2].tamper = partial(_crowd, federation, votes)
        record = federation.play()
        assert (record.failures, record.clients) == (failures, 4 - failures)


def test_weights_that_are_not_sent_are_measured_too() -> None:
    """ZeroFL takes them for 0: who sends none would pull all of them there."""
    training = TrainingConfig(local_steps=1, batch_size=10, lr=1e-3)
    options = {"sparsity": 0.5, "mask_ratio": 0.5}
    federation = small([50] * 4, training, "zerofl", options)
    before = federation.strategy.weights.clone()

    def keep(answer: FitRes) -> FitRes:
        writer = Writer(payload_of(answer.parameters, federation).header)
        writer.bitmap(np.zeros(395, np.bool_))
        writer.vector(federation.strategy.buffers.numpy(), part=Part.BUFFERS)
        return replace(answer, parameters=to_parameters(writer.payload()))

    federation.nodes[2].tamper = keep
    record = federation.play()
    assert (record.failures, record.clients) == (1, 3)
    assert (federation.strategy.weights - before).norm() < 0.1 * before.norm()


# ---- a client's own bad day ---------------------------------------------------------


class Feverish(Batches):
    """A client's data, which is NaN, or far too large, in one round."""

    ill_at = -1
    fever = 1.0

    def draw(
        self, cursor: int, *args: Any
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what it should, or that times the fever."""
        for x, y in super().draw(cursor, *args):
            yield (x * self.fever if cursor == self.ill_at else x), y


# With the second one weights stay finite, as Adam takes no step where the mean of a
# gradient's squares is infinite.
@pytest.mark.parametrize("fever", [float("nan"), 1e25])
@pytest.mark.parametrize("method", [*METHODS, "fedpm"])
def test_a_round_that_did_not_stay_finite_is_dropped(
    method: str, fever: float, warnings: Callable[[], str]
) -> None:
    """One round of one client, said so; the next ones are sound."""
    options = METHOD_OPTIONS.get(method)
    training = replace(BRIEF, persist_optimizer=True, optimizer="adam", lr=0.01)
    federation = small(THREE, training, method, options)
    build = federation.nodes[1].build

    def feverish(store: InMemory) -> SyncClient:
        client = build(store)
        old = client.batches
        client.batches = Feverish(old.data, old.indices, old.seed, old.client)
        client.batches.ill_at = 2 * BRIEF.local_steps * BRIEF.batch_size
        client.batches.fever = fever
        return client

    federation.nodes[1].build = feverish
    failures = [federation.play().failures for _ in range(6)]
    assert failures == [0, 0, 1, 0, 0, 0]
    assert "client 1 left out of exchange 3: its training did not stay" in warnings()
    state = federation.nodes[1].state
    assert state.cursor == 6 * BRIEF.local_steps * BRIEF.batch_size
    for name, array in state.arrays.items():
        assert np.isfinite(array).all(), name


def test_a_residual_beyond_all_floats_is_forgotten() -> None:
    """Such a client fails once, not for ever."""
    federation = small(THREE, BRIEF, "gradient_pruning", {"keep": 0.05})
    federation.play()
    node = federation.nodes[1]
    state = node.state
    state.own("residual")[:] = np.inf
    node.store.save(state)
    assert [federation.play().failures for _ in range(3)] == [1, 0, 0]
    assert np.isfinite(node.state.arrays["residual"]).all()


@pytest.mark.parametrize("method", ["gaia", "cmfl", "gwpf", "apf", "stc", "fedpm"])
@pytest.mark.parametrize("exchange", [0, 1, 2, MOST - 1, MOST])
def test_clients_take_any_number_of_an_exchange(method: str, exchange: int) -> None:
    """They answer it, or say in a line what is wrong with it."""
    federation = small(THREE, BRIEF, method)
    federation.play()
    node = federation.nodes[1]
    header = payload_of(node.received[0], federation).header
    for base in (-1, 0, exchange - 1, exchange):
        for kind in (Kind.MODEL, Kind.CHANGES, Kind.VALUES):
            odd = replace(header, exchange=exchange, base=base, used=0, kind=kind)
            try:
                message = odd.pack()
            except AssertionError:
                continue
            client = node.build(node.store)
            body = bytes(from_parameters(node.received[0]))
            _, start = Header.unpack(body, header.method, header.length)
            payload = np.frombuffer(message + body[start:], np.uint8)
            try:
                answer, _, _ = client.fit([payload], {"round": 1})
            except WireError:
                continue
            Reader(answer[0].tobytes(), header.method, header.length)
