"""VERSION as bytes: what is understood, and that anything else is one kind of error."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from viommud.vfio_user.messages import (
    HEADER,
    Capabilities,
    Version,
    VfioUserError,
    parse_header,
    parse_version,
    render_refusal,
    render_version,
)

QEMU = (
    b'{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "pgsizes": 4096, "max_dma_maps": 65535, '
    b'"migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, "write_multiple": true}}'
)


def numbers(major: int = 0, minor: int = 0) -> bytes:
    """The first four bytes of the payload."""
    return struct.pack("=HH", major, minor)


def test_what_qemu_sends() -> None:
    """Every capability is read; those that viommud does not have are left out."""
    assert parse_version(numbers() + QEMU + b"\0") == Version(0, 0, Capabilities(16, 1 << 20, 65535, 4096, True))


@pytest.mark.parametrize("text", [b"", b"\0", b"{}\0", b'{"capabilities":{}}\0', b'{"other":[1]}\0'])
def test_defaults_for_what_is_left_out(text: bytes) -> None:
    """No JSON at all, and JSON without capabilities, mean the defaults of the specification."""
    assert parse_version(numbers(0, 1) + text) == Version(0, 1, Capabilities(1, 1 << 20, 65535, 4096, False))


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"{}",
        b"{}\0\0",
        b"{}\0{}\0",
        b"[]\0",
        b"null\0",
        b"\xff\xfe\0",
        b'{"capabilities":[]}\0',
        b'{"capabilities":{"max_msg_fds":"8"}}\0',
        b'{"capabilities":{"max_msg_fds":1.5}}\0',
        b'{"capabilities":{"max_dma_maps":1e400}}\0',
        b'{"capabilities":{"write_multiple":1}}\0',
        b"[" * 60000 + b"\0",
        b'{"a":' * 10000 + b"\0",
    ],
)
def test_json_that_is_not(text: bytes) -> None:
    """What is not JSON, not ended by one zero, or of the wrong types, is refused."""
    with pytest.raises(VfioUserError):
        parse_version(numbers() + text)


@given(st.binary(max_size=300))
def test_any_payload_is_understood_or_refused(data: bytes) -> None:
    """No payload of a peer causes another exception."""
    try:
        version = parse_version(numbers() + data)
    except VfioUserError:
        return
    assert isinstance(version, Version)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size), st.booleans())
def test_any_header_is_understood_or_refused(data: bytes, reply: bool) -> None:
    """No header of a peer causes another exception, and one that passes says how much to read."""
    try:
        header = parse_header(data, reply=reply)
    except VfioUserError:
        return
    assert HEADER.size <= header.size <= 65536


@pytest.mark.parametrize(
    ("command", "size", "flags", "reply"),
    [
        (2, 20, 0, False),
        (1, 19, 0, False),
        (1, 15, 0, False),
        (1, 65537, 0, False),
        (1, 0xFFFFFFFF, 0, False),
        (1, 20, 1, False),
        (1, 20, 0x10, False),
        (1, 20, 0x20, False),
        (1, 20, 2, False),
        (1, 20, 0, True),
        (1, 20, 0x11, True),
        (1, 20, 0x41, True),
    ],
)
def test_headers_that_are_none(command: int, size: int, flags: int, reply: bool) -> None:
    """Command, size and flags have to be those of VERSION, asked or answered."""
    with pytest.raises(VfioUserError):
        parse_header(HEADER.pack(1, command, size, flags, 0), reply=reply)


def test_what_is_sent_is_what_is_read() -> None:
    """The message has its size, ends with a zero, and offers batched writes only where they are."""
    for multiple in (False, True):
        message = render_version(7, Capabilities(4, 8192, 100, 4096, multiple), reply=True)
        header = parse_header(message[: HEADER.size], reply=True)
        assert (header.id, header.size) == (7, len(message))
        assert parse_version(message[HEADER.size :]) == Version(0, 0, Capabilities(4, 8192, 100, 4096, multiple))
        assert ("write_multiple" in json.loads(message[HEADER.size + 4 : -1])["capabilities"]) is multiple


def test_a_refusal_is_a_header() -> None:
    """The errno is in the header, and nothing follows it."""
    header = parse_header(render_refusal(9, 71), reply=True)
    assert (header.id, header.size, header.error) == (9, 16, 71)
