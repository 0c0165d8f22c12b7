"""Sparse ternary compression (STC).

Sattler, Wiedemann, Müller, Samek: Robust and Communication-Efficient Federated Learning
from Non-IID Data. IEEE TNNLS 2020, algorithms 1 and 2. ``docs/stc.md`` says what is
read how.

A client sends the largest of what it has accumulated, as positions, signs and a single
magnitude, and keeps the rest, also what the magnitude leaves out. The server averages,
and does to the mean what the clients did: its step is as sparse and as ternary. A
client that missed some steps is sent them, or the whole model where that is smaller.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.exchange.messages import ClientRecord
from gwpf_baseline.exchange.payload import Part, Reader, Sections, Sizes, Writer
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.pruning import largest, share
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import BoolVector, ConfigError, FloatVector, is_number


@dataclass(frozen=True)
class STCConfig:
    """Hyper-parameters of STC.

    Parameters
    ----------
    up, down : float, default 0.01
        p, the share of all coordinates that a client's upload and the server's step
        have, in ``(0, 1]``; at least one coordinate.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    up: float = 0.01
    down: float = 0.01

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("up", "down"):
            value = getattr(self, key)
            if not is_number(value) or not 0 < value <= 1:
                raise ConfigError(f"method.{key}", value, "in (0, 1]")


# ---- the algorithm: pure functions on flat vectors ----------------------------------


class Ternary(NamedTuple):
    """A vector of zeros and of plus and minus one magnitude.

    Parameters
    ----------
    positions : numpy.ndarray
        bool ``(d,)``, where it is not zero.
    signs : numpy.ndarray
        bool ``(k,)``, true where it is positive.
    magnitude : numpy.float32
        The magnitude, at least 0.
    """

    positions: BoolVector
    signs: BoolVector
    magnitude: np.float32

    def values(self) -> FloatVector:
        """Return what it is where it is not zero, float32 ``(k,)``."""
        return np.where(self.signs, self.magnitude, -self.magnitude)


def ternarise(vector: FloatVector, keep: float) -> Ternary:
    """Compress a vector to its largest values, all of their mean magnitude.

    Parameters
    ----------
    vector : numpy.ndarray
        float32 ``(d,)``.
    keep : float
        p, the share of values to keep; at least one. Zeros are never kept.

    Returns
    -------
    Ternary
        Algorithm 1.
    """
    size = np.abs(vector)
    positions = largest(size, share(keep, vector.size))
    positions &= size > 0
    kept = vector[positions]
    magnitude = size[positions].mean() if kept.size else np.float32(0)
    return Ternary(positions, kept > 0, np.float32(magnitude))


def write_ternary(sections: Sections, step: Ternary) -> None:
    """Code a ternary vector: a bitmap of positions, one of signs, one float."""
    sections.bitmap(step.positions)
    if step.signs.size:
        sections.bitmap(step.signs, part=Part.VALUES)
        sections.vector(np.array([step.magnitude], np.float32))


def read_ternary(reader: Reader, dimension: int) -> Ternary:
    """Undo :func:`write_ternary`.

    Raises
    ------
    WireError
        The payload holds something else.
    """
    positions = reader.bitmap(dimension)
    count = int(np.count_nonzero(positions))
    if not count:
        return Ternary(positions, np.zeros(0, np.bool_), np.float32(0))
    signs = reader.bitmap(count, part=Part.VALUES)
    (magnitude,) = reader.vector(1)
    if magnitude < 0:
        raise WireError(f"a magnitude of {magnitude}")
    return Ternary(positions, signs, magnitude)


# ---- the server's half --------------------------------------------------------------


