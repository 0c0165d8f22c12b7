"""Seeds, devices and the one kind of error that a user's configuration can cause."""

import ctypes
import hashlib
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
import yaml

# What no YAML that a run writes comes near.
_DEEPEST = 20
_LONGEST_VALUE = 2**13
# As malloc.h has them.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

FloatVector = npt.NDArray[np.float32]
BoolVector = npt.NDArray[np.bool_]


class ConfigError(ValueError):
    """A configuration value that cannot be used.

    Parameters
    ----------
    key : str
        The configuration key as the user writes it, e.g. ``partition.alpha``.
    value : object
        The value that was given.
    allowed : str
        What would be accepted, e.g. ``a number > 0``.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        given = f"{one_line(key)}={one_line(value)}"
        super().__init__(f"{given}: must be {one_line(allowed, 1000)}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the line alone: from another process, that is all there is to tell."""
        return ConfigError.__new__, (ConfigError, str(self))


class RunError(RuntimeError):
    """A run that cannot go on, through no fault of its configuration."""


def one_line(text: object, most: int = 500) -> str:
    """Return somebody else's words as they can be shown, cut where they are long.

    Parameters
    ----------
    text : object
        The words, or an error that holds them.
    most : int, default 500
        How many characters to keep.

    Returns
    -------
    str
        The words, :func:`escaped`.
    """
    try:
        words = str(text)
    # Of a number of thousands of digits, which Python does not write.
    except ValueError:
        words = "a number too long to show"
    # One more: whatever is beyond what is kept.
    shown = escaped(words[: most + 1])
    return shown if len(shown) <= most else f"{shown[:most]}..."


def escaped(text: str) -> str:
    """Return a text in one line, with nothing unprintable in it.

    Parameters
    ----------
    text : str
        The text.

    Returns
    -------
    str
        Line ends and control characters, which could forge lines of a log or steer a
        terminal, as escape sequences that only name them.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def check_yaml(text: str) -> None:
    """Check that a text in YAML is none that its parser would not come to an end with.

    Parameters
    ----------
    text : str
        What somebody else may have written.

    Raises
    ------
    ValueError
        It has aliases, very long values, or levels without end.
    yaml.YAMLError
        It is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        # A few of them make a document without an end.
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has the alias *{event.anchor}, which no run writes")
        # Whole numbers to the base of 60 take the square of their length.
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST_VALUE:
            raise ValueError(f"it has a value of {len(event.value)} characters")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a configuration value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object, least: float = -math.inf) -> TypeGuard[int]:
    """Tell whether a value is a whole number, such as 1 but not 1.0 nor true.

    Parameters
    ----------
    value : object
        The value.
    least : float, default minus infinity
        The least that it may be.

    Returns
    -------
    bool
        Whether it is one, and not less than that.
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_name(value: object) -> bool:
    """Tell whether a configuration value can be shown as a name: a word, in tables."""
    if not isinstance(value, str) or len(value) > 100:
        return False
    return value.isprintable() and value.split() == [value]


def derive_seed(*parts: int | str) -> int:
    """Derive an independent 63-bit seed from a run's seed and the names of its use.

    Python's own ``hash`` differs between processes; this does not, so that a client
    draws the same numbers in whichever worker it runs.

    Parameters
    ----------
    *parts : int or str
        For example ``(seed, "batches", partition_id, epoch)``.

    Returns
    -------
    int
        A seed in ``[0, 2**63)``.
    """
    text = "/".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def pick_device(num_gpus: float) -> torch.device:
    """Choose where a client trains.

    Parameters
    ----------
    num_gpus : float
        The share of a GPU that the client was given (``client_resources.num_gpus``).

    Returns
    -------
    torch.device
        The GPU if a share of one was given and one is visible, else the CPU.
    """
    use_gpu = num_gpus > 0 and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for what it allocates next.

    By default glibc gives what a training step frees back to the system, and the next
    step pays for fresh pages: with dense messages in between, a quarter of the training
    time of LeNet-5. Vectors of more than 8 million floats still come and go. Elsewhere
    than with glibc this does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 2**28)


def run_folder(run_id: int | str) -> Path:
    """Return the folder of a run that Flower started.

    Server and simulated clients derive the same one. Flower runs apps in a working
    folder of its own, so this lies under the user's home, or where ``GWPF_OUTPUTS``
    says.

    Parameters
    ----------
    run_id : int or str
        Flower's id of the run.

    Returns
    -------
    pathlib.Path
        ``<outputs>/<run_id>``.
    """
    outputs = os.environ.get("GWPF_OUTPUTS", "~/gwpf_outputs")
    return Path(outputs).expanduser() / str(run_id)
