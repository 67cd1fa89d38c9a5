"""vhost-user as numbers and bytes, from QEMU docs/interop/vhost-user.rst."""

from __future__ import annotations

import struct

VERSION = 1
REPLY = 4
NEED_REPLY = 8
NO_FD = 1 << 8

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_LOG_BASE = 6
SET_LOG_FD = 7
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG = 24
SET_CONFIG = 25
GET_INFLIGHT_FD = 31
SET_INFLIGHT_FD = 32
RESET_DEVICE = 34
GET_MAX_MEM_SLOTS = 36
ADD_MEM_REG = 37
REM_MEM_REG = 38
SET_STATUS = 39
GET_STATUS = 40

F_LOG_ALL = 1 << 26
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

P_MQ = 1 << 0
P_LOG_SHMFD = 1 << 1
P_REPLY_ACK = 1 << 3
P_BACKEND_REQ = 1 << 5
P_CONFIG = 1 << 9
P_INFLIGHT_SHMFD = 1 << 12
P_RESET_DEVICE = 1 << 13
P_CONFIGURE_MEM_SLOTS = 1 << 15
P_STATUS = 1 << 16
P_GPA_ADDRESSES = 1 << 21

PACKED_INITIAL_BASE = 0x8000_8000


def header(code: int, size: int, flags: int = VERSION) -> bytes:
    """The 12 bytes in front of every payload."""
    return struct.pack("=III", code & 0xFFFF_FFFF, flags, size)


def message(code: int, payload: bytes = b"", flags: int = VERSION) -> bytes:
    """A whole message."""
    return header(code, len(payload), flags) + payload


def u64(value: int) -> bytes:
    """One number."""
    return struct.pack("=Q", value)


def vring_state(index: int, num: int = 0) -> bytes:
    """Ring index and a number."""
    return struct.pack("=II", index, num)


def vring_addr(index: int, desc: int, used: int, avail: int, *, flags: int = 0, log: int = 0) -> bytes:
    """Where a ring lies; desc, used, avail in the order of the wire."""
    return struct.pack("=IIQQQQ", index, flags, desc, used, avail, log)


def region(guest_addr: int, size: int, user_addr: int, offset: int = 0) -> bytes:
    """One memory region."""
    return struct.pack("=QQQQ", guest_addr, size, user_addr, offset)


def single_region(body: bytes) -> bytes:
    """ADD_MEM_REG, REM_MEM_REG."""
    return bytes(8) + body


def memory_table(*regions: bytes) -> bytes:
    """SET_MEM_TABLE."""
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


def config(offset: int, data: bytes, flags: int = 0) -> bytes:
    """GET_CONFIG, SET_CONFIG."""
    return struct.pack("=III", offset, len(data), flags) + data


def log_area(size: int, offset: int = 0) -> bytes:
    """SET_LOG_BASE."""
    return struct.pack("=QQ", size, offset)


def inflight(size: int, offset: int, queues: int, queue_size: int) -> bytes:
    """GET_INFLIGHT_FD, SET_INFLIGHT_FD, as the C structure with its padding."""
    return struct.pack("=QQHH4x", size, offset, queues, queue_size)
