"""The DMA engine over its socket: registers, transfers by mapping and by message, and what is refused."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from devices.client import (
    DMA_READ,
    DMA_WRITE,
    INTX,
    MSIX,
    READABLE,
    Client,
    MessageMemory,
    shared_memory,
)
from devices.process import Device

SOURCE, DESTINATION, COUNT, COMMAND, RESULT, DONE = 0x80, 0x88, 0x90, 0x98, 0xA0, 0xA8
START, TO_MEMORY, INTERRUPT = 1, 2, 4
BUFFER = 0x40000
EVENTFD_TRIGGER, NONE_TRIGGER, NONE_UNMASK = 0x24, 0x21, 0x11


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Device]:
    """A running DMA engine."""
    with Device("dma_engine", tmp_path / "engine.sock") as device:
        yield device


def transfer(client: Client, source: int, destination: int, count: int, command: int) -> int:
    """Run one transfer and return its result: 0 or an errno."""
    done = client.read(DONE, 8)
    for register, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count)):
        client.write(register, value, 8, posted=True)
    client.write(COMMAND, START | command, posted=True)
    deadline = time.monotonic() + 60
    while client.read(DONE, 8) == done:
        assert time.monotonic() < deadline, "the transfer never ended"
    assert client.read(COMMAND) & START == 0
    return client.read(RESULT, 8)


def ready(client: Client) -> None:
    """What QEMU does before a guest runs."""
    client.version()
    client.bus_master()


def test_looks_like_a_pci_function(engine: Device) -> None:
    """Regions, interrupts, identity and capabilities are what VFIO PCI asks for."""
    with Client(engine.socket) as client:
        client.version()
        assert client.device_info() == (3, 9, 5)
        assert [client.region_info(i)[1] for i in range(9)] == [0x4000, 0, 0, 0, 0, 0, 0, 256, 0]
        assert client.irq_info(INTX) == (7, 1)
        assert client.irq_info(MSIX) == (9, 1)
        assert client.read(0, 4, 7) == 0x11E91234
        capabilities = []
        at = client.read(0x34, 1, 7)
        while at:
            capabilities.append(client.read(at, 1, 7))
            at = client.read(at + 1, 1, 7)
        assert capabilities == [0x10, 0x11]
        client.write(0x10, 0xFFFFFFFF, 4, 7)
        assert client.read(0x10, 4, 7) == 0xFFFFC004
        assert client.read(0) == 0x010000ED
        client.write(4, 0x12345678)
        assert client.read(4) == 0x12345678 ^ 0xFFFFFFFF


def test_transfers_through_a_mapped_descriptor(engine: Device) -> None:
    """Bytes go from one mapping to the buffer and on to another, at the offsets given, without a message."""
    with shared_memory(0x10000) as (fd, memory), Client(engine.socket) as client:
        ready(client)
        client.dma_map(0x100000, 0x1000, fd, 0x3000, READABLE)
        client.dma_map(0x7000000, 0x2000, fd, 0x8000)
        memory[0x3010:0x3020] = b"sixteen bytes ok"
        assert transfer(client, 0x100010, BUFFER + 5, 16, 0) == 0
        assert transfer(client, BUFFER + 5, 0x7001FF8 - 0x1000, 16, TO_MEMORY) == 0
        assert memory[0x8FF8:0x9008] == b"sixteen bytes ok"
    summary = engine.stop()
    assert (summary["dma_read_messages"], summary["dma_write_messages"]) == (0, 0)
    assert (summary["transfers"], summary["bytes"], summary["refused"]) == (2, 32, 0)
    assert summary["reachable_peak_bytes"] == 0x3000
    assert summary["touched_bytes"] == 0x3000


def test_transfers_by_messages_where_no_descriptor_was_given(engine: Device) -> None:
    """A mapping without a descriptor is reached by DMA_READ and DMA_WRITE while register accesses go on."""
    memory = MessageMemory()
    source, destination = memory.add(0x1000, 0x1000), memory.add(0x5000, 0x1000)
    source[:5] = b"hello"
    with Client(engine.socket, memory) as client:
        ready(client)
        client.dma_map(0x1000, 0x1000)
        client.dma_map(0x5000, 0x1000)
        assert transfer(client, 0x1000, BUFFER, 5, 0) == 0
        assert transfer(client, BUFFER, 0x5008, 5, TO_MEMORY) == 0
    assert destination[8:13] == b"hello"
    assert memory.log == [(DMA_READ, 0x1000, 5), (DMA_WRITE, 0x5008, 5)]


def test_messages_only_ignores_descriptors(tmp_path: Path) -> None:
    """With --messages-only the same device asks for every byte although it was given a descriptor."""
    memory = MessageMemory()
    memory.add(0x1000, 0x1000)[:4] = b"wire"
    with Device("dma_engine", tmp_path / "s", "--messages-only") as engine:
        with shared_memory(0x1000) as (fd, mapped), Client(engine.socket, memory) as client:
            ready(client)
            client.dma_map(0x1000, 0x1000, fd)
            assert transfer(client, 0x1000, BUFFER, 4, 0) == 0
            assert transfer(client, BUFFER, 0x1100, 4, TO_MEMORY) == 0
            assert mapped[:] == bytes(0x1000)
        assert engine.stop()["dma_read_messages"] == 1
    assert memory.ranges[0x1000][0x100:0x104] == b"wire"


def test_what_no_mapping_permits_is_asked_for_and_refused(engine: Device) -> None:
    """A write to a read-only mapping and an access to nothing become messages; the client's errno is the result."""
    memory = MessageMemory()
    with shared_memory(0x1000) as (fd, mapped), Client(engine.socket, memory) as client:
        ready(client)
        client.dma_map(0x1000, 0x1000, fd, flags=READABLE)
        assert transfer(client, BUFFER, 0x1000, 8, TO_MEMORY) == errno.EFAULT
        assert transfer(client, 0x9000, BUFFER, 8, 0) == errno.EFAULT
        client.dma_unmap(0x1000, 0x1000)
        assert transfer(client, 0x1000, BUFFER, 8, 0) == errno.EFAULT
        assert mapped[:] == bytes(0x1000)
    assert memory.log == [(DMA_WRITE, 0x1000, 8), (DMA_READ, 0x9000, 8), (DMA_READ, 0x1000, 8)]
    summary = engine.stop()
    assert (summary["refused"], summary["dma_refused"], summary["touched_bytes"]) == (3, 3, 0)


