"""The first part of every payload: what it is for, and what it builds on."""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from gwpf_baseline.exchange.coding import (
    MOST,
    Buffer,
    WireError,
    decode_number,
    encode_number,
)

FORMAT_VERSION = 7
_MAGIC = b"GW"
# magic, version, kind and flags, method; four numbers follow, and perhaps a checksum
_HEADER = struct.Struct("<2sBBI")
_CHECKSUM = struct.Struct("<I")
_FOLLOW_UP, _WITH_MASK, _CHECKED = 0x10, 0x20, 0x40


class Kind(IntEnum):
    """What a payload is for."""

    MODEL = 1  # server to client: the whole model
    CHANGES = 2  # server to client: what has changed since `base`, and where
    VALUES = 3  # server to client: what has changed where you have last uploaded
    UPDATE = 4  # client to server: what was learned
    LOST = 5  # client to server: I cannot follow; `base` is the version I do hold
    SKIPPED = 6  # client to server: what I learned is not worth sending
    DIVERGED = 7  # client to server: my training did not stay finite, nothing is sent


@dataclass(frozen=True)
class Header:
    """The first part of every payload.

    Parameters
    ----------
    method : str
        Name of the method; it travels as its CRC-32.
    kind : Kind
        What the payload is for.
    exchange : int
        Number of the exchange, and so of the mask, that the payload belongs to.
    base : int
        Version of the model that the payload builds on or that its sender holds: the
        last exchange whose outcome is in it, 0 for the initial weights that follow
        from the seed, -1 for none.
    used : int, default 0
        From the server: the last exchange whose upload by this client it used.
    length : int
        d, the length of the parameter vector.
    follow_up : bool, default False
        Whether this is a second exchange of a round: upload, but do not train.
    with_mask : bool, default False
        From the server: whether the mask of coordinates to upload is in the payload.
    checksum : int, default 0
        CRC-32 of what both sides must have alike although it does not travel: of the
        initial weights in payloads that build on them, of the mask in an upload whose
        sender derived it. Else 0, which takes no bytes.
    """

    method: str
    kind: Kind
    exchange: int
    base: int
    length: int
    used: int = 0
    follow_up: bool = False
    with_mask: bool = False
    checksum: int = 0

    def pack(self, kind: Kind | None = None) -> bytes:
        """Return the header's bytes, with another kind if one is given."""
        flags = _FOLLOW_UP * self.follow_up | _WITH_MASK * self.with_mask
        flags |= _CHECKED * (self.checksum != 0)
        # Versions are mostly those of just now: how long ago takes fewer bytes.
        numbers = (
            self.length,
            self.exchange,
            self.exchange - self.base,
            self.exchange - self.used,
        )
        packed = _HEADER.pack(
            _MAGIC,
            FORMAT_VERSION,
            flags | (kind or self.kind),
            zlib.crc32(self.method.encode()),
        ) + b"".join(map(encode_number, numbers))
        return packed + (_CHECKSUM.pack(self.checksum) if self.checksum else b"")

    @classmethod
    def unpack(cls, frame: Buffer, method: str, length: int) -> tuple["Header", int]:
        """Read and check a header.

        Parameters
        ----------
        frame : bytes or memoryview
            The payload.
        method : str
            The receiver's own method.
        length : int
            The receiver's own d.

        Returns
        -------
        header : Header
            The header.
        offset : int
            The first byte after it.

        Raises
        ------
        WireError
            Another format, version, method or length.
        """
        if len(frame) < _HEADER.size:
            raise WireError(f"a payload of {len(frame)} bytes has no header")
        magic, version, what, name = _HEADER.unpack_from(frame)
        if magic != _MAGIC or version != FORMAT_VERSION:
            raise WireError(
                f"not a payload of format version {FORMAT_VERSION}: "
                f"it begins with {bytes(frame[:3])!r}; "
                "run the same release on both sides"
            )
        if name != zlib.crc32(method.encode()):
            raise WireError(f"the payload is not of method {method}")
        kind, flags = what & 0x0F, what & 0xF0
        if kind not in set(Kind) or flags > _FOLLOW_UP | _WITH_MASK | _CHECKED:
            raise WireError(f"unknown kind of payload: {kind}, {flags}")
        d, offset = decode_number(frame, _HEADER.size)
        exchange, offset = decode_number(frame, offset)
        since_base, offset = decode_number(frame, offset)
        since_used, offset = decode_number(frame, offset)
        if d != length:
            raise WireError(f"a payload for {d} parameters, the model has {length}")
        if since_base > exchange + 1 or since_used > exchange:
            raise WireError("a payload that builds on a version before the first")
        if not 1 <= exchange < MOST:
            raise WireError(f"exchange {exchange}: they are counted from 1")
        checksum = 0
        if flags & _CHECKED:
            if len(frame) < offset + _CHECKSUM.size:
                raise WireError("a payload's header is cut short")
            (checksum,) = _CHECKSUM.unpack_from(frame, offset)
            offset += _CHECKSUM.size
            # What has two codes could be changed on its way unnoticed.
            if not checksum:
                raise WireError("a payload announces a checksum that it has not")
        header = cls(
            method,
            Kind(kind),
            exchange,
            exchange - since_base,
            d,
            exchange - since_used,
            follow_up=bool(flags & _FOLLOW_UP),
            with_mask=bool(flags & _WITH_MASK),
            checksum=checksum,
        )
        return header, offset
