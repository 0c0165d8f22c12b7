"""Which single parameters have stabilised: effective perturbation.

Chen, Xu, Wang, Li, Li, Chen, Zhang: Communication-Efficient Federated Learning with
Adaptive Parameter Freezing. ICDCS 2021, section IV. GWPF freezes by the same measure.
"""

import numpy as np

from gwpf_baseline.utils import BoolVector, FloatVector

# The stable share beyond which the threshold is halved (APF, section IV).
TIGHTEN_SHARE = 0.8


class Stability:
    """The moving averages of each coordinate's update, and the threshold on them.

    Every operation is a correctly rounded one on single coordinates, without fused
    multiplications, so that server and clients that see the same updates come to the
    same bits on any processor.

    Parameters
    ----------
    dimension : int
        d, the number of coordinates that are watched.
    ema : float
        alpha, the factor of the moving averages, in ``[0, 1)``.
    threshold : float
        T, below which the effective perturbation is stable.
    floor : float, default 0.0
        :meth:`tighten` never takes the threshold below it.

    Attributes
    ----------
    ema, ema_abs : numpy.ndarray
        float32 ``(d,)``, E and A: the averages of the update and of its magnitude.
    threshold : float
        T now.
    above : bool
        Whether the stable share was beyond `TIGHTEN_SHARE` last time.
    """

    def __init__(
        self, dimension: int, ema: float, threshold: float, floor: float = 0.0
    ) -> None:
        self.ema = np.zeros(dimension, np.float32)
        self.ema_abs = np.zeros(dimension, np.float32)
        self.threshold = threshold
        self.above = False
        self._keep = np.float32(ema)
        self._rate = np.float32(1.0 - ema)
        self._floor = min(floor, threshold)

    def observe(self, index: np.ndarray, update: FloatVector) -> BoolVector:
        """Move E and A on at some coordinates, and tell which of them are stable.

        Parameters
        ----------
        index : numpy.ndarray
            int64 ``(k,)``, the coordinates; best a block of ``cache_blocks``.
        update : numpy.ndarray
            float32 ``(k,)``, their updates.

        Returns
        -------
        numpy.ndarray
            bool ``(k,)``.
        """
        ema = self._move(self.ema, index, update)
        ema_abs = self._move(self.ema_abs, index, np.abs(update))
        return is_stable(ema, ema_abs, self.threshold)

    def tighten(self, stable_share: float) -> None:
        """Halve the threshold once each time the stable share rises past the mark.

        Parameters
        ----------
        stable_share : float
            In ``[0, 1]``.
        """
        above = stable_share > TIGHTEN_SHARE
        if above and not self.above:
            self.threshold = max(self.threshold / 2, self._floor)
        self.above = above

    def state(self) -> dict[str, np.ndarray]:
        """Return all that it remembers."""
        return {
            "ema": self.ema,
            "ema_abs": self.ema_abs,
            "threshold": np.array(self.threshold),
            "above": np.array(self.above),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what :meth:`state` returned."""
        self.ema, self.ema_abs = state["ema"], state["ema_abs"]
        self.threshold, self.above = float(state["threshold"]), bool(state["above"])

    def _move(
        self, average: FloatVector, index: np.ndarray, value: FloatVector
    ) -> FloatVector:
        moved: FloatVector = average.take(index)
        moved *= self._keep
        moved += self._rate * value
        average[index] = moved
        return moved


def is_stable(ema: FloatVector, ema_abs: FloatVector, threshold: float) -> BoolVector:
    """Tell which coordinates' updates have become insignificant.

    Parameters
    ----------
    ema, ema_abs : numpy.ndarray
        float32 ``(k,)``, E and A.
    threshold : float
        T.

    Returns
    -------
    numpy.ndarray
        bool ``(k,)``: ``|E| / A < T``. Where A is 0 there is no update at all, which
        is stable too; the product form never divides by it.
    """
    return (np.abs(ema) < np.float32(threshold) * ema_abs) | (ema_abs == 0)
