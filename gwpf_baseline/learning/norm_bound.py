"""How far one client's update may move the model: not much further than the others'.

Norm bounding: Sun, Kairouz, Suresh, McMahan: Can You Really Backdoor Federated
Learning? 2019, section 5. The bound is not a constant but a multiple of the median norm
of the exchange's own updates, which follows the training and which fewer than half of
the clients cannot move. What is beyond it is not cut but left out: the bound can be so
far out that honest clients hardly ever meet it, and who is beyond gains nothing by it.
"""

import math
from collections.abc import Sequence

import numpy as np

from gwpf_baseline.exchange.coding import WireError
from gwpf_baseline.utils import ConfigError, FloatVector, is_number

#: No update is that long. Sums and squares of what is shorter stay finite in float32.
LONGEST = 1e15
# From so many norms on, an exchange's own median is one; below, those before count too.
_FEW = 3
_REMEMBERED = 10
# Values whose squares are added up in float32 before the sums are added in float64.
_ROW = 1024


def check_multiple(multiple: object) -> None:
    """Check a bound as it was configured.

    Parameters
    ----------
    multiple : object
        Of the median norm: a number of at least 1, or None for no bound.

    Raises
    ------
    ConfigError
        It is something else.
    """
    number = is_number(multiple) and 1 <= multiple < math.inf
    if multiple is not None and not number:
        raise ConfigError("norm_bound", multiple, "a number >= 1, or null for no bound")


def norm(values: FloatVector) -> float:
    """Return a vector's Euclidean norm, infinite where its squares overflow.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(k,)``.

    Returns
    -------
    float
        The norm.
    """
    whole = values.size - values.size % _ROW
    rows = values[:whole].reshape(-1, _ROW)
    # Unlike a product by BLAS, the same to the bit with any number of threads.
    with np.errstate(over="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64)
        squares += np.einsum("i,i->", values[whole:], values[whole:])
    return math.sqrt(squares)


class NormBound:
    """The bound on the norms of an exchange's updates.

    Parameters
    ----------
    multiple : float or None
        Of the median norm, at least 1; None for no bound.

    Attributes
    ----------
    length : float
        The norm of the update that was measured last.
    recent : list of float
        The last norms, for exchanges of too few clients to have a median.
    """

    def __init__(self, multiple: float | None) -> None:
        self.multiple = multiple
        self.length = 0.0
        self.recent: list[float] = []

    def restore(self, recent: list[float]) -> None:
        """Take back the last norms, as a checkpoint has them.

        Raises
        ------
        ValueError
            They are no norms.
        """
        if not all(isinstance(each, float) and 0 < each < math.inf for each in recent):
            raise ValueError(f"norms {recent}")
        self.recent = recent[-_REMEMBERED:]

    def measure(self, values: FloatVector, origin: FloatVector | None = None) -> None:
        """Measure an update.

        Parameters
        ----------
        values : numpy.ndarray
            float32 ``(k,)``.
        origin : numpy.ndarray, optional
            float32 ``(k,)``, the values that would not move the model; default: zeros.

        Raises
        ------
        WireError
            Longer than `LONGEST`.
        """
        with np.errstate(over="ignore"):
            self.length = norm(values if origin is None else values - origin)
        if self.length > LONGEST:
            raise WireError(
                f"an update of norm {self.length:.3g}: none is longer than {LONGEST:g}"
            )

    def longest(self, lengths: Sequence[float], remember: bool = True) -> float:
        """Return how long an exchange's updates may be, and remember its norms.

        Parameters
        ----------
        lengths : sequence of float
            The norms of all of them.
        remember : bool, default True
            Whether those to come are of the same kind.

        Returns
        -------
        float
            The multiple of their median; infinite without a bound.
        """
        # Who has nothing to send says nothing about how long an update is.
        norms = [length for length in lengths if length > 0]
        known = norms if len(norms) >= _FEW else self.recent + norms
        if self.multiple is None or not known:
            return math.inf
        # Of an even number the lower one: of two, the longer may be the liar's.
        bound = self.multiple * sorted(known)[(len(known) - 1) // 2]
        if remember:
            # Who is beyond counts as well, and as far: a first liar's scale, however
            # small, would else shut out all others.
            self.recent += norms
            self.recent = self.recent[-_REMEMBERED:]
        return bound
