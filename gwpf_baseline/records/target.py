"""What a run is measured by, and the target that it may be asked to reach."""

import math

from gwpf_baseline.records.history import RoundRecord, perplexity
from gwpf_baseline.utils import ConfigError, is_number


def metric_of(record: RoundRecord, metric: str) -> float | None:
    """Return what a round is measured by.

    Parameters
    ----------
    record : RoundRecord
        The round.
    metric : {"accuracy", "perplexity"}
        Its name.

    Returns
    -------
    float or None
        None if the round was not evaluated. The perplexity of a model that diverged is
        infinite: its last finite one would flatter it.
    """
    if metric == "accuracy":
        return record.test_accuracy
    if record.test_loss is not None:
        return perplexity(record.test_loss)
    return None if record.test_accuracy is None else math.inf


def reaches(value: float | None, target: float, metric: str) -> bool:
    """Tell whether a round has reached a target.

    Parameters
    ----------
    value : float or None
        As of `metric_of`; a round that was not evaluated has reached nothing.
    target : float
        An accuracy of at least, or a perplexity of at most that much.
    metric : {"accuracy", "perplexity"}
        Which of the two it is.

    Returns
    -------
    bool
        Whether it has.
    """
    if value is None:
        return False
    return value <= target if metric == "perplexity" else value >= target


def check_target(key: str, target: object, metric: str) -> None:
    """Check that a target can be reached at all.

    Parameters
    ----------
    key : str
        The option that it was given by.
    target : object
        What was given.
    metric : {"accuracy", "perplexity"}
        What the run is measured by.

    Raises
    ------
    ConfigError
        Not an accuracy in (0, 1], or not a finite perplexity of at least 1.
    """
    number = float(target) if is_number(target) else math.nan
    if metric == "accuracy" and not 0 < number <= 1:
        raise ConfigError(key, target, "an accuracy in (0, 1]")
    if metric == "perplexity" and not 1 <= number < math.inf:
        raise ConfigError(key, target, "a perplexity >= 1")
