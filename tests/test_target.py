"""Targets: which values reach them, and which are none."""

import math

import pytest

from gwpf_baseline.records.target import check_target, reaches
from gwpf_baseline.utils import ConfigError


@pytest.mark.parametrize(
    ("value", "target", "metric", "reached"),
    [
        (0.5, 0.5, "accuracy", True),
        (0.49, 0.5, "accuracy", False),
        (40.0, 40.0, "perplexity", True),
        (40.1, 40.0, "perplexity", False),
        (math.inf, 40.0, "perplexity", False),
        (None, 0.5, "accuracy", False),
        (None, 40.0, "perplexity", False),
    ],
)
def test_what_reaches_a_target(
    value: float | None, target: float, metric: str, reached: bool
) -> None:
    """More is better of an accuracy, less of a perplexity; nothing reaches nothing."""
    assert reaches(value, target, metric) is reached


@pytest.mark.parametrize(
    ("metric", "possible"), [("accuracy", (0.98, 1)), ("perplexity", (1, 45.5))]
)
def test_possible_targets(metric: str, possible: tuple[float, ...]) -> None:
    """Whole numbers are numbers, too."""
    for target in possible:
        check_target("stop_at", target, metric)


@pytest.mark.parametrize(
    "target", [0, -1, math.nan, math.inf, True, "0.5", [0.5], None]
)
def test_impossible_targets_are_named(target: object) -> None:
    """By the key under which they were given."""
    for metric, allowed in (
        ("accuracy", r"an accuracy in \(0, 1\]"),
        ("perplexity", "a perplexity >= 1"),
    ):
        with pytest.raises(ConfigError, match=f"^stop_at=.*: must be {allowed}$"):
            check_target("stop_at", target, metric)


def test_a_percentage_is_no_accuracy() -> None:
    """Nor is an accuracy a perplexity."""
    with pytest.raises(ConfigError):
        check_target("stop_at", 98, "accuracy")
    with pytest.raises(ConfigError):
        check_target("stop_at", 0.98, "perplexity")
