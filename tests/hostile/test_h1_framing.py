"""H1: bytes on the socket that are no messages."""

from __future__ import annotations

import struct

import pytest
from frontend import wire

from hostile.victim import Victim

GET_FEATURES = wire.message(wire.GET_FEATURES)


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("=III", wire.GET_FEATURES, 1, 4097) + bytes(4097),
        struct.pack("=III", wire.GET_FEATURES, 1, 0xFFFF_FFFF),
        struct.pack("=III", wire.SET_FEATURES, 1, 0xFFFF_FFFF) + bytes(8),
        struct.pack("=III", wire.SET_FEATURES, 1, 0),
        struct.pack("=III", wire.SET_FEATURES, 1, 7) + bytes(7),
        struct.pack("=III", wire.GET_FEATURES, 1, 8) + bytes(8),
        *(struct.pack("=III", wire.GET_FEATURES, version, 0) for version in (0, 2, 3)),
        *(struct.pack("=III", wire.GET_FEATURES, 1 | 1 << bit, 0) for bit in (2, *range(4, 32))),
        *(struct.pack("=III", code, 1, 0) for code in (0, 45, 99, 0xFFFF, 0x8000_0000, 0x8000_0001, 0xFFFF_FFFF)),
        struct.pack("=III", wire.SET_MEM_TABLE, 1, 8) + struct.pack("=II", 9, 0),
        struct.pack("=III", wire.SET_MEM_TABLE, 1, 8) + struct.pack("=II", 0xFFFF_FFFF, 0),
    ],
    ids=lambda raw: raw[:12].hex(),
)
def test_what_is_no_message(victim: Victim, raw: bytes) -> None:
    """The connection is closed. DPDK cdc37ca3d0 (signed request numbers), CVE-2023-50711 (length of the wire)."""
    with victim.connect() as client:
        client.send_raw(raw)
        assert client.ended()


def test_every_prefix_of_a_session(victim: Victim) -> None:
    """The end of the stream at any byte of header and payload. virtiofsd and DPDK 585283f9a7 leaked what had come."""
    session = GET_FEATURES + wire.message(wire.SET_FEATURES, bytes(8)) + wire.message(wire.SET_OWNER)
    for cut in range(0, len(session), 3):
        with victim.connect() as client:
            client.send_raw(session[:cut])


def test_messages_glued_and_torn(victim: Victim) -> None:
    """Many in one write, and one in many writes."""
    with victim.connect() as client:
        client.send_raw(GET_FEATURES * 50)
        assert [client.receive().code for _ in range(50)] == [wire.GET_FEATURES] * 50
        for byte in GET_FEATURES * 3:
            client.send_raw(bytes([byte]))
        assert [client.receive().code for _ in range(3)] == [wire.GET_FEATURES] * 3


def test_need_reply_before_it_is_negotiated(victim: Victim) -> None:
    """It is ignored: an answer nobody expects would shift every later one."""
    with victim.connect() as client:
        client.send(wire.SET_OWNER, need_reply=True)
        assert client.ask(wire.GET_FEATURES).code == wire.GET_FEATURES


def test_many_broken_connections(victim: Victim) -> None:
    """Two hundred in a row: nothing grows, and the log stays short (DPDK 98b5ecbf76: a flood of lines)."""
    for _ in range(25):
        with victim.connect() as client:
            client.send_raw(b"\xff" * 12)
            assert client.ended()


def test_answers_after_the_end(victim: Victim) -> None:
    """A front-end that asks and hangs up without reading."""
    for _ in range(20):
        with victim.connect() as client:
            client.send_raw(GET_FEATURES * 100)
