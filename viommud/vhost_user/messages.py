"""Every vhost-user message as one row of a table.

Source: QEMU docs/interop/vhost-user.rst.  The tables are complete: a code without a row is not vhost-user.  Rows
whose protocol feature this back-end never offers are there so that a front-end that sends them anyway gets a
precise answer.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from viommud.vhost_user.payloads import (
    MAX_TABLE_REGIONS,
    U64,
    VRING_NO_FD,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    LogArea,
    MemoryTable,
    Opaque,
    Payload,
    SharedMemoryConfig,
    SharedMemoryMap,
    SingleRegion,
    Uuid,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)


class ProtocolFeature(enum.IntEnum):
    """Bit numbers of GET_PROTOCOL_FEATURES."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    NET_MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22

    @property
    def mask(self) -> int:
        """The bit itself."""
        return 1 << self.value


class FdRule(enum.Enum):
    """Descriptors that may come with a message: name, least and greatest number."""

    NONE = ("none", 0, 0)
    ONE = ("one", 1, 1)
    OPTIONAL = ("none or one", 0, 1)
    UNLESS_NO_FD_BIT = ("one unless the payload says none", 0, 1)
    PER_REGION = ("one for each region", 0, MAX_TABLE_REGIONS)

    def __init__(self, text: str, least: int, greatest: int) -> None:
        self.text = text
        self.least = least
        self.greatest = greatest

    def expected(self, payload: Payload) -> tuple[int, int]:
        """Least and greatest number of descriptors for this very payload."""
        match self, payload:
            case FdRule.UNLESS_NO_FD_BIT, VringFd(no_fd=no_fd):
                return (0, 0) if no_fd else (1, 1)
            case FdRule.PER_REGION, MemoryTable(regions=regions):
                return len(regions), len(regions)
            case _:
                return self.least, self.greatest


REFUSED = U64(1)
"""Acknowledgement of a request that was not granted; zero means it was."""
GRANTED = U64(0)


@dataclass(frozen=True, slots=True)
class RequestType:
    """One row: everything there is to know about a request apart from what it does."""

    code: int
    name: str
    payload: type[Payload] = Empty
    fds: FdRule = FdRule.NONE
    needs: ProtocolFeature | None = None
    """Protocol feature without which the request may not be sent."""
    reply: type[Payload] | None = None
    """Payload of the request's own reply.  None: it is acknowledged with a U64 if the sender asks for that."""
    reply_fds: FdRule = FdRule.NONE
    reply_needs: ProtocolFeature | None = None
    """Protocol feature without which `reply` does not apply."""
    refusal: Payload | None = None
    """The own reply that says no.  None: there is none, and the connection must be closed instead."""


