"""Feature negotiation, gating, acknowledgements, status, owner and configuration space of a session."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
from frontend import wire

from unit.vhost_user.fake_device import CONFIG_SIZE, FEATURES, Eventfd, Harness
from viommud.vhost_user.errors import RemoteProtocolError
from viommud.vhost_user.features import OFFERED_PROTOCOL_MASK
from viommud.vhost_user.messages import FRONTEND_REQUESTS
from viommud.vhost_user.session import SessionLimits

SPLIT = FEATURES & ~wire.F_RING_PACKED


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A session before its first message."""
    with Harness() as harness:
        yield harness


def test_offered_features(harness: Harness) -> None:
    """The device's, and the one that says there are protocol features; never LOG_ALL, which would reach the guest."""
    assert harness.ask(wire.GET_FEATURES).u64 == FEATURES | wire.F_PROTOCOL_FEATURES


def test_offered_protocol_features(harness: Harness) -> None:
    """Exactly the implemented ones: bits that QEMU accepts without implementing them are not among them."""
    offered = harness.ask(wire.GET_PROTOCOL_FEATURES).u64
    assert sum(1 << bit for bit in (0, 1, 3, 5, 9, 12, 13, 15, 16, 21)) == offered == OFFERED_PROTOCOL_MASK


def test_features_reach_the_device_without_vhost_user_bits(harness: Harness) -> None:
    """The device sees what the driver has negotiated."""
    harness.negotiate()
    assert ("set_driver_features", SPLIT) in harness.device.calls


@pytest.mark.parametrize("bit", [7, 33, 38, 40, 63])
def test_features_that_were_not_offered(harness: Harness, bit: int) -> None:
    """Refused, with the bits; nothing reaches the device."""
    harness.negotiate()
    before = len(harness.device.calls)
    reason = harness.refuse(wire.SET_FEATURES, wire.u64(SPLIT | wire.F_PROTOCOL_FEATURES | 1 << bit))
    assert f"{1 << bit:#x} were not offered" in reason
    assert before == len(harness.device.calls)


def test_features_twice(harness: Harness) -> None:
    """A driver may be replaced by another; the same set again changes nothing."""
    harness.negotiate()
    harness.grant(wire.SET_FEATURES, wire.u64(SPLIT | wire.F_PROTOCOL_FEATURES))
    assert harness.device.names().count("set_driver_features") == 1
    harness.grant(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    assert harness.device.features == wire.F_VERSION_1


def test_logging_is_switched_on_live_rings(harness: Harness) -> None:
    """QMP calc-dirty-rate sets bit 26, which was never offered, while rings run, and clears it again."""
    harness.ready().start()
    features = SPLIT | wire.F_PROTOCOL_FEATURES
    harness.grant(wire.SET_FEATURES, wire.u64(features | wire.F_LOG_ALL))
    assert harness.device.logging
    harness.grant(wire.SET_FEATURES, wire.u64(features))
    assert not harness.device.logging
    assert sorted(harness.device.running) == [0, 1]
    assert harness.device.names().count("set_driver_features") == 1


def test_logging_needs_its_protocol_feature(harness: Harness) -> None:
    """Without LOG_SHMFD there is no log to write to."""
    harness.negotiate(protocol=OFFERED_PROTOCOL_MASK & ~wire.P_LOG_SHMFD)
    harness.refuse(wire.SET_FEATURES, wire.u64(SPLIT | wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL))


def test_driver_features_cannot_change_under_a_running_ring(harness: Harness) -> None:
    """The ring format and the rules for requests depend on them."""
    harness.ready().start()
    reason = harness.refuse(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES))
    assert "while a ring runs" in reason


@pytest.mark.parametrize("bit", [2, 4, 10, 14, 17, 19, 22, 23, 63])
def test_protocol_features_that_were_not_offered(harness: Harness, bit: int) -> None:
    """The front-end would act on them, so the connection ends."""
    with pytest.raises(RemoteProtocolError, match="were not offered"):
        harness.send(wire.SET_PROTOCOL_FEATURES, wire.u64(OFFERED_PROTOCOL_MASK | 1 << bit))


def test_protocol_features_are_settled_before_memory(harness: Harness) -> None:
    """Regions mean something else with GPA_ADDRESSES."""
    harness.ready()
    reason = harness.refuse(wire.SET_PROTOCOL_FEATURES, wire.u64(OFFERED_PROTOCOL_MASK & ~wire.P_GPA_ADDRESSES))
    assert "once guest memory is set" in reason
    harness.grant(wire.SET_PROTOCOL_FEATURES, wire.u64(OFFERED_PROTOCOL_MASK))


