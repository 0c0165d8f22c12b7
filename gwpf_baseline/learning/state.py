"""What a client remembers from one message to the next.

It lives in Flower's ``Context.state`` and nowhere else, so it does not matter which
process runs the client next.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.common import Array, ArrayRecord, ConfigRecord, Context

from gwpf_baseline.exchange.payload import is_finite
from gwpf_baseline.records.checkpoint import (
    StateError,
    as_arrays,
    as_tensors,
    check_like,
)

_ARRAYS = "gwpf_baseline.arrays"
_VALUES = "gwpf_baseline.values"
# How arrays are written: their memory as it is. Flower's own way, numpy.save, would
# copy it twice more in either direction.
_AS_IT_IS = "gwpf_baseline.memory"
# Arrays of one value for each parameter.
_VECTORS = ("weights", "residual", "last_global")
# What an array holds, by its name up to the dot; None: whoever keeps it will look.
_TYPES = {
    **dict.fromkeys((*_VECTORS, "left_out", "moment"), np.dtype(np.float32)),
    "sent": np.dtype(np.uint8),
    "activity": np.dtype(np.int32),
    "schedule": None,
}


@dataclass
class ClientState:
    """All that a client keeps between rounds.

    Parameters
    ----------
    version : int, default 0
        The model version it holds, an exchange's number; 0 is the initial model.
    uploaded : int, default 0
        The exchange of its last upload.
    cursor : int, default 0
        Samples drawn so far.
    arrays : dict of str to numpy.ndarray
        ``weights`` float32 ``(d,)``, the global model as it knows it; ``sent`` uint8
        ``(ceil(d / 8),)``, the coordinates of its last upload, a bit each, and
        ``left_out`` float32 ``(k,)``, what rounding left out of them; ``residual``
        float32 ``(d,)``, what it learned and the server has not used; ``activity``
        int32 ``(m,)``, how often the model's rows and columns have moved;
        ``last_global`` float32 ``(d,)``, how the model has moved last; ``moment.*``,
        float32, the optimiser's state; ``schedule.*``, that of when coordinates are
        frozen. Each only where it is needed. Those that were loaded are read-only: see
        :meth:`own`.
    """

    version: int = 0
    uploaded: int = 0
    cursor: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    _loaded: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, context: Context) -> "ClientState | None":
        """Read the state from a Flower context, None if it holds none."""
        if _VALUES not in context.state.config_records:
            return None
        values: dict[str, Any] = dict(context.state.config_records[_VALUES])
        arrays = {
            name: np.frombuffer(array.data, array.dtype).reshape(array.shape)
            for name, array in context.state.array_records[_ARRAYS].items()
        }
        return cls(**values, arrays=arrays, _loaded=dict(arrays))

    def save(self, context: Context) -> None:
        """Write the state into the Flower context that it is of.

        What is as it was loaded is not copied.
        """
        records = context.state.array_records
        before = records[_ARRAYS] if _ARRAYS in records else ArrayRecord()
        context.state.config_records[_VALUES] = ConfigRecord(self.values())
        records[_ARRAYS] = ArrayRecord(
            {
                name: before[name] if value is self._loaded.get(name) else _array(value)
                for name, value in self.arrays.items()
            }
        )

    def own(self, name: str) -> np.ndarray:
        """Return an array to be changed in place: of what was loaded, a copy.

        Parameters
        ----------
        name : str
            One of `arrays`.

        Returns
        -------
        numpy.ndarray
            The array, which is the state's from now on.
        """
        if self.arrays[name] is self._loaded.pop(name, None):
            self.arrays[name] = self.arrays[name].copy()
        return self.arrays[name]

    def values(self) -> dict[str, Any]:
        """Return the counters."""
        return {
            "version": self.version,
            "uploaded": self.uploaded,
            "cursor": self.cursor,
        }

    @classmethod
    def restore(
        cls, saved: dict[str, Any], client: int, dimension: int
    ) -> "ClientState":
        """Take the state out of a file's content.

        Parameters
        ----------
        saved : dict of str to object
            Tensors and values, as :meth:`to_save` gave them.
        client : int
            The partition id of the client.
        dimension : int
            d.

        Returns
        -------
        ClientState
            The state.

        Raises
        ------
        StateError
            It is another client's, or none.
        """
        try:
            arrays = as_arrays({k: v for k, v in saved.items() if torch.is_tensor(v)})
        except TypeError as error:  # a type that NumPy does not have
            raise StateError(str(error)) from error
        values = {k: v for k, v in saved.items() if k not in arrays}
        if values.pop("client", None) != client:
            raise StateError(f"it is not client {client}'s")
        check_like(values, cls().values())
        for name, array in arrays.items():
            _check(name, array, dimension)
        return cls(**values, arrays=arrays)

    def to_save(self, client: int) -> dict[str, Any]:
        """Return the tensors and values of a file, for :meth:`restore`."""
        return {**as_tensors(self.arrays), **self.values(), "client": client}

    @property
    def moments(self) -> dict[str, np.ndarray]:
        """Return the optimiser's state."""
        prefix = "moment."
        return {
            name.removeprefix(prefix): value
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }


def _check(name: str, array: np.ndarray, dimension: int) -> None:
    """Raise StateError unless an array is what one of its name can be."""
    group = name.split(".")[0]
    if group not in _TYPES:
        raise StateError(f"{name} is not known")
    wanted = _TYPES[group]
    if wanted is not None and array.dtype != wanted:
        raise StateError(f"{name} is not of type {wanted}")
    whole = {**dict.fromkeys(_VECTORS, dimension), "sent": -(-dimension // 8)}
    if group == "moment" and array.shape:
        whole[name] = dimension
    # A matrix has at most one row and column more than values.
    size = whole.get(name, 2 * dimension if name == "activity" else dimension)
    if array.size > size or (name in whole and array.shape != (size,)):
        raise StateError(f"{name} has {array.size} values, not {size}")
    if not is_finite(array):
        raise StateError(f"{name} is not finite")


def _array(value: np.ndarray) -> Array:
    return Array(str(value.dtype), value.shape, _AS_IT_IS, value.tobytes())
