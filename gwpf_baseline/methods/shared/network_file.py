"""The file of a final network: a seed and a mask, which are all that FedPM leaves.

The coding is ours; ``docs/fedpm.md`` tells what it holds.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gwpf_baseline.exchange.coding import decode_bitmap, encode_bitmap
from gwpf_baseline.exchange.payload import vector_checksum
from gwpf_baseline.learning.flat_model import (
    buffers_to_vector,
    parameters_to_vector,
    vector_to_buffers,
)
from gwpf_baseline.methods.shared.masked_network import (
    LEVELS,
    MaskedConv2d,
    MaskedLinear,
    certain_scores,
    masked,
)
from gwpf_baseline.model import initial_model
from gwpf_baseline.utils import BoolVector, ConfigError

NETWORK_FILE = "network.mask"
# What a description looks like: zlib then stores little but the differences, which
# counts where a whole network takes some thousand bytes. A part of the format.
_EXAMPLE = (
    b'{"model":"conv4","input_shape":[3,32,32],"num_classes":10,"options":{"width":16},'
    b'"seed":0,"level":51,"bits":8,"checksum":'
)
# No description is longer; a hostile file could claim gigabytes.
_MOST_DESCRIPTION = 2**16


def pack_description(description: dict[str, Any]) -> bytes:
    """Write down what a network is made of, as short as can be.

    Parameters
    ----------
    description : dict
        What JSON can hold.

    Returns
    -------
    bytes
        A zlib stream, which knows its own end.
    """
    line = json.dumps(description, separators=(",", ":")).encode()
    packer = zlib.compressobj(9, zdict=_EXAMPLE)
    return packer.compress(line) + packer.flush()


def unpack_description(data: bytes) -> tuple[Any, bytes]:
    """Read what :func:`pack_description` has written.

    Parameters
    ----------
    data : bytes
        The file's.

    Returns
    -------
    tuple
        The description, and the bytes that follow it.

    Raises
    ------
    zlib.error, ValueError
        The bytes do not begin with a description.
    """
    unpacker = zlib.decompressobj(zdict=_EXAMPLE)
    line = unpacker.decompress(data, _MOST_DESCRIPTION)
    return json.loads(line), unpacker.unused_data


def save_network(
    file: Path,
    made: dict[str, Any],
    model: nn.Module,
    mask: BoolVector,
    buffers: torch.Tensor,
) -> None:
    """Write a network, for :func:`load_network`.

    Parameters
    ----------
    file : pathlib.Path
        Where to.
    made : dict
        What the model is built from and masked by: ``model``, ``input_shape``,
        ``num_classes``, ``options``, ``seed``, ``level`` and ``bits``, in this order.
    model : torch.nn.Module
        The masked model.
    mask : numpy.ndarray
        bool ``(d,)``, the weights that take part.
    buffers : torch.Tensor
        float32, the model's buffers.
    """
    description = pack_description({**made, "checksum": _checksum(model, mask)})
    values = buffers.numpy().astype("<f4").tobytes()
    file.write_bytes(description + encode_bitmap(mask) + values)


def load_network(file: Path | str) -> nn.Module:
    """Rebuild the network that a run has left behind.

    Parameters
    ----------
    file : pathlib.Path or str
        ``network.mask`` in the run's folder: a packed description with the seed
        of the weights' signs, the coded mask, and what buffers the model has.

    Returns
    -------
    torch.nn.Module
        The network in evaluation mode, on the CPU. It maps inputs that are normalised
        as the run's to the logits that the run measured.

    Raises
    ------
    ConfigError
        The file is missing or damaged, or another release draws other signs from the
        seed.
    """
    try:
        made, rest = unpack_description(Path(file).read_bytes())
        shape, seed = tuple(made["input_shape"]), made["seed"]
        name, options = made["model"], made["options"]
        if made["bits"] not in LEVELS:
            raise ValueError(f"probabilities of {made['bits']} bits")
        model = initial_model(name, shape, made["num_classes"], seed, **options)
        model = masked(model, made["level"], made["bits"], seed)
        mask, end = decode_bitmap(rest, 0, parameters_to_vector(model).numel())
        if len(rest) - end != 4 * buffers_to_vector(model).numel():
            raise ValueError(f"{len(rest)} bytes after its description")
        if _checksum(model, mask) != made["checksum"]:
            raise ValueError("other weights than were written")
    except (
        *(OSError, LookupError, TypeError, ValueError, RuntimeError),
        *(AttributeError, ArithmeticError, zlib.error),
    ) as error:
        raise ConfigError(
            "network", file, f"what FedPM has written ({error})"
        ) from error
    buffers = torch.from_numpy(np.frombuffer(rest, "<f4", offset=end).copy())
    nn.utils.vector_to_parameters(certain_scores(mask), model.parameters())
    vector_to_buffers(model, buffers)
    return model.eval()


def _checksum(model: nn.Module, mask: BoolVector) -> int:
    """Return the CRC-32 of a masked model's remaining weights."""
    kinds = (MaskedLinear, MaskedConv2d)
    parts = [m.fixed.flatten() for m in model.modules() if isinstance(m, kinds)]
    return vector_checksum(np.where(mask, torch.cat(parts).numpy(), np.float32(0)))
