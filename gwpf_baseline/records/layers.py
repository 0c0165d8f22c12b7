"""How each layer of the global model develops: ``layers.csv``.

After the figures of two papers. Which share of a layer is not zero: ZeroFL (Qiu et al.,
ICLR 2022), figure 1. How far a layer's updates counteract each other, which share of it
has come to rest, and the way of one parameter: APF (Chen et al., ICDCS 2021), equation
2, figures 1, 2, 3 and 7.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gwpf_baseline.records.history import LARGEST
from gwpf_baseline.utils import FloatVector, is_name

LAYERS_FILE = "layers.csv"
#: The effective perturbation below which APF calls a parameter stable.
STABLE = 0.01


class LayerRecord(NamedTuple):
    """A layer at the end of a window, with the columns of ``layers.csv``.

    Parameters
    ----------
    round : int
        The window's last round.
    layer : str
        The parameter tensor's name.
    parameters : int
        How many it has.
    nonzero : float
        The share of them that is not zero.
    perturbation : float
        Their mean effective perturbation in the window: how far one came, divided by
        how far it went. 0 where it did not move.
    stabilised : float
        The share of them for which that has been below `STABLE` in some window.
    value : float
        The value of the one in the middle of the tensor.
    """

    round: int
    layer: str
    parameters: int
    nonzero: float
    perturbation: float
    stabilised: float
    value: float


class LayerWatch:
    """Follows the global model through windows of rounds.

    Parameters
    ----------
    weights : numpy.ndarray
        float32 ``(d,)``, the model before the first round.
    spans : dict of str to slice
        Where each layer stands in it.
    """

    def __init__(self, weights: FloatVector, spans: dict[str, slice]) -> None:
        self.spans = spans
        self.start, self.last = weights.copy(), weights.copy()
        self.path = np.zeros_like(weights)
        self.stable = np.zeros(weights.size, np.bool_)

    def see(self, weights: FloatVector) -> None:
        """Add a round's update to the window.

        Parameters
        ----------
        weights : numpy.ndarray
            float32 ``(d,)``, the model after the round.
        """
        self.path += np.abs(weights - self.last)
        self.last[:] = weights

    def close(self, number: int) -> list[LayerRecord]:
        """End the window, and return what became of each layer in it.

        Parameters
        ----------
        number : int
            The round.

        Returns
        -------
        list of LayerRecord
            One for each layer, in their order.
        """
        came = np.abs(self.last - self.start)
        perturbation = np.zeros_like(came)
        np.divide(came, self.path, out=perturbation, where=self.path > 0)
        self.stable |= perturbation < STABLE
        self.start[:] = self.last
        self.path.fill(0)
        return [
            LayerRecord(
                number,
                name,
                span.stop - span.start,
                np.count_nonzero(self.last[span]) / (span.stop - span.start),
                float(perturbation[span].mean(dtype=np.float64)),
                float(self.stable[span].mean()),
                float(self.last[(span.start + span.stop) // 2]),
            )
            for name, span in self.spans.items()
        ]


def append_layers(folder: Path, records: Sequence[LayerRecord], new: bool) -> None:
    """Write records behind those that are there.

    Parameters
    ----------
    folder : pathlib.Path
        The run's folder.
    records : sequence of LayerRecord
        The records.
    new : bool
        Whether they are the run's first, and take the place of any other's.
    """
    with open(folder / LAYERS_FILE, "w" if new else "a", encoding="utf-8") as file:
        if new:
            file.write(",".join(LayerRecord._fields) + "\n")
        file.writelines(",".join(map(str, record)) + "\n" for record in records)


def read_layers(file: Path) -> list[LayerRecord]:
    """Read what :func:`append_layers` wrote.

    Parameters
    ----------
    file : pathlib.Path
        A ``layers.csv``.

    Returns
    -------
    list of LayerRecord
        In the order in which they were written; none if there is no such file.

    Raises
    ------
    ValueError
        A damaged file.
    """
    if not file.is_file():
        return []
    first, *lines, rest = file.read_text(encoding="utf-8").split("\n")
    if first != ",".join(LayerRecord._fields):
        raise ValueError("the columns are not those of layers")
    if rest:
        raise ValueError("its last line has no end")
    records = []
    for number, line in enumerate(lines, start=2):
        cells = line.split(",")
        if len(cells) != len(LayerRecord._fields):
            raise ValueError(f"line {number}: {len(cells)} values")
        values = [float(cell) for cell in cells[3:]]
        # No share is outside, and neither is the mean of a quotient of path lengths.
        if not all(0 <= share <= 1.001 for share in values[:-1]):
            raise ValueError(f"line {number}: a share that is none")
        # A NaN is not below.
        if not abs(values[-1]) < LARGEST:
            raise ValueError(f"line {number}: a value that is none")
        if not 0 < int(cells[0]) < LARGEST:
            raise ValueError(f"line {number}: a round that is none")
        if not is_name(cells[1]):
            raise ValueError(f"line {number}: a name that is none")
        records.append(LayerRecord(int(cells[0]), cells[1], int(cells[2]), *values))
    return records
