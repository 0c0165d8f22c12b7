"""The file of a final network: a seed and a mask, which are all that FedPM leaves.

The coding is ours; ``docs/fedpm.md`` tells what it holds.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gwpf_baseline.exchange.coding import MOST, decode_bitmap, encode_bitmap
from gwpf_baseline.exchange.payload import vector_checksum
from gwpf_baseline.learning.flat_model import (
    buffers_to_vector,
    vector_to_buffers,
)
from gwpf_baseline.methods.shared.masked_network import (
    LEVELS,
    MaskedConv2d,
    MaskedLinear,
    certain_scores,
    maskable,
    masked,
)
from gwpf_baseline.model import MODELS, initial_model
from gwpf_baseline.utils import BoolVector, ConfigError, is_whole, one_line

NETWORK_FILE = "network.mask"
# What a description looks like: zlib then stores little but the differences, which
# counts where a whole network takes some thousand bytes. A part of the format.
_EXAMPLE = (
    b'{"model":"conv4","input_shape":[3,32,32],"num_classes":10,"options":{"width":16},'
    b'"seed":0,"level":51,"bits":8,"checksum":'
)
# No description is longer; a hostile file could claim gigabytes.
_MOST_DESCRIPTION = 2**16
# A file has at least a byte for so many weights, so that what a reader builds is in
# proportion to what it was given. Only masks that are next to empty or full take less:
# zeros follow them. A part of the format.
_WEIGHTS_A_BYTE = 256


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
    content = description + encode_bitmap(mask) + values
    file.write_bytes(content.ljust(_least_bytes(mask.size), b"\0"))


def load_network(file: Path | str) -> nn.Module:
    """Rebuild the network that a run has left behind.

    Parameters
    ----------
    file : pathlib.Path or str
        ``network.mask`` in the run's folder: a packed description with the seed
        of the weights' signs, the coded mask, and what buffers the model has. It may
        come from anybody: nothing is built before it was found to be in proportion.

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
        content = Path(file).read_bytes()
        made, rest = unpack_description(content)
        _check(made)
        shape, seed = tuple(made["input_shape"]), made["seed"]
        name, classes, options = made["model"], made["num_classes"], made["options"]
        # Nothing takes memory there; next to empty, a mask could be of any size.
        with torch.device("meta"):
            plan = initial_model(name, shape, classes, seed, **options)
        size = sum(layer.weight.numel() for layer in maskable(plan).values())
        if len(content) < _least_bytes(size):
            raise ValueError(f"{len(content)} bytes for {size} weights")
        mask, end = decode_bitmap(rest, 0, size)
        model = initial_model(name, shape, classes, seed, **options)
        model = masked(model, made["level"], made["bits"], seed)
        stop = end + 4 * buffers_to_vector(model).numel()
        values, padding = rest[end:stop], rest[stop:]
        written = len(content) - len(rest) + stop
        if len(content) != max(written, _least_bytes(size)) or any(padding):
            raise ValueError(f"{len(rest)} bytes after its description")
        if _checksum(model, mask) != made["checksum"]:
            raise ValueError("other weights than were written")
    except (
        *(OSError, LookupError, TypeError, ValueError, RuntimeError),
        *(AttributeError, ArithmeticError, zlib.error),
    ) as error:
        # Torch adds where in its own source it was.
        why = one_line(error, 200)
        raise ConfigError("network", file, f"what FedPM has written ({why})") from error
    buffers = torch.from_numpy(np.frombuffer(values, "<f4").copy())
    nn.utils.vector_to_parameters(certain_scores(mask), model.parameters())
    vector_to_buffers(model, buffers)
    return model.eval()


def _check(made: Any) -> None:
    """Refuse a description whose fields are not those of a run, each in its range."""
    sides, bits = made["input_shape"], made["bits"]
    fits = {
        "model": made["model"] in list(MODELS),
        "input_shape": isinstance(sides, list) and 1 <= len(sides) <= 3
        # Python looks for a fraction, or for text, at each place of a range.
        and all(_is_within(side, 1, MOST) for side in sides),
        "num_classes": _is_within(made["num_classes"], 1, MOST),
        "options": isinstance(made["options"], dict),
        "seed": _is_within(made["seed"], 0),
        "bits": _is_within(bits, 1) and bits in LEVELS,
        "level": bits in list(LEVELS) and _is_within(made["level"], 1, 2**bits - 1),
        "checksum": _is_within(made["checksum"], 0, 2**32 - 1),
    }
    if made.keys() != fits.keys():
        raise ValueError("a description of other fields")
    for field, fit in fits.items():
        if not fit:
            raise ValueError(f"a description with another {field}")


def _is_within(value: Any, least: int, most: float = math.inf) -> bool:
    """Tell whether a value is a whole number, and in its range."""
    return is_whole(value, least) and value <= most


def _least_bytes(weights: int) -> int:
    """Return how long the file of a network of so many weights is at least."""
    return -(-weights // _WEIGHTS_A_BYTE)


def _checksum(model: nn.Module, mask: BoolVector) -> int:
    """Return the CRC-32 of a masked model's remaining weights."""
    kinds = (MaskedLinear, MaskedConv2d)
    parts = [m.fixed.flatten() for m in model.modules() if isinstance(m, kinds)]
    return vector_checksum(np.where(mask, torch.cat(parts).numpy(), np.float32(0)))
