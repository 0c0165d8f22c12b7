"""Tests of GWPF as published, against slow and obvious references."""

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import torch
from federation import (
    Federation,
    Node,
    Script,
    Scripted,
    digits,
    lose,
    payload_of,
    with_tensors,
)
from flwr.common import FitRes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from gwpf_baseline.learning.flat_model import FlatModel, parameters_to_vector
from gwpf_baseline.learning.state import StateStore
from gwpf_baseline.learning.training import Batches, TrainingConfig
from gwpf_baseline.methods.gwpf_paper import (
    GWPFPaperClient,
    GWPFPaperConfig,
    GWPFPaperStrategy,
    GWPFPaperUpload,
    consistency_votes,
    thaw_by_quorum,
)
from gwpf_baseline.methods.shared.stability import TIGHTEN_SHARE
from gwpf_baseline.utils import ConfigError

# ---- the pure functions -------------------------------------------------------------

# Few different values, so that ties and zeros are the rule.
COARSE = hnp.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.sampled_from([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -3.0]),
)
COUNTS = hnp.arrays(np.uint16, st.integers(0, 60), elements=st.integers(0, 5))
COARSE_VALUE = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])


@given(COARSE, st.data(), st.sampled_from([0.25, 0.5, 1.0]))
def test_consistency_votes_for_steps_that_agree(
    net: np.ndarray, data: st.DataObject, threshold: float
) -> None:
    """At the threshold too; what did not move never votes."""
    detour = data.draw(hnp.arrays(np.float32, net.shape, elements=COARSE_VALUE))
    path = np.abs(net) + detour
    expected = [
        p > 0 and abs(n) / p >= threshold for n, p in zip(net, path, strict=True)
    ]
    assert consistency_votes(net, path, threshold).tolist() == expected


@given(COUNTS, st.integers(0, 200), st.integers(0, 100))
def test_quorum_thaws_what_a_share_of_the_clients_wants(
    counts: np.ndarray, clients: int, percent: int
) -> None:
    """Exactly the share suffices; 0 means any one, never none."""
    expected = [
        count >= 1 and 100 * int(count) >= percent * clients for count in counts
    ]
    assert thaw_by_quorum(counts, clients, percent / 100).tolist() == expected


# ---- a federation whose clients learn what the test says ----------------------------


class ScriptedClient(Scripted, GWPFPaperClient):
    """A client of GWPF that takes given steps instead of training."""


