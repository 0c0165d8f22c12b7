"""Saved states, of the server and of clients: tensors and plain values in one file."""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gwpf_baseline.exchange.payload import as_tensor, is_finite, vector_checksum
from gwpf_baseline.utils import ConfigError, FloatVector

# What a file that is none of ours makes its readers raise.
_UNREADABLE = (
    SafetensorError,
    OSError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,
    AttributeError,
)
_SERVER = "server.safetensors"
_NAME = re.compile(r"round-([0-9]{6,20})-[0-9a-f]{8}")


class StateError(ValueError):
    """A saved state that is none of this run's."""


def checkpoint_name(server_round: int, weights: FloatVector) -> str:
    """Return the name of a checkpoint.

    Parameters
    ----------
    server_round : int
        The round that it is of.
    weights : numpy.ndarray
        float32 ``(d,)``, the global model of then: a client's part is only good for
        the server's if both are of one run, and of the same try at a round.

    Returns
    -------
    str
        ``round-``, the round's number, ``-`` and the CRC-32 of the weights.
    """
    return f"round-{server_round:06d}-{vector_checksum(weights):08x}"


def is_checkpoint_name(name: object) -> bool:
    """Tell whether a value is one that :func:`checkpoint_name` may have returned."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def round_of(checkpoint: str) -> int:
    """Return the round that a checkpoint is of, by its name."""
    match = _NAME.fullmatch(checkpoint)
    assert match is not None
    return int(match[1])


class CheckpointFolder:
    """The checkpoints of a run, the newest complete one of which counts.

    Clients write their states first and the server last, each by renaming a finished
    file, so a checkpoint that holds the server's file is whole. Older ones are removed
    only then: a kill at any moment leaves one to go on from. Clients may have disks of
    their own, and then know only by the server which checkpoint is whole: it tells
    them its :func:`checkpoint_name`.

    Parameters
    ----------
    run : pathlib.Path or str
        The run's folder.
    """

    def __init__(self, run: Path | str) -> None:
        self.path = Path(run) / "checkpoints"

    def client_file(self, checkpoint: str, client: int) -> Path:
        """Return where a client's state of a checkpoint belongs."""
        return self.path / checkpoint / f"client-{client}.safetensors"

    def commit(self, checkpoint: str, state: Mapping[str, Any]) -> None:
        """Write the server's state, which completes a checkpoint.

        Parameters
        ----------
        checkpoint : str
            Its name.
        state : mapping of str to object
            Tensors, and values that JSON holds.
        """
        save_state(self.path / checkpoint / _SERVER, state)
        self.clear(keep=checkpoint)

    def clear(self, keep: str | None = None) -> None:
        """Remove all checkpoints but one, whole or not; other files are let alone."""
        for folder in self._folders():
            if folder.name != keep:
                shutil.rmtree(folder, ignore_errors=True)

    def rounds(self) -> list[int]:
        """Return the rounds of the complete checkpoints."""
        return [round_of(name) for name in self._complete()]

    def latest(self) -> str:
        """Return the name of the newest complete checkpoint.

        Raises
        ------
        ConfigError
            There is none.
        """
        complete = self._complete()
        if not complete:
            raise ConfigError(
                "resume",
                self.path.parent,
                "the folder of a run that wrote a checkpoint (checkpoint_every=N)",
            )
        return max(complete, key=round_of)

    def server_state(self) -> dict[str, Any]:
        """Return the server's state of the newest complete checkpoint."""
        return load_state(self.path / self.latest() / _SERVER)

    def client_state(self, checkpoint: str, client: int) -> dict[str, Any] | None:
        """Return a client's state of a checkpoint, if it had one."""
        file = self.client_file(checkpoint, client)
        # The server's folder may be another user's, where a node has one of its own.
        with suppress(PermissionError):
            return load_state(file) if file.exists() else None
        return None

    def prune(self, client: int, keep: Collection[str]) -> None:
        """Remove a client's files of all checkpoints but a few.

        Parameters
        ----------
        client : int
            Its partition id.
        keep : collection of str
            The names of those whose files stay.
        """
        kept = {self.client_file(name, client) for name in keep}
        for file in self.path.glob(f"round-*/client-{client}.safetensors"):
            if file not in kept:
                file.unlink(missing_ok=True)
                # Where the client has a disk of its own, nobody else does.
                with suppress(OSError):
                    file.parent.rmdir()

    def _folders(self) -> list[Path]:
        """Return what is there of checkpoints, whole or not."""
        return [path for path in self.path.glob("*") if is_checkpoint_name(path.name)]

    def _complete(self) -> list[str]:
        return [path.name for path in self._folders() if (path / _SERVER).exists()]


