"""H9: the event queue against its driver; faults are raised in this process, behind the same rings."""

from __future__ import annotations

import resource

import pytest
from conformance.backend import ENDPOINT, SIBLING, Backend
from frontend.guest import POISON, Guest
from frontend.ring import Buffer, quiet

MAPPING, ADDRESS = 2, 0x100


def test_a_million_faults(backend: Backend, guest: Guest) -> None:
    """Constant memory, and all of them sent or counted. QEMU reports each one, and CVE-2016-5403 kept every element."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1_000_000):
        backend.engine.raise_fault(ENDPOINT, MAPPING, ADDRESS, number)
    stats = backend.engine.stats()
    assert stats.faults_dropped > 999_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
    guest.post_event_buffers(32)
    backend.served()
    assert backend.fault(SIBLING, MAPPING)


def test_buffers_that_are_none(backend: Backend, guest: Guest) -> None:
    """Readable, empty, too small: given back, and the report goes into the first that is one."""
    ring, memory = guest.rings[1], guest.memory
    address = memory.allocate(256)
    memory.write(address, bytes([POISON]) * 256)
    ring.add([Buffer(address, 24)])
    ring.add([Buffer(address, 0, writable=True)])
    ring.add([Buffer(address, 23, writable=True)])
    ring.add([Buffer(address, 24), Buffer(address + 64, 23, writable=True)])
    ring.add([Buffer(address, 8), Buffer(address + 128, 24, writable=True)])
    ring.publish()
    ring.kick()
    assert backend.fault(ENDPOINT, MAPPING, ADDRESS, 0x5000)
    assert [used.length for used in ring.wait(5)] == [0, 0, 0, 0, 24]
    assert memory.read(address, 128) == bytes([POISON]) * 128


@pytest.mark.parametrize("address", [0, 0xDEAD_0000, (1 << 64) - 8, 0x4000_0000 + (4 << 20) - 8])
def test_a_buffer_outside_memory(backend: Backend, guest: Guest, address: int) -> None:
    """The event queue breaks; requests are served on."""
    guest.rings[1].submit([Buffer(address, 24, writable=True)])
    assert backend.fault(ENDPOINT, MAPPING)
    assert guest.rings[1].broken()
    assert guest.attach(1, ENDPOINT) == 0
    assert quiet(guest.rings[0].err_fd)


def test_ring_of_events_full_of_small_buffers(backend: Backend, guest: Guest) -> None:
    """The device gives back a whole ring of them for one report, and does not go round for ever."""
    for _ in range(5):
        mark = guest.memory.mark()
        guest.post_event_buffers(200, 8)
        backend.fault(ENDPOINT, MAPPING)
        assert [used.length for used in guest.rings[1].wait(200)] == [0] * 200
        guest.memory.release(mark)
    assert guest.attach(1, ENDPOINT) == 0
