"""What a real device reaches, with a test in the place of QEMU and of the guest: request by request, byte by byte."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.guest import Guest
from frontend.memory import GuestMemory, Ram
from integration.daemon import Daemon
from lab.machine import EDU

from host.edu import Edu
from host.passed import Kind, passed, served

ENDPOINT = 0x10
PAGE = 4096
IOVA = 0x1_0000_0000
STRICT = "[device]\nbypass = false"
KINDS: tuple[Kind, ...] = ("iommufd", "type1")
every_kind = pytest.mark.parametrize("kind", KINDS)

MARK = b"what the device has in its buffer, which no memory has otherwise".ljust(64)
EMPTY = bytes(64)


def load(guest: Guest, edu: Edu, page: int, domain: int) -> None:
    """Put MARK into the device's buffer, through a domain that has nothing at IOVA 0x7000_0000."""
    guest.memory.write(page, MARK)
    assert guest.map(domain, 0x7000_0000, 0x7000_0FFF, page, flags=iommu.READ) == iommu.OK
    edu.read(0x7000_0000)
    assert guest.unmap(domain, 0x7000_0000, 0x7000_0FFF) == iommu.OK
    guest.memory.write(page, EMPTY)


@every_kind
def test_only_what_is_mapped_is_reached(tmp_path: Path, kind: Kind) -> None:
    """Mapped: written.  Read-only, unmapped, detached: not."""
    with served(kind, EDU[0], tmp_path, STRICT) as (_, guest, edu):
        source, target = guest.memory.allocate(PAGE, PAGE), guest.memory.allocate(PAGE, PAGE)
        assert guest.attach(1, ENDPOINT) == iommu.OK
        load(guest, edu, source, 1)
        assert guest.map(1, IOVA, IOVA + PAGE - 1, target) == iommu.OK
        edu.write(IOVA + 128)
        assert guest.memory.read(target + 128, 64) == MARK
        assert guest.memory.read(target, 128) == bytes(128)
        assert guest.map(1, IOVA + PAGE, IOVA + 2 * PAGE - 1, source, flags=iommu.READ) == iommu.OK
        edu.write(IOVA + PAGE)
        assert guest.memory.read(source, 64) == EMPTY
        guest.memory.write(target, bytes(PAGE))
        assert guest.unmap(1, IOVA, IOVA + PAGE - 1) == iommu.OK
        edu.write(IOVA)
        assert guest.memory.read(target, PAGE) == bytes(PAGE)
        assert guest.map(1, IOVA, IOVA + PAGE - 1, target) == iommu.OK
        assert guest.detach(1, ENDPOINT) == iommu.OK
        edu.write(IOVA)
        edu.write(target)
        assert guest.memory.read(target, PAGE) == bytes(PAGE)


