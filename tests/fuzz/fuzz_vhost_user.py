"""Fuzzer of the vhost-user codec and session (atheris): fuzz_vhost_user.py [LIBFUZZER-OPTION ...] [CORPUS ...].

The input is a front-end: messages with any code, flags, size, payload and descriptors, in pieces, to a session over a
device that keeps its contract or fails.  Whatever comes, nothing is raised but RemoteProtocolError, what was decoded
encodes to the same again, and when the connection is over no descriptor and no mapping is left.

    fuzz_vhost_user.py --seeds DIRECTORY    writes inputs to begin with
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import atheris  # type: ignore[import-untyped]

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
# What an editable installation puts in front of the import system, atheris cannot instrument.
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]

with atheris.instrument_imports(include=["viommud.vhost_user"]):
    from frontend import wire
    from unit.vhost_user.fake_device import FEATURES, RAM_GPA, RAM_SIZE, Harness

    from viommud.vhost_user.codec import NEED_DATA, Request
    from viommud.vhost_user.errors import RemoteProtocolError
    from viommud.vhost_user.fds import OwnedFd
    from viommud.vhost_user.session import SessionLimits

CONTROL = struct.Struct("=BBBBBBH")
"""Of a message: code, flags, descriptors, first piece (0: all), size difference, unused, payload bytes."""

NEED_REPLY, ODD_FLAGS, ODD_SIZE, HIGH_CODE, LATE_FDS = 1, 2, 4, 8, 16
MEMORY, EVENT, SOCKET, NULL = 0, 1, 2, 3
MAX_LINES = 2000
"""Log lines of one input, which is at most some kilobytes: not one for every request for ever."""


def _descriptors() -> list[int]:
    memory = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(memory, RAM_SIZE)
    ends = socket.socketpair()
    return [memory, os.eventfd(0, os.EFD_CLOEXEC), ends[0].detach(), os.open("/dev/null", os.O_RDWR)]


KINDS = _descriptors()


def _owned(what: int) -> list[OwnedFd]:
    """Low four bits: how many.  Then of which kind, or of all kinds by turns."""
    step = 1 if what & 0x80 else 0
    return [OwnedFd(os.dup(KINDS[((what >> 4) + index * step) % len(KINDS)])) for index in range(what & 15)]


def _handle(harness: Harness, request: Request) -> None:
    assert request.payload == type(request.payload).decode(request.payload.encode())
    response = harness.session.handle(request)
    if response is None:
        return
    try:
        if response.own:
            harness.connection.send_reply(request, response.payload, [fd.fileno() for fd in response.fds])
        else:
            harness.connection.send_ack(request, response.payload)
    finally:
        response.close()


def _feed(harness: Harness, data: bytes, fds: list[OwnedFd], cut: int, *, late: bool) -> None:
    """As a transport does; late: the descriptors come with the second piece."""
    pieces = 0
    while data:
        size = min(harness.connection.bytes_wanted, cut or len(data), len(data))
        mine: list[OwnedFd] = []
        if pieces == late:
            mine, fds = fds, []
        try:
            harness.connection.receive_data(data[:size], mine)
        except RemoteProtocolError:
            for fd in fds:
                fd.close()
            raise
        data, pieces = data[size:], pieces + 1
        while (event := harness.connection.next_event()) is not NEED_DATA:
            assert isinstance(event, Request)
            _handle(harness, event)
    for fd in fds:
        fd.close()


def _play(harness: Harness, data: bytes) -> None:
    while len(data) >= CONTROL.size:
        code, flags, fds, cut, difference, _, size = CONTROL.unpack_from(data)
        payload = data[CONTROL.size : CONTROL.size + size % 1024]
        data = data[CONTROL.size + len(payload) :]
        said = len(payload) + (difference if flags & ODD_SIZE else 0)
        bits = wire.VERSION | (wire.NEED_REPLY if flags & NEED_REPLY else 0) | (flags if flags & ODD_FLAGS else 0)
        message = wire.header(code | (code << 24 if flags & HIGH_CODE else 0), said, bits) + payload
        _feed(harness, message, _owned(fds), cut, late=bool(flags & LATE_FDS))
    harness.connection.receive_eof()


def one_input(data: bytes) -> None:
    """Play one input."""
    head, data = data[:4].ljust(4, b"\0"), data[4:]
    before = len(os.listdir("/proc/self/fd"))
    harness = Harness(limits=SessionLimits(memory_slots=1 + head[0] % 16))
    harness.device.looks_used = bool(head[1] & 1)
    refusals = ("", "map_region", "start_queue", "set_log", "set_inflight", "config_write")
    harness.device.refuse = refusals[head[2] % len(refusals)]
    try:
        if head[3] & 1:
            harness.negotiate()
        if head[3] & 2 and head[3] & 1 and harness.device.refuse != "map_region":
            harness.add_ram()
        _play(harness, data)
    except RemoteProtocolError:
        pass
    finally:
        harness.device.refuse = ""  # nothing can be wrong with taking something away
        harness.close()
    assert len(harness.lines) <= MAX_LINES
    assert not harness.device.running
    assert all(mapping.closed for mapping in harness.device.mappings), "a mapping was left"
    assert before == len(os.listdir("/proc/self/fd")), "a descriptor was left"


# ---------------------------------------------------------------------------------------------------------------- seeds


def _message(code: int, payload: bytes = b"", fds: int = 0, flags: int = NEED_REPLY) -> bytes:
    return CONTROL.pack(code, flags, fds, 0, 0, 0, len(payload)) + payload


def _one(kind: int) -> int:
    return kind << 4 | 1


def _ring(index: int) -> bytes:
    at = RAM_GPA + index * 0x10000
    return (
        _message(wire.SET_VRING_NUM, wire.vring_state(index, 256))
        + _message(wire.SET_VRING_BASE, wire.vring_state(index, 0))
        + _message(wire.SET_VRING_ADDR, wire.vring_addr(index, at, at + 0x8000, at + 0x4000))
        + _message(wire.SET_VRING_KICK, wire.u64(index), _one(EVENT))
        + _message(wire.SET_VRING_CALL, wire.u64(index), _one(EVENT))
        + _message(wire.SET_VRING_ERR, wire.u64(index | wire.NO_FD))
        + _message(wire.SET_VRING_ENABLE, wire.vring_state(index, 1))
    )


def seeds() -> Iterator[bytes]:
    """What QEMU does in a session, and each message that it can send."""
    negotiated, with_ram = b"\7\0\0\1", b"\7\0\0\3"
    region = wire.region(RAM_GPA, RAM_SIZE, RAM_GPA)
    features = FEATURES | wire.F_PROTOCOL_FEATURES
    rings = _ring(0) + _ring(1)
    stopped = b"".join(_message(wire.GET_VRING_BASE, wire.vring_state(index)) for index in (0, 1))
    yield b"\7\0\0\0" + _message(wire.GET_FEATURES) + _message(wire.GET_PROTOCOL_FEATURES) + _message(wire.SET_OWNER)
    yield negotiated + _message(wire.ADD_MEM_REG, wire.single_region(region), _one(MEMORY)) + rings + stopped
    yield with_ram + rings + stopped + rings + _message(wire.REM_MEM_REG, wire.single_region(region), 0)
    yield with_ram + rings + _message(wire.SET_LOG_BASE, struct.pack("=QQ", 4096, 0), _one(MEMORY))
    yield with_ram + rings + _message(wire.SET_FEATURES, wire.u64(features | wire.F_LOG_ALL)) + stopped
    yield with_ram + _message(wire.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, 2, 256)) + rings
    yield with_ram + _message(wire.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 65536, 0, 2, 256), _one(MEMORY)) + rings
    yield with_ram + rings + _message(wire.SET_BACKEND_REQ_FD, fds=_one(SOCKET)) + _message(wire.RESET_DEVICE)
    yield negotiated + _message(wire.SET_MEM_TABLE, struct.pack("=I4x", 1) + region, _one(MEMORY)) + rings
    yield negotiated + _message(wire.SET_LOG_FD, fds=_one(EVENT)) + _message(wire.GET_MAX_MEM_SLOTS)
    yield negotiated + _message(wire.GET_CONFIG, struct.pack("=III", 0, 40, 0) + bytes(40))
    yield negotiated + _message(wire.SET_CONFIG, struct.pack("=III", 36, 1, 0) + b"\1")
    yield (
        negotiated + _message(wire.SET_STATUS, wire.u64(15)) + _message(wire.GET_STATUS) + _message(wire.GET_QUEUE_NUM)
    )
    for code in range(1, 46):
        yield negotiated + _message(code) + _message(code, bytes(8)) + _message(code, bytes(40))


def _write_seeds(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (directory / f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--seeds"]:
        _write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