# Acknowledgements


def test_need_reply_before_negotiation_is_ignored(harness: Harness) -> None:
    """Nobody has agreed yet on what the flag means."""
    assert harness.send(wire.SET_OWNER, need_reply=True) is None
    assert harness.send(wire.SET_PROTOCOL_FEATURES, wire.u64(wire.P_REPLY_ACK), need_reply=True) is None
    assert harness.ack(wire.SET_FEATURES, wire.u64(wire.F_VERSION_1)) == 0


def test_a_refusal_without_need_reply_is_only_logged(harness: Harness) -> None:
    """There is nobody to tell; the connection goes on."""
    harness.negotiate()
    assert harness.send(wire.SET_VRING_NUM, wire.vring_state(9, 256)) is None
    assert harness.reasons() == ["ring 9 does not exist, there are 2"]
    assert harness.ask(wire.GET_QUEUE_NUM).u64 == 2


def test_a_request_with_its_own_reply_is_not_acknowledged_as_well(harness: Harness) -> None:
    """NEED_REPLY changes nothing for those (vhost-user.rst, REPLY_ACK)."""
    harness.negotiate()
    answer = harness.send(wire.GET_QUEUE_NUM, need_reply=True)
    assert answer is not None
    assert answer.u64 == 2


NEEDS = {code: row for code, row in FRONTEND_REQUESTS.items() if row.needs is not None}


@pytest.mark.parametrize("code", sorted(NEEDS))
def test_a_request_whose_protocol_feature_is_not_negotiated(code: int) -> None:
    """Refused by its row; a request that cannot be told no ends the connection."""
    row = NEEDS[code]
    assert row.needs is not None
    with Harness() as harness:
        harness.negotiate(protocol=OFFERED_PROTOCOL_MASK & ~row.needs.mask)
        before = list(harness.device.calls)
        payload = row.payload.decode(bytes(row.payload.sizes()[0])).encode()
        fds = [os.eventfd(0) for _ in range(row.fds.least)]
        try:
            if row.reply is not None and row.refusal is None:
                with pytest.raises(RemoteProtocolError, match=f"{row.needs.name} is not negotiated"):
                    harness.send(code, payload, fds)
            else:
                harness.send(code, payload, fds, need_reply=True)
                assert f"protocol feature {row.needs.name} is not negotiated" in harness.reasons()[-1]
        finally:
            for fd in fds:
                os.close(fd)
        assert before == harness.device.calls


@pytest.mark.parametrize(("code", "size", "fds"), [(33, 0, 1), (22, 32, 0)])
def test_requests_for_other_devices(harness: Harness, code: int, size: int, fds: int) -> None:
    """GPU_SET_SOCKET and IOTLB_MSG need no protocol feature and are of no use here."""
    harness.negotiate()
    with Eventfd() as event:
        answer = harness.send(code, bytes(size), [event.fd] * fds, need_reply=True)
    assert answer is not None
    assert answer.u64 != 0
    assert harness.reasons() == ["this device has no use for it"]


def test_repeated_refusals_do_not_flood_the_log(harness: Harness) -> None:
    """Ancestor: DPDK 98b5ecbf76.  They are counted, and the count is in the lines that are written."""
    harness.negotiate()
    for _ in range(10_000):
        harness.send(wire.SET_VRING_NUM, wire.vring_state(9, 256))
    assert harness.session.refused["SET_VRING_NUM"] == 10_000
    assert len(harness.reasons()) == 8 + 10
    assert harness.lines[-1].kwargs["count"] == 8192


# Owner, queues, back-end channel


def test_owner(harness: Harness) -> None:
    """One owner; RESET_OWNER disables the rings and lets the next come, and keeps everything else."""
    harness.ready().start()
    assert "owner already" in harness.refuse(wire.SET_OWNER)
    harness.grant(wire.RESET_OWNER)
    assert not harness.device.running
    assert harness.device.resets == 0
    assert len(harness.device.memory) == 1
    harness.grant(wire.SET_OWNER)


def test_without_an_owner_everything_works(harness: Harness) -> None:
    """The message marks the start of a session; nothing depends on it."""
    harness.send(wire.SET_PROTOCOL_FEATURES, wire.u64(OFFERED_PROTOCOL_MASK))
    harness.grant(wire.SET_FEATURES, wire.u64(SPLIT | wire.F_PROTOCOL_FEATURES))
    harness.add_ram()
    harness.start()
    assert sorted(harness.device.running) == [0, 1]


