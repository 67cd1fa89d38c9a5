"""The NVMe controller driven over its socket: admin and I/O commands, data pointers, interrupts, misbehaviour."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from devices.client import INTX, Client, RefusedError, shared_memory
from devices.nvme_driver import (
    ABORT,
    BASE,
    CC,
    CREATE_CQ,
    CREATE_SQ,
    CSTS,
    DATA,
    DELETE_CQ,
    DELETE_SQ,
    EVENT_REQUEST,
    FLUSH,
    GET_FEATURES,
    IDENTIFY,
    LISTS,
    LOG_PAGE,
    PAGE,
    READ,
    SET_FEATURES,
    WRITE,
    NvmeDriver,
    vector_eventfd,
)
from devices.process import Device

MEMORY = 8 << 20
DO_NOT_RETRY = 0x4000


@contextlib.contextmanager
def driven(device: Device, *, messages: bool = False, io_queues: bool = True) -> Iterator[NvmeDriver]:
    """A driver on a running controller."""
    with shared_memory(MEMORY) as (fd, memory), Client(device.socket) as client:
        driver = NvmeDriver(client, memory)
        client.on_dma = driver.serve_dma
        driver.enable()
        driver.map_all(None if messages else fd)
        driver.start()
        if io_queues:
            driver.create_io_queues()
        yield driver


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Device]:
    """A controller with 16 MiB of memory as its medium."""
    with Device("nvme", tmp_path / "disk0", "--memory", "16M") as device:
        yield device


def test_identify(nvme: Device) -> None:
    """Controller, namespace, namespace list and descriptors are what Linux's driver needs to bind."""
    with driven(nvme, io_queues=False) as driver:
        controller = driver.identify(1)
        assert controller[4:24] == b"disk0".ljust(20)
        assert (controller[77], controller[111], controller[512:514]) == (9, 1, b"\x66\x44")
        assert struct.unpack_from("<I", controller, 516) == (1,)
        assert controller[768:].startswith(b"nqn.2014-08.org.nvmexpress:viommud:disk0\0")
        namespace = driver.identify(0, 1)
        assert struct.unpack_from("<QQQ", namespace) == ((16 << 20) // 512,) * 3
        assert namespace[130] == 9
        assert driver.identify(2)[:8] == struct.pack("<II", 1, 0)
        assert driver.identify(2, 1)[:4] == bytes(4)
        assert driver.identify(3, 1)[:4] == b"\x01\x08\0\0"
        assert driver.admin(IDENTIFY, 2, BASE + DATA, dw10=0)[0] == 0x0B | DO_NOT_RETRY
        assert driver.admin(IDENTIFY, 0, BASE + DATA, dw10=0x77)[0] == 0x02 | DO_NOT_RETRY


def test_two_controllers_differ(tmp_path: Path) -> None:
    """Serial number, NQN and EUI-64 follow the socket's name or --serial, or Linux would join the two."""
    seen = set()
    with Device("nvme", tmp_path / "a") as one, Device("nvme", tmp_path / "b", "--serial", "b2") as two:
        for device in (one, two):
            with driven(device, io_queues=False) as driver:
                controller = driver.identify(1)
                seen |= {controller[4:24], controller[768:1024], driver.identify(0, 1)[120:128]}
    assert len(seen) == 6


def test_features_logs_and_the_rest_of_admin(nvme: Device) -> None:
    """Queue counts, kept features, log pages, Abort, event requests up to their limit, unknown opcodes."""
    with driven(nvme, io_queues=False) as driver:
        assert driver.admin(SET_FEATURES, dw10=7, dw11=0xFFFEFFFE) == (0, 0x70007)
        assert driver.admin(SET_FEATURES, dw10=0x0B, dw11=0x300)[0] == 0
        assert driver.admin(GET_FEATURES, dw10=0x0B) == (0, 0x300)
        assert driver.admin(GET_FEATURES, dw10=0x0D)[0] == 0x02 | DO_NOT_RETRY
        assert driver.admin(LOG_PAGE, 0xFFFFFFFF, BASE + DATA, dw10=127 << 16 | 2)[0] == 0
        assert struct.unpack_from("<H", driver.memory, DATA + 1) == (300,)
        assert driver.admin(LOG_PAGE, 0, BASE + DATA, dw10=127 << 16 | 9)[0] == 0x109 | DO_NOT_RETRY
        assert driver.admin(ABORT, dw10=5 << 16 | 1) == (0, 1)
        for _ in range(4):
            driver.submit(0, EVENT_REQUEST)
        assert driver.admin(EVENT_REQUEST)[0] == 0x105 | DO_NOT_RETRY
        assert driver.admin(0x7F)[0] == 0x01 | DO_NOT_RETRY


def test_queues_are_created_and_deleted_in_order(nvme: Device) -> None:
    """A submission queue needs its completion queue, which stays while it is used; ids, sizes, vectors are checked."""
    one = 7 << 16 | 1
    with driven(nvme, io_queues=False) as driver:
        assert driver.admin(CREATE_SQ, prp1=BASE, dw10=one, dw11=1 << 16 | 1)[0] == 0x100 | DO_NOT_RETRY
        assert driver.admin(CREATE_CQ, prp1=BASE, dw10=7 << 16 | 9, dw11=1)[0] == 0x101 | DO_NOT_RETRY
        assert driver.admin(CREATE_CQ, prp1=BASE, dw10=1, dw11=1)[0] == 0x102 | DO_NOT_RETRY
        assert driver.admin(CREATE_CQ, prp1=BASE + 8, dw10=one, dw11=1)[0] == 0x02 | DO_NOT_RETRY
        assert driver.admin(CREATE_CQ, prp1=BASE, dw10=one, dw11=9 << 16 | 3)[0] == 0x108 | DO_NOT_RETRY
        driver.create_io_queues()
        assert driver.admin(CREATE_CQ, prp1=BASE, dw10=one, dw11=1)[0] == 0x101 | DO_NOT_RETRY
        assert driver.admin(DELETE_CQ, dw10=1)[0] == 0x10C | DO_NOT_RETRY
        assert driver.admin(DELETE_SQ, dw10=1)[0] == 0
        assert driver.admin(DELETE_SQ, dw10=1)[0] == 0x101 | DO_NOT_RETRY
        assert driver.admin(DELETE_CQ, dw10=1)[0] == 0
        driver.tails[1] = driver.heads[1] = 0
        driver.phases[1] = 1
        driver.create_io_queues()


@pytest.mark.parametrize("messages", [False, True], ids=["mapped", "messages"])
def test_reads_return_what_writes_wrote(nvme: Device, messages: bool) -> None:
    """One block, one page, two pages and long lists of scattered pages, with the queues wrapping several times."""
    chance = random.Random(4)
    with driven(nvme, messages=messages) as driver:
        for pages, offset in [(1, 0), (1, 512), (2, 0), (2, 1024), (3, 0), (32, 512), (256, 0), (512, 0), (512, 2048)]:
            length = pages * PAGE - offset if offset else pages * PAGE
            room = range(DATA, MEMORY - PAGE, PAGE)
            places = chance.sample(room, pages)
            data = chance.randbytes(length)
            prp1, prp2 = BASE + places[0] + offset, 0
            if pages == 2:
                prp2 = BASE + places[1]
            elif pages > 2:
                entries = struct.pack(f"<{pages - 1}Q", *(BASE + place for place in places[1:]))
                # The list begins in the middle of a page, and so needs a second one when it is long.
                start = LISTS + 0x800
                room_here = (PAGE - 0x800) // 8
                if pages - 1 > room_here:
                    cut = (room_here - 1) * 8
                    driver.memory[start : start + cut + 8] = entries[:cut] + struct.pack("<Q", BASE + LISTS + PAGE)
                    driver.memory[LISTS + PAGE : LISTS + PAGE + len(entries) - cut] = entries[cut:]
                else:
                    driver.memory[start : start + len(entries)] = entries
                prp2 = BASE + start
            pieces = [(places[0] + offset, min(PAGE - offset, length))] + [(place, PAGE) for place in places[1:]]
            at = 0
            for place, size in pieces:
                driver.memory[place : place + size] = data[at : at + size]
                at += size
            lba = chance.randrange(0, (16 << 20) // 512 - length // 512)
            assert driver.io(WRITE, lba, length // 512, prp1, prp2) == 0
            for place, size in pieces:
                driver.memory[place : place + size] = bytes(size)
            assert driver.io(FLUSH, 0, 1, 0) == 0
            assert driver.io(READ, lba, length // 512, prp1, prp2) == 0
            assert b"".join(driver.memory[place : place + size] for place, size in pieces) == data
    summary = nvme.stop()
    assert (summary["reads"], summary["writes"], summary["flushes"], summary["failed_commands"]) == (9, 9, 9, 0)
    assert summary["read_bytes"] == summary["written_bytes"] > 5 << 20
    assert summary["reachable_peak_bytes"] == MEMORY
    assert 0 < summary["touched_bytes"] < MEMORY
    assert (summary["dma_read_messages"] > 0) == messages


def test_bad_io_commands_are_refused(nvme: Device) -> None:
    """Beyond the medium, beyond the largest transfer, another namespace, SGLs, odd PRPs, unreachable data."""
    blocks = (16 << 20) // 512
    with driven(nvme) as driver:
        assert driver.io(READ, blocks - 1, 2, BASE + DATA) == 0x80 | DO_NOT_RETRY
        assert driver.io(READ, (1 << 64) - 1, 1, BASE + DATA) == 0x80 | DO_NOT_RETRY
        assert driver.io(READ, 0, 4097, BASE + DATA) == 0x02 | DO_NOT_RETRY
        assert driver.io(READ, 0, 1, BASE + DATA, nsid=2) == 0x0B | DO_NOT_RETRY
        assert driver.io(READ, 0, 1, BASE + DATA, flags=0x40) == 0x02
        assert driver.io(READ, 0, 1, BASE + DATA + 1) == 0x13
        assert driver.io(READ, 0, 16, BASE + DATA, BASE + DATA + 4) == 0x13
        assert driver.io(0x55, 0, 1, BASE + DATA) == 0x01 | DO_NOT_RETRY

        def refuse(command: int, address: int, count: int, data: bytes) -> bytes:
            raise OSError(errno.EFAULT, "not mapped")

        driver.client.on_dma = refuse
        assert driver.io(READ, 0, 1, 0x6000) == 0x04
        assert driver.io(WRITE, 0, 32, BASE + DATA, 0x6000) == 0x04
        assert driver.io(READ, 0, 8, BASE + DATA) == 0
    assert nvme.stop()["failed_commands"] == 10


def test_a_file_is_a_medium(tmp_path: Path) -> None:
    """What the guest writes is in the file, and what is in the file can be read."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"in the file".ljust(1 << 20, b"\0"))
    with Device("nvme", tmp_path / "s", "--file", str(disk)) as nvme, driven(nvme) as driver:
        assert driver.io(READ, 0, 1, BASE + DATA) == 0
        assert driver.memory[DATA : DATA + 11] == b"in the file"
        driver.memory[DATA : DATA + 12] = b"by the guest"
        assert driver.io(WRITE, 3, 1, BASE + DATA) == 0
        assert driver.io(FLUSH, 0, 1, 0) == 0
        assert disk.read_bytes()[1536:1548] == b"by the guest"


def test_interrupts(nvme: Device) -> None:
    """Completions fire the vector of their queue; INTx follows the queues and INTMS."""
    with driven(nvme) as driver:
        admin, io = vector_eventfd(driver.client, 0), vector_eventfd(driver.client, 1)
        try:
            assert driver.io(READ, 0, 1, BASE + DATA) == 0
            assert select.select([io], [], [], 60)[0] == [io]
            with pytest.raises(BlockingIOError):
                os.eventfd_read(admin)
            assert driver.admin(GET_FEATURES, dw10=1)[0] == 0
            assert os.eventfd_read(admin) == 1
        finally:
            os.close(admin)
            os.close(io)
        driver.client.set_irqs(0x21, 2, 0, 0)  # MSI-X off
        line = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            driver.client.set_irqs(0x24, INTX, 0, 1, [line])
            driver.submit(1, READ, 1, BASE + DATA)
            driver.client.read(CSTS)
            assert os.eventfd_read(line) == 1
            driver.client.set_irqs(0x11, INTX, 0, 1)
            assert os.eventfd_read(line) == 1  # not acknowledged yet: still high
            driver.client.write(0x0C, 1)
            driver.client.set_irqs(0x11, INTX, 0, 1)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(line)
            driver.client.write(0x10, 1)
            assert os.eventfd_read(line) == 1
            driver.wait(1)
            driver.client.set_irqs(0x11, INTX, 0, 1)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(line)
        finally:
            os.close(line)


def test_no_msix_with_intx_option(tmp_path: Path) -> None:
    """With --intx there are no vectors and no such capability."""
    with Device("nvme", tmp_path / "s", "--intx") as nvme, Client(nvme.socket) as client:
        client.version()
        assert client.irq_info(2) == (0, 0)
        assert client.read(0x41, 1, 7) == 0


def test_disable_and_enable_again(nvme: Device) -> None:
    """CC.EN off forgets the queues, and the controller comes up anew; also after DEVICE_RESET."""
    with driven(nvme) as driver:
        assert driver.io(READ, 0, 1, BASE + DATA) == 0
        driver.client.write(CC, 0x460000)
        assert driver.client.read(CSTS) == 0
        driver.start()
        driver.create_io_queues()
        assert driver.io(READ, 0, 1, BASE + DATA) == 0
        driver.client.reset()
        driver.client.bus_master()
        driver.start()
        driver.create_io_queues()
        driver.client.write(CC, 0x464001)
        assert driver.client.read(CSTS) & 0xC == 8


def test_a_full_completion_queue_holds_commands_back(nvme: Device) -> None:
    """No completion is overwritten before the driver took it."""
    with driven(nvme) as driver:
        ids = [driver.submit(1, READ, 1, BASE + DATA) for _ in range(7)]
        driver.client.read(CSTS)
        ids += [driver.submit(1, READ, 1, BASE + DATA) for _ in range(6)]
        assert [driver.wait(1)[0] for _ in ids] == ids


def test_a_reset_in_the_middle_of_a_transfer(nvme: Device) -> None:
    """A controller disabled while its DMA waits writes nothing more, and works again when it is enabled."""
    with driven(nvme, messages=True) as driver:
        seen: list[int] = []

        def disable_meanwhile(command: int, address: int, count: int, data: bytes) -> bytes:
            if address >= BASE + DATA:
                driver.client.send(10, struct.pack("<QIII", CC, 0, 4, 0x460000), flags=0x10)
            seen.append(address)
            return driver.serve_dma(command, address, count, data)

        driver.client.on_dma = disable_meanwhile
        places = [DATA + 2 * PAGE * i for i in range(8)]  # apart, so each is a message of its own
        driver.memory[LISTS : LISTS + 56] = struct.pack("<7Q", *(BASE + place for place in places[1:]))
        driver.submit(1, READ, 1, BASE + DATA, BASE + LISTS, dw12=63)
        while not any(address >= BASE + DATA for address in seen):
            assert driver.client.serve_one() is None
        assert driver.client.read(CSTS) == 0
        assert [address for address in seen if address >= BASE + DATA] == [BASE + DATA]
        driver.client.on_dma = driver.serve_dma
        driver.start()
        driver.create_io_queues()
        assert driver.io(READ, 0, 1, BASE + DATA) == 0


def test_die_after(tmp_path: Path) -> None:
    """With --die-after the process ends in the middle of that command's data: half is there, no completion."""
    with Device("nvme", tmp_path / "s", "--die-after", "3") as nvme, driven(nvme) as driver:
        driver.memory[DATA : DATA + PAGE] = b"x" * PAGE
        for _ in range(2):
            assert driver.io(WRITE, 0, 8, BASE + DATA) == 0
        driver.memory[DATA : DATA + PAGE] = bytes(PAGE)
        driver.submit(1, READ, 1, BASE + DATA, dw12=7)
        assert nvme.wait() == 70
        assert driver.memory[DATA : DATA + PAGE] == b"x" * (PAGE // 2) + bytes(PAGE // 2)
        assert driver.completed(1) is None
        assert nvme.wait_event("died")["io_command"] == 3


def test_mute_after(tmp_path: Path) -> None:
    """With --mute-after that command and every later message stay unanswered."""
    with Device("nvme", tmp_path / "s", "--mute-after", "2") as nvme:
        with shared_memory(MEMORY) as (fd, memory), Client(nvme.socket, patience=0.5) as client:
            driver = NvmeDriver(client, memory)
            driver.enable()
            driver.map_all(fd)
            driver.start()
            driver.create_io_queues()
            assert driver.io(READ, 0, 1, BASE + DATA) == 0
            driver.submit(1, READ, 1, BASE + DATA)
            nvme.wait_event("muted")
            with pytest.raises(TimeoutError):
                client.read(CSTS)
            assert driver.completed(1) is None
        assert nvme.stop()["reads"] == 1


def test_rogue_accesses_are_reported(tmp_path: Path) -> None:
    """Reads and writes outside the mappings, and the search of whole files, report what they got; I/O goes on."""
    options = ["--rogue-read", "0x6000", "--rogue-write", "0x7000", "--rogue-at", "2", "--rogue-scan", "top secret"]
    with (
        Device("nvme", tmp_path / "s", *options) as nvme,
        shared_memory(MEMORY) as (fd, memory),
        Client(nvme.socket) as client,
    ):
        driver = NvmeDriver(client, memory)
        driver.enable()
        client.dma_map(BASE, MEMORY // 2, fd)
        memory[MEMORY - 100 : MEMORY - 90] = b"top secret"
        driver.start()
        driver.create_io_queues()
        assert driver.io(READ, 0, 1, BASE + DATA) == 0
        assert driver.io(READ, 0, 1, BASE + DATA) == 0
        assert nvme.wait_event("rogue_scan") == {"event": "rogue_scan", "files": 1, "bytes": MEMORY, "found": 1}
        read = nvme.wait_event("rogue_read")
        assert (read["mapped"], read["errno"], read["by_message"]) == (False, errno.EFAULT, "")
        assert nvme.wait_event("rogue_write")["errno"] == errno.EFAULT


def test_rogue_command_reads_where_it_is_told(nvme: Device) -> None:
    """The vendor specific admin command tries an address through the mapping and by a message."""
    with driven(nvme, io_queues=False) as driver:
        driver.memory[DATA : DATA + 4] = b"\x01\x02\x03\x04"
        assert driver.admin(0xC0, dw10=DATA, dw11=BASE >> 32)[0] == 0
        got = nvme.wait_event("rogue_read")
        assert (got["iova"], got["mapped"], got["errno"]) == (BASE + DATA, True, 0)
        assert got["through_mapping"] == got["by_message"] == "01020304" + "00" * 12
        assert driver.admin(0xC0, dw10=DATA, dw11=BASE >> 32, dw12=1)[0] == 0
        assert driver.memory[DATA : DATA + 16] == b"\xa5" * 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory", "12x"], "--memory"),
        (["--memory", "100"], "512"),
        (["--file", "/nonexistent"], "/nonexistent"),
        (["stray"], "no other argument"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    tmp_path: Path, options: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The line names the option and what is allowed."""
    with pytest.raises(RuntimeError):
        Device("nvme", tmp_path / "s", *options)
    line = capfd.readouterr().err
    assert says in line
    assert line.count("\n") == 1


def test_unmapped_queue_is_fatal_not_deadly(nvme: Device) -> None:
    """When a queue itself cannot be reached the controller says fatal status and the process lives."""
    with driven(nvme) as driver:
        driver.client.dma_unmap(BASE, MEMORY)

        def refuse(command: int, address: int, count: int, data: bytes) -> bytes:
            raise OSError(errno.EFAULT, "not mapped")

        driver.client.on_dma = refuse
        driver.submit(1, READ, 1, BASE + DATA)
        assert driver.client.read(CSTS) in (1, 2)
        assert driver.client.read(CSTS) == 2
        with pytest.raises(RefusedError):
            driver.client.dma_unmap(BASE, MEMORY)