def as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """View arrays as the tensors that a checkpoint holds."""
    return {name: as_tensor(array) for name, array in arrays.items()}


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """View a checkpoint's tensors as arrays."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Write a state so that the file is either whole or absent.

    Parameters
    ----------
    file : pathlib.Path
        Where to.
    state : mapping of str to object
        Tensors, and values that JSON holds.

    Raises
    ------
    OSError
        It cannot be written.
    """
    tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
    values = {k: v for k, v in state.items() if k not in tensors}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {"values": json.dumps(values)})


def write_tensors(
    file: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file that is either whole or absent.

    Parameters
    ----------
    file : pathlib.Path
        Where to; its folder is there.
    tensors : mapping of str to torch.Tensor
        Its tensors.
    metadata : dict of str to str, optional
        What else it says.

    Raises
    ------
    OSError
        It cannot be written.
    """
    part = file.with_suffix(f".{os.getpid()}.part")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, part, metadata=metadata)
        os.replace(part, file)
    except SafetensorError as error:  # what a full disk is to it
        raise OSError(errno.EIO, str(error), str(part)) from error
    finally:
        part.unlink(missing_ok=True)


def load_state(file: Path) -> dict[str, Any]:
    """Read a state that :func:`save_state` wrote.

    Parameters
    ----------
    file : pathlib.Path
        Where from.

    Returns
    -------
    dict of str to object
        The state, its tensors on the CPU.

    Raises
    ------
    ConfigError
        The file is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            state: Any = json.loads(opened.metadata()["values"])
            if not isinstance(state, dict):
                raise ValueError("no values")
            state |= {key: opened.get_tensor(key) for key in opened.keys()}
    except _UNREADABLE as error:
        raise ConfigError("resume", file, f"a readable checkpoint ({error})") from error
    return state


def check_like(state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Check that a state which was read has the form of one that could be written.

    Parameters
    ----------
    state : mapping of str to object
        What was read.
    like : mapping of str to object
        A state of the same run: of the same keys; tensors of the same types and
        shapes, but for bytes, which may be more or fewer; values of the same types.

    Raises
    ------
    StateError
        It has not, or holds a number that is not finite or below 0.
    """
    if state.keys() != like.keys():
        key = min(state.keys() ^ like.keys())
        raise StateError(f"{key} is {'not known' if key in state else 'missing'}")
    for key, wanted in like.items():
        value = state[key]
        if not torch.is_tensor(wanted):
            if type(value) is not type(wanted):
                raise StateError(f"{key} is {type(value).__name__}")
            if isinstance(value, int) and value < 0:
                raise StateError(f"{key} is {value}")
            continue
        if not torch.is_tensor(value) or value.dtype != wanted.dtype:
            raise StateError(f"{key} is not of type {wanted.dtype}")
        if value.shape != wanted.shape and wanted.dtype != torch.uint8:
            raise StateError(
                f"{key} has the shape {tuple(value.shape)}, not {tuple(wanted.shape)}"
            )
        if not is_finite(value.numpy()):
            raise StateError(f"{key} is not finite")
