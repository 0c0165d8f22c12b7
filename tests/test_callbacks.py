"""Tests of what happens around a round: measuring, telling, stopping, and its order."""

import math
from collections.abc import Iterable

import pytest
import torch
from federation import Federation, small

from gwpf_baseline.callbacks import EvaluateFn, Evaluation, OnRound, StopAt
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.strategy import Callback, SyncStrategy

BRIEF = TrainingConfig(local_steps=1, batch_size=5)
Measured = tuple[float, float] | None


def measuring(results: Iterable[Measured]) -> EvaluateFn:
    """Return an evaluation that has given results, round by round."""
    given = iter(results)

    def evaluate(number: int, weights: torch.Tensor, buffers: torch.Tensor) -> Measured:
        return next(given)

    return evaluate


def federation(*callbacks: Callback, method: str = "fedavg") -> Federation:
    """Build a federation of two clients."""
    return small([10, 10], BRIEF, method, callbacks=callbacks)


def rounds_until_finished(played: Federation, most: int) -> int:
    """Play until the run has finished."""
    for number in range(1, most + 1):
        assert not played.strategy.finished
        played.play()
        if played.strategy.finished:
            return number
    return most + 1


# ---- ending a run -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "metric", "results", "last"),
    [
        (0.5, "accuracy", [(9, 0.3), (9, 0.49), (9, 0.5), (9, 0.6)], 3),
        (0.5, "accuracy", [(9, 0.7), (9, 0.1)], 1),
        (0.5, "accuracy", [(9, 0.4), None, None, (9, 0.6)], 4),
        (0.5, "accuracy", [(9, 0.49)] * 4, 5),
        (0.5, "accuracy", [None] * 4, 5),
        (8, "perplexity", [(math.log(9), 0.9), (math.log(8) - 1e-9, 0.1)], 2),
        (8, "perplexity", [(math.log(8.01), 0.9)] * 3, 4),
        (8, "perplexity", [(1.0, 0.0), (9.0, 0.0)], 1),
        (8, "perplexity", [(math.inf, 0.9), (math.nan, 0.9), None, (1.0, 0.1)], 4),
    ],
)
def test_the_first_evaluation_that_reaches_the_target_ends_the_run(
    target: float, metric: str, results: list[Measured], last: int
) -> None:
    """And none before it: a round that was not measured reaches nothing, nor does a
    loss that diverged."""
    played = federation(Evaluation(measuring(results)), StopAt(target, metric))
    assert rounds_until_finished(played, len(results)) == last


def test_after_the_end_nobody_is_asked_and_nothing_recorded() -> None:
    """Flower goes on counting rounds; they do nothing."""
    evaluate = measuring([(1.0, 0.1), (1.0, 0.9)])
    told: list[RoundRecord] = []
    played = federation(Evaluation(evaluate), StopAt(0.5, "accuracy"))
    played.strategy.callbacks.append(OnRound(told.append))
    played.play(2)
    strategy, nodes = played.strategy, played.nodes
    assert strategy.finished
    seen = [len(node.received) for node in nodes]
    weights, exchange = strategy.weights.clone(), strategy.exchange
    # A further evaluation would find no result left.
    last = played.play(3)
    assert played.rounds == 5
    assert [record.round for record in strategy.records] == [1, 2]
    assert last is strategy.records[-1] and told == strategy.records
    assert [len(node.received) for node in nodes] == seen == [2, 2]
    assert torch.equal(strategy.weights, weights) and strategy.exchange == exchange
    assert strategy.evaluate(6, strategy.parameters()) is None


def test_a_run_without_a_target_goes_on() -> None:
    """Whatever it reaches."""
    played = federation(Evaluation(measuring([(0.0, 1.0)] * 3)))
    assert rounds_until_finished(played, 3) == 4


# ---- a user's own -------------------------------------------------------------------


class Patience(Callback):
    """Measures how far the model has come, and ends the run when that is enough."""

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.start: torch.Tensor | None = None
        self.numbers: list[int] = []

    def measure(self, strategy: SyncStrategy, number: int) -> dict[str, float]:
        """Measure the distance from the first measured model, in `mean_accuracy`."""
        self.numbers.append(number)
        if self.start is None:
            self.start = strategy.weights.clone()
        return {"mean_accuracy": float((strategy.weights - self.start).norm())}

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """Tell whether it is enough."""
        assert record is strategy.records[-1]
        return record.mean_accuracy is not None and record.mean_accuracy > self.enough


