"""What a client remembers from one message to the next, and where.

Clients are built anew for each message, so it does not matter which process runs one
next.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gwpf_baseline.exchange.payload import is_finite
from gwpf_baseline.records.checkpoint import (
    StateError,
    as_arrays,
    as_tensors,
    check_like,
    load_state,
    save_state,
)
from gwpf_baseline.utils import ConfigError

log = logging.getLogger(__name__)

# Where, in a run's folder.
STATE_FOLDER = "state"
# Arrays of one value for each parameter.
_VECTORS = ("weights", "residual", "last_global")
# What an array holds, by its name up to the dot. Of others, whoever keeps it will look.
_TYPES = {
    **dict.fromkeys((*_VECTORS, "left_out", "moment"), np.dtype(np.float32)),
    "sent": np.dtype(np.uint8),
    "activity": np.dtype(np.int32),
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
        frozen. Each only where it is needed. One that was kept may be read-only: see
        :meth:`own`.
    """

    version: int = 0
    uploaded: int = 0
    cursor: int = 0
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def own(self, name: str) -> np.ndarray:
        """Return an array to be changed in place: of one that is kept, a copy.

        Parameters
        ----------
        name : str
            One of `arrays`.

        Returns
        -------
        numpy.ndarray
            The array, which is the state's from now on.
        """
        if not self.arrays[name].flags.writeable:
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


class StateStore(Protocol):
    """Where what a client keeps outlives the client."""

    def load(self) -> ClientState | None:
        """Return what was saved last, for whoever asks to change; None if nothing."""

    def save(self, state: ClientState) -> None:
        """Keep a state, whose arrays nobody changes from now on."""


class InMemory:
    """What a simulated client keeps: the arrays as they are, and read-only."""

    def __init__(self) -> None:
        self._kept: ClientState | None = None

    def load(self) -> ClientState | None:
        """Return what was saved last; its arrays are not copied."""
        if self._kept is None:
            return None
        for array in self._kept.arrays.values():
            array.flags.writeable = False
        return replace(self._kept, arrays=dict(self._kept.arrays))

    def save(self, state: ClientState) -> None:
        """Keep a state; its arrays are not copied."""
        self._kept = state


class OnDisk:
    """What a node's client keeps, in a file of its own.

    Flower's context, which is for this, goes to the SuperNode after the answer, within
    five seconds or not at all: a large model's state gets lost. It is also gone once
    the SuperNode ends.

    Parameters
    ----------
    folder : pathlib.Path or str
        The run's, on the node's disk.
    client : int
        The client's partition id.
    dimension : int
        d.
    """

    def __init__(self, folder: Path | str, client: int, dimension: int) -> None:
        self.file = Path(folder, STATE_FOLDER, f"client-{client}.safetensors")
        self.client = client
        self.dimension = dimension

    def load(self) -> ClientState | None:
        """Return what was saved last; of a file that is damaged, nothing."""
        try:
            if not self.file.exists():
                return None
            saved = load_state(self.file)
            return ClientState.restore(saved, self.client, self.dimension)
        except (ConfigError, StateError, OSError) as error:
            log.warning("%s is lost: %s", self.file, error)
            return None

    def save(self, state: ClientState) -> None:
        """Write a state, so that the file is always a whole one.

        Raises
        ------
        ConfigError
            It cannot be written.
        """
        try:
            save_state(self.file, state.to_save(self.client))
        except OSError as error:
            allowed = f"a folder on the node's disk to write to ({error})"
            folder = self.file.parent
            raise ConfigError("GWPF_OUTPUTS", folder, allowed) from error


def _check(name: str, array: np.ndarray, dimension: int) -> None:
    """Raise StateError unless an array is what one of its name can be."""
    if not is_finite(array):
        raise StateError(f"{name} is not finite")
    group = name.split(".")[0]
    wanted = _TYPES.get(group)
    if wanted is None:
        return
    if array.dtype != wanted:
        raise StateError(f"{name} is not of type {wanted}")
    whole = {**dict.fromkeys(_VECTORS, dimension), "sent": -(-dimension // 8)}
    if group == "moment" and array.shape:
        whole[name] = dimension
    # A matrix has at most one row and column more than values.
    size = whole.get(name, 2 * dimension if name == "activity" else dimension)
    if array.size > size or (name in whole and array.shape != (size,)):
        raise StateError(f"{name} has {array.size} values, not {size}")