@every_kind
def test_bypass_is_all_memory_and_nothing_is_none(tmp_path: Path, kind: Kind) -> None:
    """Without a domain, and in a bypass domain; config.bypass opens and closes at once."""
    with served(kind, EDU[0], tmp_path) as (_, guest, edu):
        target = guest.memory.allocate(PAGE, PAGE)
        guest.memory.write(target, MARK)
        edu.read(target)
        guest.memory.write(target, EMPTY)
        edu.write(target)
        assert guest.memory.read(target, 64) == MARK
        guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, b"\0"))
        guest.memory.write(target, EMPTY)
        edu.write(target)
        assert guest.memory.read(target, 64) == EMPTY
        assert guest.attach(3, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.OK
        edu.write(target)
        assert guest.memory.read(target, 64) == MARK


@every_kind
def test_a_move_changes_what_is_reached(tmp_path: Path, kind: Kind) -> None:
    """The same address leads elsewhere in another domain; a domain that was left with nobody in it is gone."""
    with served(kind, EDU[0], tmp_path, STRICT) as (_, guest, edu):
        source, first, second = (guest.memory.allocate(PAGE, PAGE) for _ in range(3))
        assert guest.attach(1, ENDPOINT) == iommu.OK
        load(guest, edu, source, 1)
        assert guest.map(1, IOVA, IOVA + PAGE - 1, first) == iommu.OK
        edu.write(IOVA)
        assert guest.memory.read(first, 64) == MARK
        guest.memory.write(first, EMPTY)
        assert guest.attach(2, ENDPOINT) == iommu.OK
        edu.write(IOVA)
        assert guest.memory.read(first, 64) == EMPTY
        assert guest.map(2, IOVA, IOVA + PAGE - 1, second) == iommu.OK
        edu.write(IOVA)
        assert (guest.memory.read(first, 64), guest.memory.read(second, 64)) == (EMPTY, MARK)


@every_kind
def test_mappings_follow_memory(tmp_path: Path, kind: Kind) -> None:
    """Memory that is plugged in is reached by the mappings that lead there, and memory that is taken away is not."""
    memory = GuestMemory(Ram(), Ram(gpa=0x8000_0000))
    later = Ram(gpa=0xC000_0000)
    try:
        # Without MMIO a driver may map what is no memory (yet).
        config = f"{STRICT}\nmmio = false"
        with served(kind, EDU[0], tmp_path, config, memory) as (_, guest, edu):
            source = memory.allocate(PAGE, PAGE)
            assert guest.attach(1, ENDPOINT) == iommu.OK
            load(guest, edu, source, 1)
            assert guest.map(1, IOVA, IOVA + PAGE - 1, 0x8000_0000) == iommu.OK
            assert guest.map(1, IOVA + PAGE, IOVA + 2 * PAGE - 1, later.gpa) == iommu.OK
            edu.write(IOVA)
            assert memory.read(0x8000_0000, 64) == MARK
            edu.write(IOVA + PAGE)
            assert bytes(later.bytes[:64]) == EMPTY
            guest.add_memory(later)
            edu.write(IOVA + PAGE)
            assert bytes(later.bytes[:64]) == MARK
            memory.write(0x8000_0000, EMPTY)
            guest.remove_memory(memory.rams[1])
            edu.write(IOVA)
            assert memory.read(0x8000_0000, 64) == EMPTY
            edu.write(IOVA + PAGE + 128)
            assert bytes(later.bytes[128:192]) == MARK
            guest.remove_memory(later)
    finally:
        later.close()


@every_kind
def test_what_the_host_can_do_reaches_the_guest(tmp_path: Path, kind: Kind) -> None:
    """The input range ends where the IOMMU's addresses do, and its window for interrupts is the MSI region."""
    assert platform.machine() == "aarch64"
    with served(kind, EDU[0], tmp_path) as (_, guest, _edu):
        config = guest.config()
        assert config.input_last < 1 << 52
        assert config.input_last + 1 & config.input_last == 0
        assert config.page_size_mask & -config.page_size_mask == PAGE
        reply = guest.probe(ENDPOINT)
        assert iommu.reserved_regions(reply.data) == [iommu.ReservedRegion(1, 0x0800_0000, 0x080F_FFFF)]


def test_memory_is_taken_from_the_monitor(tmp_path: Path) -> None:
    """The test has mapped all memory as QEMU does, and viommud finds it: nothing comes from files."""
    with served("iommufd", EDU[0], tmp_path) as (daemon, _guest, _):
        taken = daemon.logged("host-memory")
        assert (taken["source"], taken["bytes"]) == ("monitor", 4 << 20)


def test_a_container_of_another_kind_is_refused(tmp_path: Path) -> None:
    """One clear line, and status 2."""
    with passed("iommufd", EDU[0]) as device:
        config = '[[endpoint]]\nid = "00:02.0"\nhost.container = "c"\n'
        fd = device.shared["iommufd"]
        with Daemon(tmp_path, "--pass-fd", f"c={fd}", config=config, pass_fds=[fd]) as daemon:
            assert daemon.wait() == 2
            assert "a VFIO container is needed" in daemon.log_text