def test_a_users_own_callback_measures_a_column_and_ends_a_run() -> None:
    """Beside ours, and without any evaluation."""
    own = Patience(enough=1e-9)
    played = federation(own)
    assert rounds_until_finished(played, 5) == 2
    first, second = played.strategy.records
    assert first.mean_accuracy == 0
    assert second.mean_accuracy is not None and second.mean_accuracy > 1e-9
    assert own.numbers == [1, 2]
    assert first.test_accuracy is None


def test_a_column_that_is_none_is_a_mistake() -> None:
    """It does not get lost silently."""

    class Misspelt(Callback):
        """Measures what no record has."""

        def measure(self, strategy: SyncStrategy, number: int) -> dict[str, float]:
            """Return it."""
            return {"test_acuracy": 0.5}

    with pytest.raises(TypeError, match="test_acuracy"):
        federation(Misspelt()).play()


def test_a_callback_that_does_nothing_changes_nothing() -> None:
    """A user's need only define what they are for."""
    plain, with_callback = federation(), federation(Callback())
    for played in (plain, with_callback):
        played.play(2)
        assert not played.strategy.finished
    assert torch.equal(plain.strategy.weights, with_callback.strategy.weights)


# ---- order --------------------------------------------------------------------------


class Noting(Callback):
    """Notes when it is called, and ends the run if it is to."""

    def __init__(self, name: str, notes: list[str], ends: bool = False) -> None:
        self.name = name
        self.notes = notes
        self.ends = ends

    def measure(self, strategy: SyncStrategy, number: int) -> dict[str, float]:
        """Note it; the last one's measurement counts."""
        self.notes.append(f"{self.name} measures {number}")
        assert len(strategy.records) == number - 1
        return {"test_loss": float(ord(self.name)), "csr_bytes": ord(self.name)}

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """Note it."""
        self.notes.append(f"{self.name} sees {record.round}")
        return self.ends


def test_callbacks_are_called_in_their_order() -> None:
    """All measure before any sees the record; one that ends the run keeps no other from
    seeing its last round."""
    notes: list[str] = []
    played = federation(
        Noting("b", notes), Noting("c", notes, ends=True), Noting("a", notes)
    )
    record = played.play()
    assert notes == [
        "b measures 1",
        "c measures 1",
        "a measures 1",
        "b sees 1",
        "c sees 1",
        "a sees 1",
    ]
    assert (record.test_loss, record.csr_bytes) == (ord("a"), ord("a"))
    assert played.strategy.finished
    played.play()
    assert len(notes) == 6


# ---- ours ---------------------------------------------------------------------------


def test_the_mean_of_a_random_network_is_measured_where_there_is_one() -> None:
    """In the rounds that are evaluated at all; the network itself is measured first."""
    seen: list[tuple[int, torch.Tensor]] = []

    def evaluate(number: int, weights: torch.Tensor, buffers: torch.Tensor) -> Measured:
        seen.append((number, weights.clone()))
        return None if number == 1 else (2.0, len(seen) / 10)

    played = federation(Evaluation(evaluate), method="fedpm")
    first, second = played.play(), played.play()
    assert (first.test_accuracy, first.mean_accuracy) == (None, None)
    assert (second.test_loss, second.test_accuracy) == (2.0, 0.2)
    assert second.mean_accuracy == 0.3
    assert [number for number, _ in seen] == [1, 2, 2]
    assert torch.equal(seen[1][1], played.strategy.measured_weights())
    assert torch.equal(seen[2][1], played.strategy.weights)


def test_an_evaluation_goes_back_to_flower() -> None:
    """As its strategies return it: the loss, and the accuracy by its name."""
    strategy = federation(Evaluation(measuring([(2.0, 0.25), None]))).strategy
    parameters = strategy.parameters()
    assert strategy.evaluate(0, parameters) is None
    assert strategy.evaluate(1, parameters) == (2.0, {"accuracy": 0.25})
    assert strategy.evaluate(2, parameters) is None
