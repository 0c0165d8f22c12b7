"""Vectors of zeros and of plus and minus one magnitude, as updates and as steps.

After Sattler, Wiedemann, Müller, Samek: Robust and Communication-Efficient Federated
Learning from Non-IID Data. IEEE TNNLS 2020, algorithm 1. The server moves the model by
such steps, which is what it sends; who missed some is sent them, or the whole model
where that is smaller. Where updates are of the same kind, clients answer with the
largest of what they have accumulated. What becomes a step is a method's own.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from gwpf_baseline.coordinates import ScatteredSum, marked
from gwpf_baseline.exchange.coding import MOST, Classes, WireError
from gwpf_baseline.exchange.messages import ClientRecord
from gwpf_baseline.exchange.payload import Part, Reader, Sections, Sizes, Writer
from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.learning.method_client import LostState
from gwpf_baseline.learning.method_server import Upload
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods.shared.activity import CLASSES, Activity
from gwpf_baseline.methods.shared.pruning import largest, share
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import BoolVector, FloatVector

# ---- the compression ----------------------------------------------------------------


class Ternary(NamedTuple):
    """A vector of zeros and of plus and minus one magnitude.

    Parameters
    ----------
    positions : numpy.ndarray
        int64 ``(k,)``, where it is not zero, in rising order.
    signs : numpy.ndarray
        bool ``(k,)``, true where it is positive.
    magnitude : numpy.float32
        The magnitude, at least 0.
    """

    positions: np.ndarray
    signs: BoolVector
    magnitude: np.float32

    def values(self) -> FloatVector:
        """Return what it is where it is not zero, float32 ``(k,)``."""
        return (2 * self.signs.view(np.int8) - 1) * self.magnitude

    def scaled(self, factor: float) -> "Ternary":
        """Return it with another magnitude, which is multiplied in float32."""
        return Ternary(self.positions, self.signs, np.float32(factor) * self.magnitude)


NOWHERE = Ternary(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.float32(0))


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
    positions = largest(vector, share(keep, vector.size))
    kept = vector[positions]
    magnitude = np.abs(kept).mean() if kept.size else np.float32(0)
    return Ternary(positions, kept > 0, np.float32(magnitude))


def write_ternary(
    sections: Sections, step: Ternary, dimension: int, activity: Activity | None = None
) -> None:
    """Code a ternary vector: a bitmap of positions, one of signs, one float.

    Parameters
    ----------
    sections : Sections
        Takes the code.
    step : Ternary
        The vector.
    dimension : int
        d.
    activity : Activity, optional
        What both sides know of where the model has moved, by which positions are coded.
        Default: nothing.
    """
    sections.positions(step.positions, dimension, _expected(activity))
    if step.signs.size:
        sections.bitmap(step.signs, part=Part.VALUES)
        sections.vector(np.array([step.magnitude], np.float32))


def read_ternary(
    reader: Reader,
    dimension: int,
    activity: Activity | None = None,
    most: int = MOST,
) -> Ternary:
    """Undo :func:`write_ternary`, of a vector that has at most so many values.

    Raises
    ------
    WireError
        The payload holds something else.
    """
    positions = reader.positions(dimension, _expected(activity), most)
    if not positions.size:
        return NOWHERE
    return Ternary(positions, *_read_values(reader, positions.size))


def _skip_ternary(reader: Reader, dimension: int, classes: int) -> None:
    """Pass over a vector, whatever was expected of its positions."""
    count = reader.skip_positions(dimension, classes)
    if count:
        _read_values(reader, count)


def _expected(activity: Activity | None) -> Classes | None:
    return None if activity is None else activity.classes


def _read_values(reader: Reader, count: int) -> tuple[BoolVector, np.float32]:
    signs = reader.bitmap(count, part=Part.VALUES)
    (magnitude,) = reader.vector(1)
    if magnitude < 0:
        raise WireError(f"a magnitude of {magnitude}")
    return signs, magnitude


# ---- the server's half --------------------------------------------------------------


# pylint: disable-next=abstract-method  # which its kinds fill in
class SteppingStrategy(SyncStrategy[Upload]):
    """A server whose model moves by ternary steps, which is what it sends.

    A method fills in `finish_exchange`, which ends with :meth:`take_step`.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`.

    Attributes
    ----------
    steps : list of Sections
        The last exchanges' steps, coded; never larger than the whole model.
    activity : Activity or None
        What both sides know of where the model has moved, if the method codes by it.

    Raises
    ------
    ConfigError
        Values are to be rounded or applied in another way.
    """

    #: Whether positions are coded by where the model has moved; for both halves.
    foresees = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refuse("sends signs of one size", "server_optimizer", "quantization")
        self.steps: list[Sections] = []
        self.activity = Activity(self.layers) if self.foresees else None

    def take_step(self, step: Ternary) -> np.ndarray:
        """Move the model by a step, and keep it for those who are not here.

        Parameters
        ----------
        step : Ternary
            The step.

        Returns
        -------
        numpy.ndarray
            int64 ``(k,)``, the coordinates that changed.
        """
        np.add.at(self.weights.numpy(), step.positions, step.values())
        self._remember(step)
        if self.activity is not None:
            self.activity.note(step.positions)
        return step.positions

    def abandon_exchange(self) -> None:
        """Remember a step that leads nowhere: steps are counted by exchanges."""
        self._remember(NOWHERE)

    def _remember(self, step: Ternary) -> None:
        coded = Sections()
        write_ternary(coded, step, self.dimension, self.activity)
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

    def write_model(self, writer: Writer) -> None:
        """Write the model, and what there is to know of where it has moved."""
        super().write_model(writer)
        if self.activity is not None:
            writer.vector(self.activity.counts, Part.POSITIONS)

    def method_state(self) -> dict[str, Any]:
        """Return the last steps, and where the model has moved."""
        codes = b"".join(step.code() for step in self.steps)
        state = {
            "steps": torch.from_numpy(np.frombuffer(codes, np.uint8).copy()),
            "step_sizes": [dict(step.sizes) for step in self.steps],
        }
        if self.activity is not None:
            state["activity"] = torch.from_numpy(self.activity.counts)
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        if self.activity is not None:
            self.activity = Activity(self.layers, state["activity"].numpy())
        codes, self.steps = state["steps"].numpy().tobytes(), []
        for saved in state["step_sizes"]:
            sizes = Sizes({Part(part): size for part, size in saved.items()})
            code, codes = codes[: sizes.total()], codes[sizes.total() :]
            if min(sizes.values(), default=0) < 0 or len(code) != sizes.total():
                raise ValueError(f"a step of {saved} bytes")
            self.steps.append(Sections(code, sizes))


# pylint: disable-next=abstract-method  # which its kinds fill in
class TernaryStrategy(SteppingStrategy[Ternary]):
    """A server whose clients' updates are ternary, too, and which keeps what is due.

    A method says by `upload_share` how much of the model an update may name.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`.

    Attributes
    ----------
    residual : numpy.ndarray
        float32 ``(d,)``, what clients have sent and the model has not moved by.
    update_sum : ScatteredSum
        The weighted sum of the exchange's updates.

    Raises
    ------
    ConfigError
        As of :class:`SteppingStrategy`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.residual = np.zeros(self.dimension, np.float32)
        self.update_sum = ScatteredSum(self.dimension)
        self.sent = 0

    def reset_sums(self) -> None:
        """Start the sum afresh."""
        self.update_sum.reset()
        self.sent = 0

    @property
    @abstractmethod
    def upload_share(self) -> float:
        """Return the share of all coordinates that a client's update may have."""

    def read_upload(self, reader: Reader) -> Ternary:
        """Take one client's ternary update.

        Raises
        ------
        WireError
            It has more values than it may: an update of the same length would move the
            model further by them.
        """
        most = share(self.upload_share, self.dimension)
        upload = read_ternary(reader, self.dimension, self.activity, most)
        self.measure(upload.values())
        return upload

    def add_upload(self, upload: Ternary, weight: float) -> None:
        """Add one client's update."""
        self.update_sum.add(upload.positions, upload.scaled(weight).values())
        self.sent += upload.signs.size

    def compressed_mean(self, total_weight: float, keep: float) -> Ternary:
        """Compress the clients' mean update with what is due; the rest stays due.

        Parameters
        ----------
        total_weight : float
            Sum of the clients' weights.
        keep : float
            The share of coordinates to take, see :func:`ternarise`.

        Returns
        -------
        Ternary
            What was taken out of `residual`.
        """
        for span, update in self.update_sum.blocks():
            update /= np.float32(total_weight)
            self.residual[span] += update
        taken = ternarise(self.residual, keep)
        np.subtract.at(self.residual, taken.positions, taken.values())
        return taken

    def metrics(self) -> dict[str, float]:
        """Return the share of coordinates that a client sent."""
        return {"sent_fraction": self.sent / (self.answers * self.dimension)}

    def method_state(self) -> dict[str, Any]:
        """Return what is due, and the last steps."""
        return {"residual": torch.from_numpy(self.residual), **super().method_state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`method_state` returned."""
        self.residual = state.pop("residual").numpy()
        super().load_method_state(state)


# ---- the client's half --------------------------------------------------------------


# pylint: disable-next=abstract-method  # which its kinds fill in
class SteppingClient(SyncClient):
    """A client that follows ternary steps.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`.
    """

    foresees = False

    def activity(self, state: ClientState) -> Activity | None:
        """Return what this client knows of where the model has moved.

        Raises
        ------
        LostState
            It is not in the state of a client that has followed the model.
        """
        if not self.foresees:
            return None
        counts = state.arrays.get("activity")
        if counts is None and state.version:
            raise LostState(-1)
        try:
            return Activity(self.layers, counts)
        except WireError:
            raise LostState(-1) from None

    def read_model(self, reader: Reader, state: ClientState) -> FloatVector:
        """Take the model, and what there is to know of where it has moved."""
        weights = super().read_model(reader, state)
        if self.foresees:
            size = Activity(self.layers).counts.size
            counts = reader.vector(size, np.int32, Part.POSITIONS)
            state.arrays["activity"] = Activity(self.layers, counts).counts
        return weights

    def read_change(
        self, reader: Reader, weights: FloatVector, state: ClientState
    ) -> None:
        """Take the steps that this client has missed, in their order, to the bit."""
        activity = self.activity(state)
        for version in range(reader.header.base, reader.header.exchange - 1):
            # The server may not know that some of them had arrived before.
            if version < state.version:
                _skip_ternary(reader, weights.size, CLASSES if self.foresees else 1)
                continue
            step = read_ternary(reader, weights.size, activity)
            np.add.at(weights, step.positions, step.values())
            if activity is not None:
                activity.note(step.positions)
        if activity is not None:
            state.arrays["activity"] = activity.counts


# pylint: disable-next=abstract-method  # which its kinds fill in
class TernaryClient(SteppingClient):
    """A client that follows ternary steps, and answers with a ternary update.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`.
    """

    def write_largest(
        self, writer: Writer, state: ClientState, residual: FloatVector, keep: float
    ) -> None:
        """Send the largest of what has accumulated; what that misses stays.

        Parameters
        ----------
        writer : Writer
            The answer's payload.
        state : ClientState
            Notes what is sent.
        residual : numpy.ndarray
            float32 ``(d,)``, what has accumulated.
        keep : float
            The share of coordinates to send, see :func:`ternarise`.
        """
        update = ternarise(residual, keep)
        write_ternary(writer, update, residual.size, self.activity(state))
        left_out = residual[update.positions] - update.values()
        self.note_sent(state, marked(update.positions, residual.size), left_out)