def test_memory_slots_are_configurable() -> None:
    """What the session says is what it allows."""
    with Harness(limits=SessionLimits(memory_slots=3)) as harness:
        harness.negotiate()
        assert harness.ask(wire.GET_MAX_MEM_SLOTS).u64 == 3
    with Harness() as harness:
        harness.negotiate()
        assert harness.ask(wire.GET_MAX_MEM_SLOTS).u64 == 509


def test_backend_channel(harness: Harness) -> None:
    """It is handed out once; a second one replaces the first; anything but a stream socket is refused."""
    harness.negotiate()
    left, right = socket.socketpair()
    with left, right:
        harness.grant(wire.SET_BACKEND_REQ_FD, fds=[left.fileno()])
        harness.grant(wire.SET_BACKEND_REQ_FD, fds=[left.fileno()])
        channel = harness.session.take_backend_channel()
        assert channel is not None
        with channel:
            assert harness.session.take_backend_channel() is None
            assert os.fstat(channel.fileno()).st_ino == os.fstat(left.fileno()).st_ino
        with Eventfd() as event:
            assert "not a UNIX stream socket" in harness.refuse(wire.SET_BACKEND_REQ_FD, fds=[event.fd])
        harness.grant(wire.SET_BACKEND_REQ_FD, fds=[left.fileno()])


# Status


def test_status_is_remembered_and_shows_needs_reset(harness: Harness) -> None:
    """The device's own bit is added, and cannot be set by the front-end."""
    harness.negotiate()
    harness.grant(wire.SET_STATUS, wire.u64(0xB))
    assert harness.ask(wire.GET_STATUS).u64 == 0xB
    harness.device.needs_reset = True
    assert harness.ask(wire.GET_STATUS).u64 == 0x4B
    harness.device.needs_reset = False
    harness.grant(wire.SET_STATUS, wire.u64(0x4F))
    assert harness.ask(wire.GET_STATUS).u64 == 0xF


@pytest.mark.parametrize("status", [0x100, 1 << 32, (1 << 64) - 1])
def test_status_has_8_bits(harness: Harness, status: int) -> None:
    """Refused, and the old one stays."""
    harness.negotiate()
    harness.refuse(wire.SET_STATUS, wire.u64(status))
    assert harness.ask(wire.GET_STATUS).u64 == 0


# Configuration space


def test_config_is_read_in_any_piece(harness: Harness) -> None:
    """The reply repeats offset, size and flags."""
    harness.negotiate()
    for offset, size in ((0, CONFIG_SIZE), (36, 1), (39, 1), (8, 8)):
        payload = wire.config(offset, bytes(harness.device.config[offset : offset + size]))
        assert payload == harness.ask(wire.GET_CONFIG, wire.config(offset, bytes(size))).payload


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 41), (40, 1), (39, 2), (0, 256), (0xFFFF_FFFF, 1), (0xFFFF_FFD8, 40), (0, 0)]
)
def test_config_outside(harness: Harness, offset: int, size: int) -> None:
    """Reading is answered with no payload, writing is refused; sums do not wrap at 32 bits."""
    harness.negotiate()
    assert harness.ask(wire.GET_CONFIG, wire.config(offset, bytes(size))).payload == b""
    harness.refuse(wire.SET_CONFIG, wire.config(offset, bytes(size)))
    assert not {"config_read", "config_write"} & set(harness.device.names())


def test_config_is_written_whole(harness: Harness) -> None:
    """QEMU's generic device writes all of it for one byte of the guest's."""
    harness.negotiate()
    data = bytes([0xEE] * CONFIG_SIZE)
    harness.grant(wire.SET_CONFIG, wire.config(0, data))
    assert ("config_write", 0, data, False) == harness.device.calls[-1]
    harness.grant(wire.SET_CONFIG, wire.config(36, b"\x01", flags=1))
    assert harness.device.calls[-1] == ("config_write", 36, b"\x01", True)


def test_config_write_that_the_device_refuses(harness: Harness) -> None:
    """The refusal reaches the front-end and the log."""
    harness.negotiate()
    harness.device.refuse = "config_write"
    assert harness.refuse(wire.SET_CONFIG, wire.config(36, b"\x02")) == "config_write does not want to"