class FrontendRequest(enum.IntEnum):
    """Codes of the requests from front-end to back-end."""

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
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """Codes of the requests from back-end to front-end, on the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


RequestTable = Mapping[int, RequestType]
_F = FrontendRequest
_B = BackendRequest
_P = ProtocolFeature


def _table(*rows: tuple[enum.IntEnum, RequestType]) -> RequestTable:
    return MappingProxyType({code.value: row for code, row in rows})


def _row(
    code: FrontendRequest | BackendRequest,
    payload: type[Payload] = Empty,
    fds: FdRule = FdRule.NONE,
    *,
    needs: ProtocolFeature | None = None,
    reply: type[Payload] | None = None,
    reply_fds: FdRule = FdRule.NONE,
    reply_needs: ProtocolFeature | None = None,
    refusal: Payload | None = None,
) -> tuple[enum.IntEnum, RequestType]:
    return code, RequestType(code.value, code.name, payload, fds, needs, reply, reply_fds, reply_needs, refusal)


FRONTEND_REQUESTS: RequestTable = _table(
    _row(_F.GET_FEATURES, reply=U64),
    _row(_F.SET_FEATURES, U64),
    _row(_F.SET_OWNER),
    _row(_F.RESET_OWNER),
    _row(_F.SET_MEM_TABLE, MemoryTable, FdRule.PER_REGION),
    # QEMU waits for a reply iff a descriptor came along, and never looks into it.
    _row(_F.SET_LOG_BASE, LogArea, FdRule.OPTIONAL, reply=U64, reply_needs=_P.LOG_SHMFD, refusal=REFUSED),
    _row(_F.SET_LOG_FD, fds=FdRule.ONE),
    _row(_F.SET_VRING_NUM, VringState),
    _row(_F.SET_VRING_ADDR, VringAddr),
    _row(_F.SET_VRING_BASE, VringState),
    _row(_F.GET_VRING_BASE, VringState, reply=VringState),
    _row(_F.SET_VRING_KICK, VringFd, FdRule.UNLESS_NO_FD_BIT),
    _row(_F.SET_VRING_CALL, VringFd, FdRule.UNLESS_NO_FD_BIT),
    _row(_F.SET_VRING_ERR, VringFd, FdRule.UNLESS_NO_FD_BIT),
    _row(_F.GET_PROTOCOL_FEATURES, reply=U64),
    _row(_F.SET_PROTOCOL_FEATURES, U64),
    _row(_F.GET_QUEUE_NUM, needs=_P.MQ, reply=U64),
    _row(_F.SET_VRING_ENABLE, VringState),
    _row(_F.SEND_RARP, U64, needs=_P.RARP),
    _row(_F.NET_SET_MTU, U64, needs=_P.NET_MTU),
    _row(_F.SET_BACKEND_REQ_FD, fds=FdRule.ONE, needs=_P.BACKEND_REQ),
    _row(_F.IOTLB_MSG, Iotlb, reply=U64, refusal=REFUSED),
    _row(_F.SET_VRING_ENDIAN, VringState, needs=_P.CROSS_ENDIAN),
    _row(_F.GET_CONFIG, Config, needs=_P.CONFIG, reply=Config, refusal=Empty()),
    _row(_F.SET_CONFIG, Config, needs=_P.CONFIG),
    _row(_F.CREATE_CRYPTO_SESSION, Opaque, needs=_P.CRYPTO_SESSION, reply=Opaque),
    _row(_F.CLOSE_CRYPTO_SESSION, U64, needs=_P.CRYPTO_SESSION),
    _row(_F.POSTCOPY_ADVISE, needs=_P.PAGEFAULT, reply=Empty, reply_fds=FdRule.ONE),
    _row(_F.POSTCOPY_LISTEN, needs=_P.PAGEFAULT),
    _row(_F.POSTCOPY_END, needs=_P.PAGEFAULT, reply=U64, refusal=REFUSED),
    _row(
        _F.GET_INFLIGHT_FD,
        Inflight,
        needs=_P.INFLIGHT_SHMFD,
        reply=Inflight,
        reply_fds=FdRule.OPTIONAL,
        # QEMU takes a size of zero as "no in-flight tracking".
        refusal=Inflight(0, 0, 0, 0),
    ),
    _row(_F.SET_INFLIGHT_FD, Inflight, FdRule.ONE, needs=_P.INFLIGHT_SHMFD),
    _row(_F.GPU_SET_SOCKET, fds=FdRule.ONE),
    _row(_F.RESET_DEVICE, needs=_P.RESET_DEVICE),
    _row(_F.VRING_KICK, VringState, needs=_P.INBAND_NOTIFICATIONS),
    _row(_F.GET_MAX_MEM_SLOTS, needs=_P.CONFIGURE_MEM_SLOTS, reply=U64),
    _row(_F.ADD_MEM_REG, SingleRegion, FdRule.ONE, needs=_P.CONFIGURE_MEM_SLOTS),
    # A descriptor is useless here; some front-ends send one, and it is only closed.
    _row(_F.REM_MEM_REG, SingleRegion, FdRule.OPTIONAL, needs=_P.CONFIGURE_MEM_SLOTS),
    _row(_F.SET_STATUS, U64, needs=_P.STATUS),
    _row(_F.GET_STATUS, needs=_P.STATUS, reply=U64),
    _row(_F.GET_SHARED_OBJECT, Uuid, needs=_P.SHARED_OBJECT, reply=Empty, reply_fds=FdRule.OPTIONAL),
    _row(
        _F.SET_DEVICE_STATE_FD,
        DeviceState,
        FdRule.ONE,
        needs=_P.DEVICE_STATE,
        reply=U64,
        reply_fds=FdRule.OPTIONAL,
        refusal=U64(REFUSED.value | VRING_NO_FD),
    ),
    _row(_F.CHECK_DEVICE_STATE, needs=_P.DEVICE_STATE, reply=U64, refusal=REFUSED),
    _row(_F.GET_SHMEM_CONFIG, needs=_P.SHMEM, reply=SharedMemoryConfig),
)

BACKEND_REQUESTS: RequestTable = _table(
    _row(_B.IOTLB_MSG, Iotlb),
    _row(_B.CONFIG_CHANGE_MSG, needs=_P.CONFIG),
    _row(_B.VRING_HOST_NOTIFIER_MSG, VringArea, FdRule.UNLESS_NO_FD_BIT, needs=_P.HOST_NOTIFIER),
    _row(_B.VRING_CALL, VringState, needs=_P.INBAND_NOTIFICATIONS),
    _row(_B.VRING_ERR, VringState, needs=_P.INBAND_NOTIFICATIONS),
    _row(_B.SHARED_OBJECT_ADD, Uuid, needs=_P.SHARED_OBJECT),
    _row(_B.SHARED_OBJECT_REMOVE, Uuid, needs=_P.SHARED_OBJECT),
    _row(_B.SHARED_OBJECT_LOOKUP, Uuid, FdRule.ONE, needs=_P.SHARED_OBJECT),
    _row(_B.SHMEM_MAP, SharedMemoryMap, FdRule.ONE, needs=_P.SHMEM),
    _row(_B.SHMEM_UNMAP, SharedMemoryMap, needs=_P.SHMEM),
)