class STCStrategy(SyncStrategy[Ternary]):
    """The server's half of STC.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`STCConfig`.

    Attributes
    ----------
    residual : numpy.ndarray
        float32 ``(d,)``, what clients have sent and the model has not moved by.
    steps : list of Sections
        The last exchanges' steps, coded; never larger than the whole model.

    Raises
    ------
    ConfigError
        Values are to be rounded or applied in another way.
    """

    name = "stc"
    config: STCConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse("sends signs of one size", "server_optimizer", "quantization")
        self.residual = np.zeros(self.dimension, np.float32)
        self.update_sum = np.zeros(0, np.float32)
        self.sent = 0
        self.steps: list[Sections] = []

    def reset_sums(self) -> None:
        """Start the sum afresh."""
        self.update_sum = np.zeros(self.dimension, np.float32)
        self.sent = 0

    def read_upload(self, reader: Reader) -> Ternary:
        """Take one client's ternary update."""
        upload = read_ternary(reader, self.dimension)
        self.measure(upload.values())
        return upload

    def add_upload(self, upload: Ternary, weight: float) -> None:
        """Add one client's update."""
        self.update_sum[upload.positions] += np.float32(weight) * upload.values()
        self.sent += upload.signs.size

    def finish_exchange(self, total_weight: float) -> BoolVector:
        """Move the model by what the mean, with what is due, is compressed to."""
        self.residual += self.update_sum / np.float32(total_weight)
        step = ternarise(self.residual, self.config.down)
        self.residual[step.positions] -= step.values()
        self.weights.numpy()[step.positions] += step.values()
        self._remember(step)
        return step.positions

    def abandon_exchange(self) -> None:
        """Remember a step that leads nowhere: steps are counted by exchanges."""
        nowhere = np.zeros(self.dimension, np.bool_)
        self._remember(Ternary(nowhere, nowhere[:0], np.float32(0)))

    def _remember(self, step: Ternary) -> None:
        coded = Sections()
        write_ternary(coded, step)
        self.steps.append(coded)
        # What is larger than the model is never sent.
        while sum(step.size for step in self.steps) >= 4 * self.dimension:
            del self.steps[0]

    def write_change(self, writer: Writer, held: ClientRecord) -> bool:
        """Write the steps that a client has missed."""
        missed = self.exchange - 1 - held.version
        if missed > len(self.steps):
            return False
        for step in self.steps[len(self.steps) - missed :]:
            writer.splice(step)
        return True

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that a client sent."""
        return {"sent_fraction": self.sent / (self.answers * self.dimension)}

    def method_state(self) -> dict[str, Any]:
        """Return what is due, and the last steps."""
        codes = b"".join(step.code() for step in self.steps)
        return {
            "residual": torch.from_numpy(self.residual),
            "steps": torch.from_numpy(np.frombuffer(codes, np.uint8).copy()),
            "step_sizes": [dict(step.sizes) for step in self.steps],
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.residual = state["residual"].numpy()
        codes, self.steps = state["steps"].numpy().tobytes(), []
        for saved in state["step_sizes"]:
            sizes = Sizes({Part(part): size for part, size in saved.items()})
            code, codes = codes[: sizes.total()], codes[sizes.total() :]
            if min(sizes.values(), default=0) < 0 or len(code) != sizes.total():
                raise ValueError(f"a step of {saved} bytes")
            self.steps.append(Sections(code, sizes))


# ---- the client's half --------------------------------------------------------------


class STCClient(SyncClient):
    """The client's half of STC.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`STCConfig`.
    """

    name = "stc"
    config: STCConfig

    def read_change(
        self, reader: Reader, weights: FloatVector, state: ClientState
    ) -> None:
        """Take the steps that this client has missed, in their order, to the bit."""
        for version in range(reader.header.base, reader.header.exchange - 1):
            step = read_ternary(reader, weights.size)
            # The server may not know that some of them had arrived before.
            if version >= state.version:
                weights[step.positions] += step.values()

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model, and send the largest of all that is due."""
        residual = self.residual(state)
        delta, loss = self.train(task.weights, task, state)
        residual += delta.numpy()
        update = ternarise(residual, self.config.up)
        write_ternary(writer, update)
        left_out = residual[update.positions] - update.values()
        self.note_sent(state, update.positions, left_out)
        return loss


METHOD = Method(STCConfig, STCStrategy, STCClient)