class Ledger(GWPFPaperStrategy):
    """A strategy that adds up what all used updates have done.

    Attributes
    ----------
    applied : torch.Tensor
        float64 ``(d,)``, each exchange's change of the model times its clients.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.applied = torch.zeros(self.dimension, dtype=torch.float64)

    def finish_exchange(self, total_weight: float) -> np.ndarray:
        """Keep account of the change."""
        before = self.weights.double()
        changed = super().finish_exchange(total_weight)
        self.applied += (self.weights.double() - before) * total_weight
        return changed


class ScriptedFederation(Federation):
    """Scripted clients under GWPF.

    Parameters
    ----------
    script : callable
        From client and exchange to the steps.
    config : GWPFPaperConfig
        The hyper-parameters.
    dimension : int, default 24
        Number of parameters.
    num_clients : int, default 4
        Number of clients.
    **strategy : object
        More arguments of the strategy.

    Attributes
    ----------
    starts : list of list of numpy.ndarray
        For each client, where its rounds started from.
    """

    def __init__(
        self,
        script: Script,
        config: GWPFPaperConfig,
        dimension: int = 24,
        num_clients: int = 4,
        **strategy: Any,
    ) -> None:
        model = nn.Linear(dimension - 1, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        self.starts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        flat, initial = FlatModel(nn.Linear(1, 1)), parameters_to_vector(model)
        data = digits()

        def build(client: int, store: StateStore) -> GWPFPaperClient:
            batches = Batches(data, np.arange(1), 0, client)
            built = ScriptedClient(
                store, flat, initial, batches, TrainingConfig(), config=config
            )
            built.script, built.starts = script, self.starts[client]
            return built

        super().__init__(
            Ledger(model, config=config, num_clients=num_clients, **strategy),
            [Node(i, partial(build, i)) for i in range(num_clients)],
        )

    def pending(self, client: int) -> np.ndarray:
        """Return what a client has learned and the server has not used."""
        state = self.nodes[client].state
        if "residual" not in state.arrays:
            return np.zeros(self.strategy.dimension, np.float32)
        residual = state.arrays["residual"].copy()
        if self.strategy.clients[client].used == state.uploaded:
            residual[self.nodes[client].uploaded()] = 0
        return residual


def lively(client: int, exchange: int, dimension: int = 24) -> np.ndarray:
    """Return three steps of which every fourth coordinate behaves alike.

    They stand still, drift, tremble, or rest and then jump. All values and their means
    over two or four clients are exact in float32, however often they are added.
    """
    rng = np.random.default_rng([7, client, exchange])
    steps = rng.integers(-3, 4, (3, dimension)).astype(np.float32)
    kind = np.arange(dimension) % 4
    steps[:, kind == 0] = 0
    steps[:, kind == 1] += 2 * np.sign(np.sin(exchange / 9 + client / 4))
    steps[:, kind == 3] *= 4 * (exchange % 16 < 3)
    return steps / 64


# ---- the whole algorithm, one coordinate at a time ----------------------------------


class Reference:
    """GWPF as the design describes it, in loops over clients and coordinates.

    Parameters
    ----------
    config : GWPFPaperConfig
        The hyper-parameters.
    dimension, clients : int
        Number of parameters and of clients.
    """

    def __init__(self, config: GWPFPaperConfig, dimension: int, clients: int) -> None:
        self.config = config
        self.coordinates = range(dimension)
        self.exchange = 0
        self.weights = [0.0] * dimension
        self.ema = [0.0] * dimension
        self.ema_abs = [0.0] * dimension
        self.active = [True] * dimension
        self.residual = [[0.0] * dimension for _ in range(clients)]
        self.threshold = config.freeze_threshold
        self.was_above = False

    def start(self, client: int) -> list[float]:
        """Return where a client starts its local iterations from."""
        drift = self.config.frozen_update == "drift"
        return [
            self.weights[j]
            + (self.residual[client][j] if drift and not self.active[j] else 0.0)
            for j in self.coordinates
        ]

    def play(self, clients: list[int], script: Script) -> dict[int, list[bool]]:
        """Play one round and return the clients' votes on frozen coordinates."""
        self.exchange += 1
        frozen = [j for j in self.coordinates if not self.active[j]]
        votes = {}
        for i in clients:
            steps = script(i, self.exchange).astype(float).tolist()
            moved = [[step[j] for step in steps] for j in self.coordinates]
            for j in self.coordinates:
                self.residual[i][j] += sum(moved[j])
            votes[i] = [self._votes(moved[j]) for j in frozen]
        synchronised = [j for j in self.coordinates if self.active[j]]
        for j in synchronised:
            self.active[j] = self._synchronise(j, clients)
        counts = [sum(votes[i][m] for i in clients) for m in range(len(frozen))]
        thawed = [frozen[m] for m in self._elect(counts, len(clients))]
        if self.config.thaw_exchange == "next_round":
            for j in thawed:
                self.active[j] = True
        elif thawed:
            self.exchange += 1
            for j in thawed:
                self.active[j] = self._synchronise(j, clients)
        if self.config.tighten:
            self._tighten()
        return votes

    def _votes(self, moved: list[float]) -> bool:
        path = sum(abs(step) for step in moved)
        return path > 0 and abs(sum(moved)) / path >= self.config.thaw_threshold

    def _synchronise(self, j: int, clients: list[int]) -> bool:
        """Apply the mean update and return whether the coordinate stays active."""
        update = sum(self.residual[i][j] for i in clients) / len(clients)
        for i in clients:
            self.residual[i][j] = 0.0
        self.weights[j] += update
        alpha = self.config.ema
        self.ema[j] = alpha * self.ema[j] + (1 - alpha) * update
        self.ema_abs[j] = alpha * self.ema_abs[j] + (1 - alpha) * abs(update)
        if self.ema_abs[j] == 0:
            return False
        return abs(self.ema[j]) / self.ema_abs[j] >= self.threshold

    def _elect(self, counts: list[int], clients: int) -> list[int]:
        least = max(self.config.thaw_quorum * clients, 1)
        return [m for m, count in enumerate(counts) if count >= least]

    def _tighten(self) -> None:
        above = 1 - sum(self.active) / len(self.active) > TIGHTEN_SHARE
        if above and not self.was_above:
            self.threshold = max(self.threshold / 2, self.config.threshold_floor)
        self.was_above = above


def _votes_sent(
    federation: Federation, client: int, number: int, frozen: int
) -> list[bool]:
    answer = federation.nodes[client].sent[number]
    return payload_of(answer, federation).bitmap(frozen).tolist()


