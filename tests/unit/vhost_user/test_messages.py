"""The message tables against the specification's numbers, written down a second time in the test front-end."""

from __future__ import annotations

import struct

import pytest
from frontend import wire

from viommud.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    BackendRequest,
    FdRule,
    FrontendRequest,
    ProtocolFeature,
)
from viommud.vhost_user.payloads import Inflight, InvalidPayload, MemoryTable, Payload, VringAddr, VringFd

SIZES = {
    # C structures of QEMU hw/virtio/vhost-user.c, as they go over the wire.
    "GET_FEATURES": 0, "SET_FEATURES": 8, "SET_OWNER": 0, "RESET_OWNER": 0, "SET_LOG_BASE": 16, "SET_LOG_FD": 0,
    "SET_VRING_NUM": 8, "SET_VRING_ADDR": 40, "SET_VRING_BASE": 8, "GET_VRING_BASE": 8, "SET_VRING_KICK": 8,
    "SET_VRING_CALL": 8, "SET_VRING_ERR": 8, "GET_PROTOCOL_FEATURES": 0, "SET_PROTOCOL_FEATURES": 8,
    "GET_QUEUE_NUM": 0, "SET_VRING_ENABLE": 8, "SEND_RARP": 8, "NET_SET_MTU": 8, "SET_BACKEND_REQ_FD": 0,
    "IOTLB_MSG": 32, "SET_VRING_ENDIAN": 8, "CLOSE_CRYPTO_SESSION": 8, "POSTCOPY_ADVISE": 0, "POSTCOPY_LISTEN": 0,
    "POSTCOPY_END": 0, "GPU_SET_SOCKET": 0, "RESET_DEVICE": 0, "VRING_KICK": 8, "GET_MAX_MEM_SLOTS": 0,
    "ADD_MEM_REG": 40, "REM_MEM_REG": 40, "SET_STATUS": 8, "GET_STATUS": 0, "GET_SHARED_OBJECT": 16,
    "SET_DEVICE_STATE_FD": 8, "CHECK_DEVICE_STATE": 0, "GET_SHMEM_CONFIG": 0,
}  # fmt: skip
VARIABLE = {
    "SET_MEM_TABLE": (8, 8 + 8 * 32),
    "GET_CONFIG": (12, 12 + 256),
    "SET_CONFIG": (12, 12 + 256),
    "CREATE_CRYPTO_SESSION": (0, 4096),
    "GET_INFLIGHT_FD": (20, 24),
    "SET_INFLIGHT_FD": (20, 24),
}


def test_every_frontend_request_has_a_row() -> None:
    """Codes 1 to 44 are assigned, without a gap."""
    assert list(range(1, 45)) == sorted(FRONTEND_REQUESTS)


def test_every_backend_request_has_a_row() -> None:
    """Codes 1 to 10 are assigned, without a gap."""
    assert list(range(1, 11)) == sorted(BACKEND_REQUESTS)


@pytest.mark.parametrize("code", FrontendRequest, ids=lambda code: code.name)
def test_row_agrees_with_the_specification(code: FrontendRequest) -> None:
    """Name, code and payload size of every row."""
    row = FRONTEND_REQUESTS[code]
    assert (code.value, code.name) == (row.code, row.name)
    due = VARIABLE.get(code.name) or (SIZES[code.name],) * 2
    assert due == row.payload.sizes()


@pytest.mark.parametrize("name", [name for name in dir(wire) if name.startswith(("GET_", "SET_", "ADD_", "REM_"))])
def test_codes_agree_with_the_frontend(name: str) -> None:
    """Two lists of codes, written independently."""
    assert getattr(wire, name) == FrontendRequest[name]


@pytest.mark.parametrize("name", [name for name in dir(wire) if name.startswith("P_")])
def test_protocol_feature_bits_agree_with_the_frontend(name: str) -> None:
    """Two lists of protocol features, written independently."""
    assert getattr(wire, name) == ProtocolFeature[name.removeprefix("P_")].mask


def test_config_change_is_backend_request_2() -> None:
    """The one back-end request that this device has a use for."""
    assert BACKEND_REQUESTS[2].name == BackendRequest.CONFIG_CHANGE_MSG.name
    assert BACKEND_REQUESTS[2].payload.sizes() == (0, 0)


def decode(kind: type[Payload], data: bytes) -> Payload:
    """Decode after the size check that the codec makes."""
    least, greatest = kind.sizes()
    assert least <= len(data) <= greatest
    return kind.decode(data)


@pytest.mark.parametrize("flags", [2, 0x8000_0000, 0xFFFF_FFFF])
def test_reserved_ring_flags_are_invalid(flags: int) -> None:
    """Only VHOST_VRING_F_LOG is defined for SET_VRING_ADDR."""
    with pytest.raises(InvalidPayload, match="reserved ring flags"):
        decode(VringAddr, wire.vring_addr(0, 0, 0, 0, flags=flags))


@pytest.mark.parametrize("value", [0x200, 0x1_0000, 1 << 32, 1 << 63])
def test_reserved_bits_of_a_ring_descriptor_are_invalid(value: int) -> None:
    """Ancestor: DPDK CVE-2020-10723, a ring index checked with more bits than it was used with."""
    with pytest.raises(InvalidPayload, match="reserved bits"):
        decode(VringFd, wire.u64(value))


@pytest.mark.parametrize("count", [0, 2, 8, 9, 0xFFFF_FFFF])
def test_region_count_must_agree_with_the_size(count: int) -> None:
    """One region in the payload, another number in its head."""
    with pytest.raises(InvalidPayload, match="announced"):
        decode(MemoryTable, struct.pack("=II", count, 0) + wire.region(0, 4096, 0))


def test_inflight_comes_with_and_without_padding() -> None:
    """QEMU sends the padding of the C structure, others send the fields alone; a reply has the size of its request."""
    padded = wire.inflight(4096, 0, 2, 256)
    for data in (padded, padded[:20]):
        payload = decode(Inflight, data)
        assert isinstance(payload, Inflight)
        assert (payload.mmap_size, payload.num_queues, payload.queue_size) == (4096, 2, 256)
        assert payload.encode() == data
    with pytest.raises(InvalidPayload):
        decode(Inflight, padded[:22])


def test_rules_with_equal_numbers_are_different_rules() -> None:
    """OPTIONAL and UNLESS_NO_FD_BIT both allow none or one; an alias would lose the agreement with the payload."""
    assert len({rule.name for rule in FdRule}) == len(FdRule.__members__)
    assert FdRule.UNLESS_NO_FD_BIT.expected(VringFd(0, no_fd=True)) == (0, 0)
    assert FdRule.UNLESS_NO_FD_BIT.expected(VringFd(0, no_fd=False)) == (1, 1)
