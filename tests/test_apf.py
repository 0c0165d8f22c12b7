"""Tests of APF, against a slow and obvious reference."""

import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pytest
import torch
from federation import Federation, lose, scripted, small, with_tensors
from flwr.common import FitRes
from numpy.testing import assert_allclose, assert_array_equal

from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods.apf import (
    APFConfig,
    APFStrategy,
    FreezingSchedule,
    aggressive_share,
)
from gwpf_baseline.utils import ConfigError, derive_seed

CONTROLS = ["aimd", "additive", "multiplicative", "fixed", "permanent"]
TRAINING = TrainingConfig(local_steps=2, batch_size=8, lr=0.2)
# Freezes much within a few rounds.
EAGER: dict[str, Any] = {"check_every": 2, "ema": 0.8, "threshold": 0.6}


# ---- the mask, over hundreds of rounds ----------------------------------------------


# Where Algorithm 1 is read in another way than it is printed, or leaves a choice.
READINGS = {
    "whole periods",  # L / 2 is rounded down; as printed, half a period is a whole one
    "below",  # P < T is stable, as printed P <= T
    "still is stable",  # where there was no update at all; 0 / 0 is below nothing
    "tightened once",  # T halves when the share rises past 0.8, not while it is there
}
# What Aggressive APF does at a check besides: here, and in two versions of its code.
DRAWS = ("one check", "up to K / 20 checks", "all deadlines")


class Coordinate:
    """One coordinate, straight from Algorithm 1.

    Parameters
    ----------
    value : float
        Its initial value.
    config : APFConfig
        The hyper-parameters.
    readings : set of str, default all
        Of `READINGS`, those to follow.
    """

    def __init__(
        self, value: float, config: APFConfig, readings: AbstractSet[str] = READINGS
    ) -> None:
        self.config = config
        self.readings = readings
        self.last = np.float32(value)
        self.ema = self.ema_abs = np.float32(0)
        self.period = 0.0
        self.frozen_until = 0.0

    def frozen(self, check: int) -> bool:
        """Tell whether it is frozen after a check."""
        return check < self.frozen_until

    def check(self, number: int, value: np.float32, threshold: float) -> None:
        """Pass a stability check."""
        if self.frozen(number - 1):
            return  # it was frozen: nothing is known, and its period runs on
        update = value - self.last
        self.last = value
        keep, rate = np.float32(self.config.ema), np.float32(1 - self.config.ema)
        self.ema = keep * self.ema + rate * update
        self.ema_abs = keep * self.ema_abs + rate * np.float32(abs(update))
        # The bound, not the quotient, so that both round alike.
        bound = np.float32(threshold) * self.ema_abs
        stable = bool(
            abs(self.ema) < bound
            or ("below" not in self.readings and abs(self.ema) == bound)
        )
        if self.ema_abs == 0:
            stable = "still is stable" in self.readings
        match self.config.control, stable:
            case "aimd" | "additive", True:
                self.period += 1
            case "multiplicative", True:
                self.period = max(1, 2 * self.period)
            case "fixed", True:
                self.period = 10
            case "permanent", True:
                self.period = 2**30
            case "aimd" | "multiplicative", False:
                self.period /= 2
                if "whole periods" in self.readings:
                    self.period = math.floor(self.period)
            case "additive", False:
                self.period = max(0, self.period - 1)
            case _:
                self.period = 0
        self.frozen_until = number + self.period

    def draw(
        self, rule: str, check: int, k: int, live: bool, draws: np.random.Generator
    ) -> None:
        """Freeze it longer, perhaps, after a check in round k that saw it if `live`."""
        drawn = draws.random() if live or rule == "all deadlines" else 1.0
        until = max(self.frozen_until, check)
        match rule:
            case "one check" if drawn < min(k / 2000, 0.5):
                self.frozen_until = max(until, check + 1)
            case "up to K / 20 checks" if drawn < k / 2000:
                self.frozen_until = until + int(100 * drawn)
            case "all deadlines" if drawn < 0.5:
                self.frozen_until = until + 1