@pytest.mark.parametrize("thaw_exchange", ["next_round", "same_round"])
@pytest.mark.parametrize("frozen_update", ["residual", "drift"])
def test_every_round_is_what_the_definition_says(
    frozen_update: str, thaw_exchange: str
) -> None:
    """Starts, votes, weights, residuals, averages and masks, for all combinations.

    Two of four clients take part in a round, so residuals also wait for rounds.
    """
    config = GWPFPaperConfig(
        ema=0.75,
        # Only the server tightens, only clients drift: one test serves both.
        tighten=frozen_update == "drift",
        threshold_floor=0.05,
        frozen_update=frozen_update,
        thaw_quorum=0.5,
        thaw_exchange=thaw_exchange,
    )
    federation = ScriptedFederation(lively, config, fraction_fit=0.5, seed=3)
    server = federation.strategy
    reference = Reference(config, dimension=24, clients=4)
    masks = set()
    for number in range(100):
        answers = [len(node.sent) for node in federation.nodes]
        frozen = 24 - sum(reference.active)
        starts = [reference.start(i) for i in range(4)]
        record = federation.play()
        clients = [
            i for i, n in enumerate(federation.nodes) if len(n.sent) > answers[i]
        ]
        assert (record.clients, record.failures) == (2, 0) and len(clients) == 2
        votes = reference.play(clients, lively)
        for i in clients:
            assert_array_equal(federation.starts[i][-1], starts[i])
            sent = _votes_sent(federation, i, answers[i], frozen)
            assert sent == votes[i], (number, i)
            assert_array_equal(federation.pending(i), reference.residual[i])
        assert server.exchange == reference.exchange
        assert_array_equal(server.weights, reference.weights)
        assert_array_equal(server.mask, reference.active)
        assert server.stability.threshold == reference.threshold
        averages = server.stability
        assert_allclose(averages.ema, reference.ema, rtol=1e-5, atol=1e-7)
        assert_allclose(averages.ema_abs, reference.ema_abs, rtol=1e-5, atol=1e-7)
        masks.add(tuple(reference.active))
    assert any(reference.weights)
    assert len(masks) > 5


def test_coordinates_do_not_know_how_many_they_are() -> None:
    """A model too large for one block behaves like many small ones side by side."""
    config = GWPFPaperConfig(
        ema=0.75,
        tighten=False,
        frozen_update="residual",
        thaw_quorum=0.5,
        thaw_exchange="next_round",
    )
    times = 4000

    def tiled(client: int, exchange: int) -> np.ndarray:
        return np.tile(lively(client, exchange), times)

    few = ScriptedFederation(lively, config)
    many = ScriptedFederation(tiled, config, dimension=24 * times)
    shares = set()
    for _ in range(15):
        shares.add(few.play().frozen_fraction)
        many.play()
        for name in ("weights", "mask", "stability.ema", "stability.ema_abs"):
            one, several = (
                np.asarray(attrgetter(name)(federation.strategy))
                for federation in (few, many)
            )
            assert_array_equal(several, np.tile(one, times))
    assert len(shares) > 5


# ---- what must hold whatever happens ------------------------------------------------


def _refused(answer: FitRes) -> FitRes:
    return with_tensors(answer, [t[:-1] for t in answer.parameters.tensors])


@pytest.mark.parametrize("frozen_update", ["residual", "drift"])
@pytest.mark.parametrize("thaw_exchange", ["next_round", "same_round"])
def test_nothing_that_is_learned_gets_lost(
    thaw_exchange: str, frozen_update: str
) -> None:
    """All deltas are either in the model or pending at the client that learned them.

    For every coordinate after every round, although messages do not arrive, answers get
    lost or are refused, and not every client is asked.
    """
    learned = np.zeros(24)

    def script(client: int, exchange: int) -> np.ndarray:
        nonlocal learned
        steps = lively(client, exchange)
        learned += steps.sum(0)
        return steps

    config = GWPFPaperConfig(
        ema=0.75,
        tighten=False,
        frozen_update=frozen_update,
        thaw_quorum=0.5,
        thaw_exchange=thaw_exchange,
    )
    federation = ScriptedFederation(script, config, num_clients=5, fraction_fit=0.8)
    server, rng = federation.strategy, np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        for node in federation.nodes:
            luck = rng.choice(["good", "deaf", "lost", "refused", "later"])
            node.reachable = luck != "deaf"
            node.tamper = {"lost": lose, "refused": _refused}.get(luck)
            if (
                luck == "later"
            ):  # the first answer arrives, that to a follow-up does not
                node.tamper = _once(node)
        record = federation.play()
        outcomes.add((record.clients, record.failures))
        pending = sum(federation.pending(i).astype(float) for i in range(5))
        assert_allclose(server.applied.numpy() + pending, learned, rtol=0, atol=1e-4)
    # Rounds of all kinds, and in the end most of it is in the model.
    assert {clients for clients, _ in outcomes} >= {0, 1, 2, 3}
    assert np.abs(server.applied.numpy()).sum() > 0.5 * np.abs(learned).sum()


