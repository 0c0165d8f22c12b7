"""What a client remembers from one message to the next.

It lives in Flower's ``Context.state`` and nowhere else, so it does not matter which
process runs the client next.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.common import Array, ArrayRecord, ConfigRecord, Context

_ARRAYS = "gwpf_baseline.arrays"
_VALUES = "gwpf_baseline.values"


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
        ``weights`` float32 ``(d,)``, the global model as it knows it; ``sent`` bool
        ``(d,)``, the coordinates of its last upload, and ``left_out`` float32 ``(k,)``,
        what rounding left out of them; ``residual`` float32 ``(d,)``, what it learned
        and the server has not used; ``moment.*``, the optimiser's state. Each only
        where it is needed.
    """

    version: int = 0
    uploaded: int = 0
    cursor: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def load(cls, context: Context) -> "ClientState | None":
        """Read the state from a Flower context, None if it holds none."""
        if _VALUES not in context.state.config_records:
            return None
        values: dict[str, Any] = dict(context.state.config_records[_VALUES])
        arrays = {
            # Flower's arrays are read-only views of bytes; the state is worked on.
            name: array.numpy().copy()
            for name, array in context.state.array_records[_ARRAYS].items()
        }
        return cls(**values, arrays=arrays)

    def save(self, context: Context) -> None:
        """Write the state into a Flower context."""
        context.state.config_records[_VALUES] = ConfigRecord(self.values())
        context.state.array_records[_ARRAYS] = ArrayRecord(
            {name: Array(value) for name, value in self.arrays.items()}
        )

    def values(self) -> dict[str, Any]:
        """Return the counters."""
        return {
            "version": self.version,
            "uploaded": self.uploaded,
            "cursor": self.cursor,
        }

    @property
    def moments(self) -> dict[str, np.ndarray]:
        """Return the optimiser's state."""
        prefix = "moment."
        return {
            name.removeprefix(prefix): value
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }
