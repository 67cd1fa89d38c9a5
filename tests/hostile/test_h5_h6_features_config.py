"""H5 and H6: features that were not offered, messages out of order, and configuration space."""

from __future__ import annotations

import random
import struct

import pytest
from frontend import iommu, wire

from hostile.victim import ENDPOINT, Victim, turned_down


def test_features_are_checked_bit_by_bit(victim: Victim) -> None:
    """No bit that was not offered is accepted, before, while and after rings run."""
    with victim.guest() as guest:
        client, good = guest.client, guest.features
        bases = None
        for _ in range(2):
            for bit in range(64):
                if not good >> bit & 1 and 1 << bit != wire.F_LOG_ALL:
                    assert client.acknowledged(wire.SET_FEATURES, wire.u64(good | 1 << bit)) != 0
            guest.start(bases)
            assert client.acknowledged(wire.SET_FEATURES, wire.u64(good)) == 0
            assert client.acknowledged(wire.SET_FEATURES, wire.u64(good & ~iommu.F_MMIO)) != 0
            assert guest.attach(1, ENDPOINT) == iommu.OK
            bases = guest.stop()


@pytest.mark.parametrize("bit", [2, 4, 6, 7, 8, 10, 11, 14, 17, 18, 19, 20, 40, 63])
def test_protocol_features_that_were_not_offered(victim: Victim, bit: int) -> None:
    """Whoever counts on them would wait for ever: the connection ends."""
    with victim.connect() as client:
        offered = client.ask(wire.GET_PROTOCOL_FEATURES).u64
        assert not offered >> bit & 1
        client.send(wire.SET_PROTOCOL_FEATURES, wire.u64(offered | 1 << bit))
        assert client.ended()


def test_messages_in_any_order(victim: Victim) -> None:
    """Hundreds of sessions of good messages in a bad order: refused or granted, never worse."""
    rng = random.Random(7)
    state = [wire.SET_VRING_NUM, wire.SET_VRING_BASE, wire.SET_VRING_ENABLE]
    for _ in range(40):
        with victim.negotiated() as client:
            for _ in range(40):
                match rng.randrange(7):
                    case 0:
                        client.acknowledged(rng.choice(state), wire.vring_state(rng.randrange(3), rng.randrange(3)))
                    case 1:
                        client.acknowledged(wire.SET_STATUS, wire.u64(rng.choice((0, 1, 15, 64, 255, 256))))
                    case 2:
                        client.acknowledged(rng.choice((wire.RESET_DEVICE, wire.RESET_OWNER, wire.SET_OWNER)))
                    case 3:
                        client.get_base(rng.randrange(2))
                    case 4:
                        addresses = [rng.choice((0, 4096, 1 << 63)) for _ in range(3)]
                        client.acknowledged(wire.SET_VRING_ADDR, wire.vring_addr(rng.randrange(2), *addresses))
                    case 5:
                        client.ask(wire.GET_STATUS)
                    case _:
                        client.ask(wire.GET_FEATURES)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 41), (40, 1), (41, 1), (0, 256), (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 40), (0, 0), (36, 5)]
)
def test_config_outside(victim: Victim, offset: int, size: int) -> None:
    """Neither read nor written. CVE-2020-10724: a length of the peer was believed."""
    with victim.negotiated() as client:
        assert turned_down(client, wire.SET_CONFIG, wire.config(offset, b"\xff" * size))
    with victim.negotiated() as client:
        client.send(wire.GET_CONFIG, wire.config(offset, bytes(size)))
        assert client.receive().payload == b"", "an answer that says no"


@pytest.mark.parametrize(("said", "sent"), [(40, 39), (4, 40), (256, 4), (0xFFFF_FFFF, 4)])
def test_config_whose_size_is_not_that_of_the_message(victim: Victim, said: int, sent: int) -> None:
    """No message. CVE-2023-50711."""
    for code in (wire.GET_CONFIG, wire.SET_CONFIG):
        with victim.negotiated() as client:
            client.send(code, struct.pack("=III", 0, said, 0) + bytes(sent))
            assert client.ended()


@pytest.mark.parametrize("flags", [2, 3, 0x8000_0000, 0xFFFF_FFFF])
def test_config_with_flags_that_there_are_not(victim: Victim, flags: int) -> None:
    """No message."""
    with victim.negotiated() as client:
        client.send(wire.SET_CONFIG, wire.config(0, bytes(40), flags=flags))
        assert client.ended()


@pytest.mark.parametrize("flags", [0, 1])
def test_config_is_written_whole(victim: Victim, flags: int) -> None:
    """As QEMU does it, by the driver or for migration: bypass at most has changed, and is 0 or 1."""
    with victim.guest() as guest:
        before = guest.client.get_config(40)
        for value in (2, 255, 0):
            data = b"\xee" * 36 + bytes([value]) + b"\xee" * 3
            guest.client.send(wire.SET_CONFIG, wire.config(0, data, flags=flags))
        assert guest.client.get_config(40) == before