def _once(node: Node) -> Callable[[FitRes], FitRes]:
    def tamper(answer: FitRes) -> FitRes:
        node.tamper = lose
        return answer

    return tamper


def test_what_was_thawed_stays_active_though_nobody_could_send_it() -> None:
    """As where all answers to a follow-up get lost."""
    config = GWPFPaperConfig(ema=0.75, tighten=False, thaw_quorum=0.5)
    federation = ScriptedFederation(lively, config)
    server, follow_ups = federation.strategy, 0
    for _ in range(40):
        for node in federation.nodes:
            node.tamper = _once(node)
        before = server.exchange
        federation.play()
        if server.exchange == before + 2:
            follow_ups += 1
            assert server.thawed.any() and server.mask[server.thawed].all()
    assert follow_ups > 3


@pytest.mark.parametrize("clients", [255, 256, 65_536])
def test_votes_of_all_clients_are_counted(clients: int) -> None:
    """However many clients there are."""
    strategy = GWPFPaperStrategy(
        nn.Linear(3, 1), config=GWPFPaperConfig(), num_clients=clients
    )
    strategy.mask = np.zeros(4, np.bool_)
    strategy.begin_exchange()
    strategy.reset_sums()
    upload = GWPFPaperUpload(np.ones(4, np.bool_), np.zeros(0, np.float32))
    for _ in range(clients):
        strategy.add_upload(upload, 1.0)
    assert strategy.vote_counts.tolist() == [clients] * 4


def test_tighten_halves_once_for_each_upward_crossing_down_to_the_floor() -> None:
    """Staying above the mark does not halve again; falling below arms it anew."""

    def script(client: int, exchange: int) -> np.ndarray:
        # By turns of thirty rounds all steps agree, or they tremble and rounds differ.
        if exchange // 30 % 2 == 0:
            return np.ones((3, 24), np.float32)
        sign = np.random.default_rng(exchange).choice(np.array([-1, 1], np.float32), 24)
        return np.stack([sign, -4 * sign, 4 * sign])

    config = GWPFPaperConfig(
        ema=0.5,
        threshold_floor=0.1,
        frozen_update="residual",
        thaw_exchange="next_round",
    )
    federation = ScriptedFederation(script, config, num_clients=1)
    server = federation.strategy
    # What one client does by turns is no measure of what it may do.
    server.update_bound.multiple = None
    thresholds, crossings, above_for, above = [0.5], 0, 0, False
    for _ in range(240):
        federation.play()
        was_above, above = above, 1 - server.mask.mean() > TIGHTEN_SHARE
        crosses = bool(above and not was_above)
        crossings += crosses
        above_for += bool(above and was_above)
        expected = max(thresholds[-1] / 2, 0.1) if crosses else thresholds[-1]
        assert server.stability.threshold == expected
        thresholds.append(expected)
    assert crossings >= 4 and above_for > 40
    assert sorted(set(thresholds), reverse=True) == [0.5, 0.25, 0.125, 0.1]


# ---- configuration ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("frozen_update", ["keep", None]),
        ("thaw_exchange", ["never", None]),
        ("freeze_threshold", [0, -1, 1.1, math.nan, True, "0.5", None]),
        ("threshold_floor", [0, 1.1, math.nan]),
        ("thaw_threshold", [0, 1.1, math.nan]),
        ("ema", [-0.1, 1, math.nan, True, None]),
        ("thaw_quorum", [-0.1, 1.1, math.nan, True, None]),
        ("tighten", [0, "true", None]),
    ],
)
def test_a_value_that_cannot_be_used_is_named(key: str, values: list[object]) -> None:
    """The message begins with the key and the value, as the user wrote them."""
    for value in values:
        with pytest.raises(ConfigError) as caught:
            GWPFPaperConfig(**{key: value})  # type: ignore[arg-type]
        assert str(caught.value).startswith(f"method.{key}={value}: must be ")