class Threshold:
    """The threshold of stability, which halves where more than 0.8 is frozen."""

    def __init__(self, value: float, readings: AbstractSet[str] = READINGS) -> None:
        self.value = value
        self.once = "tightened once" in readings
        self.above = False

    def note(self, frozen: float) -> None:
        """Take a check's frozen share."""
        if frozen > 0.8 and not (self.above and self.once):
            self.value /= 2
        self.above = frozen > 0.8


@pytest.mark.parametrize("aggressive", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_masks_are_what_the_definition_says(control: str, aggressive: bool) -> None:
    """Every coordinate, for hundreds of exchanges; some tremble, some drift."""
    config = APFConfig(
        control=control, check_every=3, ema=0.9, threshold=0.3, aggressive=aggressive
    )
    rng = np.random.default_rng(3)
    weights = rng.normal(size=40).astype(np.float32)
    drift = np.where(np.arange(40) % 4 == 0, 0.5, 0.02).astype(np.float32)
    drift[39] = np.nan  # stands for a coordinate without any gradient
    schedule = FreezingSchedule(weights.copy(), config, seed=5)
    coordinates = [Coordinate(value, config) for value in weights]
    threshold, checks, woken, shares = Threshold(0.3), 0, 0, []
    for exchange in range(1, 601):
        schedule.observe(exchange - 1, weights)
        if exchange > 1 and (exchange - 1) % 3 == 0:
            checks += 1
            draws = np.random.default_rng(derive_seed(5, "aggressive", checks))
            before = [c.frozen(checks - 1) for c in coordinates]
            for value, coordinate in zip(weights, coordinates, strict=True):
                live = not coordinate.frozen(checks - 1)
                coordinate.check(checks, value, threshold.value)
                if aggressive:
                    coordinate.draw("one check", checks, exchange - 1, live, draws)
            after = [c.frozen(checks) for c in coordinates]
            woken += sum(b and not a for b, a in zip(before, after, strict=True))
            threshold.note(sum(after) / 40)
        active = schedule.active()
        assert_array_equal(active, [not c.frozen(checks) for c in coordinates])
        assert schedule.stability.threshold == threshold.value
        shares.append(active.mean())
        step = (drift + rng.normal(size=40)).astype(np.float32)
        weights[active] += np.where(np.isnan(step), 0, step)[active]
    assert min(shares) < 0.5 < max(shares)
    assert (woken > 20) == (aggressive or control != "permanent")


def differing(readings: AbstractSet[str], drifting: int, still: int) -> float:
    """Return the share of bits of 400 masks in which a reading differs from ours."""
    config = APFConfig(check_every=1, ema=0.9, threshold=0.6)
    rng = np.random.default_rng(7)
    weights = rng.normal(size=40).astype(np.float32)
    schedule = FreezingSchedule(weights.copy(), config, seed=5)
    # Another mask would lead elsewhere: theirs is asked on the same way, that of ours.
    coordinates = [Coordinate(value, config, readings) for value in weights]
    threshold, differ = Threshold(0.6, readings), 0
    for number in range(1, 401):
        step = rng.normal(size=40).astype(np.float32)
        step[:drifting] += 2
        step[40 - still :] = 0
        weights[schedule.active()] += step[schedule.active()]
        schedule.observe(number, weights)
        for value, coordinate in zip(weights, coordinates, strict=True):
            coordinate.check(number, value, threshold.value)
        theirs = np.array([not c.frozen(number) for c in coordinates])
        threshold.note(1 - theirs.mean())
        differ += int(np.count_nonzero(theirs != schedule.active()))
    return differ / (400 * 40)


def test_masks_are_those_of_the_released_code() -> None:
    """Which reads so, where something moves and less than 0.8 is frozen."""
    assert differing({"whole periods", "below"}, drifting=12, still=0) == 0
    assert differing(READINGS, drifting=2, still=4) == 0


@pytest.mark.parametrize("reading", sorted(READINGS - {"below"}))
def test_each_reading_makes_a_difference(reading: str) -> None:
    """So each is worth telling; an equality of floats hardly ever happens."""
    assert differing(READINGS - {reading}, drifting=0, still=34) > 0


def frozen_share(rule: str | None, drifting: int, check_every: int = 1) -> float:
    """Return the mean frozen share of 2000 rounds, on the way that a rule leads."""
    config = APFConfig(check_every=check_every)
    rng, draws = np.random.default_rng(7), np.random.default_rng(8)
    weights = np.zeros(40, np.float32)
    coordinates = [Coordinate(0, config) for _ in weights]
    threshold, frozen = Threshold(config.threshold), 0
    for k in range(1, 2001):
        active = [not c.frozen((k - 1) // check_every) for c in coordinates]
        frozen += active.count(False)
        step = rng.normal(size=40).astype(np.float32)
        step[:drifting] += 2
        weights[active] += step[active]
        if k % check_every:
            continue
        number = k // check_every
        for value, coordinate in zip(weights, coordinates, strict=True):
            live = not coordinate.frozen(number - 1)
            coordinate.check(number, value, threshold.value)
            if rule is not None:
                coordinate.draw(rule, number, k, live, draws)
        threshold.note(sum(c.frozen(number) for c in coordinates) / 40)
    return frozen / (2000 * 40)


@pytest.mark.parametrize(
    "drifting, shares",
    [
        (0, [46, 49, 84, 59]),
        (12, [56, 57, 83, 56]),
        (28, [25, 42, 81, 57]),
        (40, [0, 26, 79, 50]),
    ],
)
def test_what_each_draw_freezes(drifting: int, shares: list[int]) -> None:
    """In percent, without draws and by each rule; the code's freeze drifting ones."""
    rules = [None, *DRAWS]
    assert [round(100 * frozen_share(rule, drifting)) for rule in rules] == shares


def test_a_check_with_every_round_freezes_sooner() -> None:
    """In percent, as above and with a check every five rounds."""
    shares = [round(100 * frozen_share(None, n, 5)) for n in (0, 12, 28, 40)]
    assert shares == [49, 41, 18, 0]


def test_what_only_trembles_is_frozen_by_and_by() -> None:
    """At the paper's threshold 16, 32 and 47 % after 20, 50 and 100 checks."""
    rng = np.random.default_rng(0)
    weights = np.zeros(50_000, np.float32)
    schedule = FreezingSchedule(weights.copy(), APFConfig(check_every=1), seed=0)
    shares = [0.0]
    for number in range(1, 101):
        step = rng.normal(size=weights.size).astype(np.float32)
        active = schedule.active()
        weights[active] += step[active]
        schedule.observe(number, weights)
        shares.append(1 - schedule.active().mean())
    seen = [shares[number] for number in (20, 50, 100)]
    np.testing.assert_allclose(seen, [0.16, 0.32, 0.47], atol=0.01)


def test_aggressive_share_grows_to_a_half() -> None:
    """It is min(K / 2000, 0.5)."""
    assert aggressive_share(1) == 1 / 2000
    assert aggressive_share(500) == 0.25
    assert aggressive_share(1000) == aggressive_share(5000) == 0.5


def test_a_draw_freezes_its_share_and_is_no_evidence() -> None:
    """From round 1000 on half of what would be active, for a check, in turn."""
    config = APFConfig(aggressive=True, check_every=1)
    weights = np.zeros(20_000, np.float32)
    schedule = FreezingSchedule(weights.copy(), config, seed=0)
    masks = []
    for exchange in range(1000, 1003):
        # All drift, so that nothing is frozen but by draws.
        weights[schedule.active()] += 1
        checked = schedule.active()
        before = schedule.stability.ema.copy()
        schedule.observe(exchange, weights)
        masks.append(schedule.active())
        assert_array_equal(schedule.stability.ema != before, checked)
        assert_array_equal(masks[-1] | checked, True)
    assert not schedule.period.any()
    assert abs(masks[0].mean() - 0.5) < 0.02
    # Half of what was drawn before is awake, and half of the rest drawn anew.
    assert abs(masks[1].mean() - 0.75) < 0.02


# ---- server and clients -------------------------------------------------------------


class Dictating(APFStrategy):
    """A server that sends every mask."""

    def sends_mask(self, client: int) -> bool:
        """Say yes, whoever asks."""
        return True


def _dictated(federation: Federation) -> Federation:
    federation.strategy.__class__ = Dictating
    return federation


@pytest.mark.parametrize("aggressive", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_derived_and_sent_masks_give_the_same_model(
    control: str, aggressive: bool
) -> None:
    """To the bit, over real training; derived ones save the bytes of the masks."""
    options = {**EAGER, "control": control, "aggressive": aggressive}
    derived = small([40, 60, 50], TRAINING, "apf", options)
    sent = _dictated(small([40, 60, 50], TRAINING, "apf", options))
    frozen = set()
    for _ in range(25):
        mine, theirs = derived.play(), sent.play()
        assert (mine.clients, mine.failures) == (theirs.clients, theirs.failures)
        assert torch.equal(derived.strategy.weights, sent.strategy.weights)
        assert_array_equal(derived.strategy.mask, sent.strategy.mask)
        # A mask that was derived is vouched for by its checksum.
        assert mine.uplink_bytes == theirs.uplink_bytes + 4 * mine.clients
        assert mine.downlink_bytes < theirs.downlink_bytes
        frozen.add(mine.frozen_fraction)
        for node in derived.nodes:
            assert_array_equal(node.uploaded(), derived.strategy.mask)
    assert len(frozen) > 4 and mine.failures == 0


def test_a_frozen_coordinate_never_moves() -> None:
    """Neither in the model nor, after any iteration, on a client."""
    federation = small([40, 60], TRAINING, "apf", EAGER)
    server, seen = federation.strategy, []

    def watch(build: Callable[..., Any]) -> Callable[..., Any]:
        def watched(store: Any) -> Any:
            client = build(store)
            train = client.train

            def training(
                start: torch.Tensor, task: Any, state: Any, on_step: Any
            ) -> Any:
                frozen = ~torch.from_numpy(task.mask)

                def step(vector: torch.Tensor) -> None:
                    on_step(vector)
                    assert torch.equal(vector[frozen], start[frozen])
                    assert not torch.equal(vector, start)
                    seen.append(int(frozen.sum()))

                return train(start, task, state, step)

            client.train = training
            return client

        return watched

    for node in federation.nodes:
        node.build = watch(node.build)
    for _ in range(30):
        before = server.weights.clone()
        federation.play()
        frozen = ~torch.from_numpy(server.mask)
        assert torch.equal(server.weights[frozen], before[frozen])
    assert len(seen) == 30 * 2 * 2 and max(seen) > 100


def test_sampled_clients_get_the_mask() -> None:
    """Those that have missed a model get it, and train what the server means."""
    federation = small([30] * 6, TRAINING, "apf", EAGER, fraction_fit=0.5)
    server, counts = federation.strategy, set()
    for number in range(1, 31):
        asked = [len(node.sent) for node in federation.nodes]
        record = federation.play()
        assert (record.clients, record.failures) == (3, 0)
        if number == 1:  # all hold the initial model
            heard = {i for i, node in enumerate(federation.nodes) if node.sent}
            assert server.in_step == heard and len(heard) == 3
        for node, before in zip(federation.nodes, asked, strict=True):
            if len(node.sent) > before:
                assert_array_equal(node.uploaded(), server.mask)
        counts.add(len(server.in_step))
    assert min(counts) == 0
    # Who is out of step keeps no schedule.
    assert not any("schedule.ema" in n.state.arrays for n in federation.nodes)


def _refused(answer: FitRes) -> FitRes:
    return with_tensors(answer, [t[:-1] for t in answer.parameters.tensors])


@pytest.mark.parametrize("mishap", ["lost", "refused", "deaf", "forgetful"])
def test_who_falls_out_of_step_is_sent_the_mask(mishap: str) -> None:
    """From then on, and those that are in step are not."""
    federation = small([30] * 3, TRAINING, "apf", EAGER)
    server, node = federation.strategy, federation.nodes[1]
    federation.play(6)
    assert server.in_step == {0, 1, 2}
    if mishap == "forgetful":
        node.forget()
    node.reachable = mishap != "deaf"
    node.tamper = {"lost": lose, "refused": _refused}.get(mishap)
    record = federation.play()
    assert (record.clients, record.failures) == (2, 1)
    node.reachable, node.tamper = True, None
    for _ in range(10):
        record = federation.play()
        assert (record.clients, record.failures) == (3, 0)
        assert server.in_step == {0, 2}
        assert_array_equal(node.uploaded(), server.mask)


def test_nothing_that_is_learned_gets_lost() -> None:
    """Of what is not frozen; each update is in the model or pending, in step or not."""
    learned, moved = np.zeros(24), np.zeros(24)

    def script(client: int, exchange: int) -> np.ndarray:
        nonlocal learned
        steps = np.random.default_rng([client, exchange]).normal(size=(1, 24))
        steps[:, 12:] += 1  # half of them go somewhere
        learned = learned + np.where(server.mask, steps.sum(0), 0)
        return steps.astype(np.float32)

    options = {"check_every": 1, "ema": 0.5, "threshold": 0.7}
    federation = scripted("apf", script, options, fraction_fit=0.75)
    server, rng = federation.strategy, np.random.default_rng(0)
    shares = []
    for _ in range(60):
        for node in federation.nodes:
            luck = rng.choice(["good", "good", "good", "deaf", "lost", "refused"])
            node.reachable = luck != "deaf"
            node.tamper = {"lost": lose, "refused": _refused}.get(luck)
        before = server.weights.double().numpy()
        record = federation.play()
        shares.append(record.frozen_fraction or 0.0)
        moved += (server.weights.double().numpy() - before) * record.clients
        pending = np.zeros(24)
        for i, node in enumerate(federation.nodes):
            residual = node.state.arrays.get("residual", np.zeros(24)).copy()
            uploaded = node.state.uploaded
            if uploaded and server.clients[i].used == uploaded:
                residual[node.uploaded()] = 0
            pending += residual
        assert_allclose(moved + pending, learned, atol=1e-4)
    assert any(0 < share < 1 for share in shares) and not server.in_step


def test_a_client_with_another_mask_is_left_out_and_then_told() -> None:
    """As if its processor rounded otherwise."""
    federation = small([30] * 3, TRAINING, "apf", EAGER)
    server, node = federation.strategy, federation.nodes[2]
    federation.play(8)
    state = node.state
    state.arrays["schedule.deadline"] = state.arrays["schedule.deadline"] + 3
    node.store.save(state)
    record = federation.play()
    assert (record.clients, record.failures) == (2, 1)
    record = federation.play(3)
    assert (record.clients, record.failures) == (3, 0)
    assert server.in_step == {0, 1}


def test_partial_synchronisation_lets_frozen_values_drift() -> None:
    """What left synchronisation goes on where the client left it, for good."""

    def script(client: int, exchange: int) -> np.ndarray:
        # The first half trembles around a way that differs between clients.
        step = np.full(24, 0.1, np.float32)
        step[:12] = (-1) ** exchange + 0.01 * client
        return step[None]

    options = {"check_every": 1, "control": "permanent", "frozen_update": "drift"}
    options |= {"ema": 0.5, "threshold": 0.5}
    federation = scripted("apf", script, options, num_clients=2)
    server = federation.strategy
    federation.play(10)
    frozen = ~server.mask
    assert_array_equal(frozen, np.arange(24) < 12)
    model = server.weights.clone()
    left = [node.state.arrays["residual"].copy() for node in federation.nodes]
    federation.play(5)
    held = [node.state.arrays["residual"].copy() for node in federation.nodes]
    common = server.weights.numpy().copy()
    federation.play()
    for node, residual in zip(federation.nodes, held, strict=True):
        start = np.where(frozen, common + residual, common)
        assert_array_equal(node.starts[-1], start)
    assert torch.equal(server.weights[:12], model[:12])
    for client, node in enumerate(federation.nodes):
        moved = node.state.arrays["residual"] - left[client]
        np.testing.assert_allclose(moved[:12], 6 * 0.01 * client, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("control", ["never", None]),
        ("frozen_update", ["residual", None]),
        ("check_every", [0, 1.5, True, None, "2"]),
        ("ema", [1, -0.1, None, True]),
        ("threshold", [0, 1.1, None, True]),
        ("aggressive", [1, None, "yes"]),
    ],
)
def test_a_wrong_hyper_parameter_is_named(key: str, values: list[Any]) -> None:
    """One line says which."""
    for value in values:
        with pytest.raises(ConfigError, match=f"method.{key}="):
            APFConfig(**{key: value})
