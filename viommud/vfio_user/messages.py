"""The one vfio-user message that Python reads and writes: VERSION (libvfio-user, docs/vfio-user.rst)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import msgspec

from viommud.errors import ViommudError

VERSION = 1
REPLY = 0x1
ERROR = 0x20

HEADER = struct.Struct("=HHIII")
"""Message ID, command, size of the whole message, flags, errno; in the byte order of the host."""
VERSION_NUMBERS = struct.Struct("=HH")
MAX_VERSION_SIZE = 1 << 16
"""Bytes of a VERSION message; far more than any has."""

MAX_FDS = 64
"""Descriptors in one message that the relay takes (VFIO_USER_MAX_FDS)."""
MAX_TRANSFER = 1 << 20
MIN_TRANSFER = 4096
OWN_DMA_MAPS = 1024
"""Regions that a client may share (VFIO_USER_MAX_RANGES)."""


class VfioUserError(ViommudError):
    """A peer broke the protocol, or cannot be worked with.  Bytes from a peer cause no other exception."""


class Capabilities(msgspec.Struct, frozen=True, omit_defaults=False):
    """What one side can do.  The defaults are those of the specification, for what a peer leaves out."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 << 20
    """Bytes of data in one message."""
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    """Page sizes that DMA can be mapped with; a bit for each."""
    write_multiple: bool = False
    """REGION_WRITE_MULTI is understood."""


class _Body(msgspec.Struct, frozen=True):
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of a message."""

    id: int
    command: int
    size: int
    flags: int
    error: int


@dataclass(frozen=True, slots=True)
class Version:
    """What VERSION says."""

    major: int
    minor: int
    capabilities: Capabilities


def parse_header(data: bytes, *, reply: bool) -> Header:
    """The header of a VERSION message.

    :param data: HEADER.size bytes.
    :raises VfioUserError: it is none, or too long.
    """
    header = Header(*HEADER.unpack(data))
    if header.command != VERSION:
        raise VfioUserError(f"command {header.command} where VERSION is due")
    if header.flags & ~ERROR != (REPLY if reply else 0) or (header.flags & ERROR and not reply):
        raise VfioUserError(f"VERSION with flags {header.flags:#x}")
    if not HEADER.size <= header.size <= MAX_VERSION_SIZE:
        raise VfioUserError(f"VERSION of {header.size} bytes; {HEADER.size} to {MAX_VERSION_SIZE} are allowed")
    if not header.flags & ERROR and header.size < HEADER.size + VERSION_NUMBERS.size:
        raise VfioUserError(f"VERSION of {header.size} bytes has no version")
    return header


def parse_version(payload: bytes) -> Version:
    """The payload of VERSION: two numbers and, possibly, JSON that ends with a zero byte.

    :raises VfioUserError: it is not.
    """
    major, minor = VERSION_NUMBERS.unpack_from(payload)
    text = payload[VERSION_NUMBERS.size :]
    if not text:
        return Version(major, minor, Capabilities())
    if not text.endswith(b"\0") or b"\0" in text[:-1]:
        raise VfioUserError("the capabilities do not end with their only zero byte")
    try:
        body = msgspec.json.decode(text[:-1], type=_Body) if text != b"\0" else _Body()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise VfioUserError(f"the capabilities cannot be read: {error}") from error
    return Version(major, minor, body.capabilities)


def render_version(message_id: int, capabilities: Capabilities, *, reply: bool) -> bytes:
    """VERSION 0.0 with these capabilities."""
    text = msgspec.json.encode({"capabilities": _plain(capabilities)}) + b"\0"
    size = HEADER.size + VERSION_NUMBERS.size + len(text)
    return HEADER.pack(message_id, VERSION, size, REPLY if reply else 0, 0) + VERSION_NUMBERS.pack(0, 0) + text


def render_refusal(message_id: int, number: int) -> bytes:
    """A reply to VERSION with an errno."""
    return HEADER.pack(message_id, VERSION, HEADER.size, REPLY | ERROR, number)


def _plain(capabilities: Capabilities) -> dict[str, Any]:
    """As JSON; what only some peers know is said only where it is true."""
    plain: dict[str, Any] = msgspec.to_builtins(capabilities)
    if not capabilities.write_multiple:
        del plain["write_multiple"]
    return plain