def test_a_transfer_over_the_edge_of_a_mapping_is_split(engine: Device) -> None:
    """The mapped part goes through the mapping, the rest is asked for."""
    memory = MessageMemory()
    memory.add(0x2000, 0x1000)[:2] = b"CD"
    with shared_memory(0x1000) as (fd, mapped), Client(engine.socket, memory) as client:
        ready(client)
        client.dma_map(0x1000, 0x1000, fd)
        mapped[0xFFE:0x1000] = b"AB"
        assert transfer(client, 0x1FFE, BUFFER, 4, 0) == 0
        assert transfer(client, BUFFER, 0x1000, 4, TO_MEMORY) == 0
        assert mapped[:4] == b"ABCD"
    assert memory.log[0] == (DMA_READ, 0x2000, 2)


def test_the_peak_in_use_leaves_out_what_was_mapped_before(engine: Device) -> None:
    """All of memory mapped before bus mastering, and a page after, are two different peaks."""
    with Client(engine.socket) as client:
        client.version()
        client.dma_map(0, 1 << 30)
        client.dma_unmap(0, 1 << 30)
        client.dma_map(0x1000, 0x1000)
        client.bus_master()
        client.dma_map(0x5000, 0x2000)
        client.dma_unmap(0x5000, 0x2000)
        client.bus_master(False)
        client.dma_map(0x100000, 1 << 20)
    summary = engine.stop()
    assert summary["reachable_peak_bytes"] == 1 << 30
    assert summary["in_use_peak_bytes"] == 0x3000


def test_no_dma_without_bus_mastering(engine: Device) -> None:
    """A command waits until the function may be a master."""
    with shared_memory(0x1000) as (fd, mapped), Client(engine.socket) as client:
        client.version()
        client.dma_map(0x1000, 0x1000, fd)
        mapped[:4] = b"late"
        for register, value in ((SOURCE, 0x1000), (DESTINATION, BUFFER), (COUNT, 4), (COMMAND, START)):
            client.write(register, value, 8)
        assert client.read(COMMAND) & START
        client.bus_master()
        assert client.read(COMMAND) & START == 0


def test_a_reset_in_the_middle_of_a_transfer_ends_it(engine: Device) -> None:
    """A reset that arrives while a DMA_READ waits is answered at once, and the reply to the read changes nothing."""
    with Client(engine.socket) as client:
        ready(client)
        reset_id = 0

        def reset_meanwhile(command: int, address: int, count: int, data: bytes) -> bytes:
            nonlocal reset_id
            reset_id = client.send(13)
            return b"x" * count

        client.on_dma = reset_meanwhile
        for register, value in ((SOURCE, 0x1000), (DESTINATION, BUFFER), (COUNT, 4), (COMMAND, START)):
            client.write(register, value, 8, posted=True)
        assert client.serve_one() is None
        client.reply_to(reset_id, 13)
        client.bus_master()
        assert client.read(COMMAND) == 0
        assert client.read(DONE, 8) == 0


def test_msix_and_intx(engine: Device) -> None:
    """MSI-X fires its eventfd; INTx is a level that fires again when it is unmasked and still high."""
    with shared_memory(0x1000) as (fd, _), Client(engine.socket) as client:
        ready(client)
        client.dma_map(0x1000, 0x1000, fd)
        irq = os.eventfd(0, os.EFD_NONBLOCK)
        try:
            client.set_irqs(EVENTFD_TRIGGER, MSIX, 0, 1, [irq])
            assert transfer(client, 0x1000, BUFFER, 4, INTERRUPT) == 0
            assert select.select([irq], [], [], 60)[0]
            assert os.eventfd_read(irq) == 1
            client.write(0x64, 0x100)
            client.set_irqs(NONE_TRIGGER, MSIX, 0, 0)
            client.set_irqs(EVENTFD_TRIGGER, INTX, 0, 1, [irq])
            assert transfer(client, 0x1000, BUFFER, 4, INTERRUPT) == 0
            client.write(0x60, 1)
            assert os.eventfd_read(irq) == 1
            client.set_irqs(NONE_UNMASK, INTX, 0, 1)
            assert os.eventfd_read(irq) == 1
            client.write(0x64, 0x101)
            client.set_irqs(NONE_UNMASK, INTX, 0, 1)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(irq)
            client.set_irqs(EVENTFD_TRIGGER, INTX, 0, 1)
            client.write(0x60, 1)
            with pytest.raises(BlockingIOError):
                os.eventfd_read(irq)
        finally:
            os.close(irq)
