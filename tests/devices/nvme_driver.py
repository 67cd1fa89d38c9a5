"""A driver for the NVMe controller over a vfio-user client: one admin and one I/O queue, polled or by interrupt.

Guest memory is a memfd of the test. The driver places queues and data at guest addresses and maps them for the device
one to one (IOVA = offset + BASE), by descriptor or for messages.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from devices.client import DMA_READ, MSIX, Client

BASE = 0x10_0000_0000
"""IOVA of the first byte of guest memory."""
ADMIN_SQ, ADMIN_CQ, IO_SQ, IO_CQ, LISTS, DATA = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000, 0x10000
CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
FLUSH, WRITE, READ = 0, 1, 2
DELETE_SQ, CREATE_SQ, LOG_PAGE, DELETE_CQ, CREATE_CQ, IDENTIFY = 0, 1, 2, 4, 5, 6
ABORT, SET_FEATURES, GET_FEATURES, EVENT_REQUEST = 8, 9, 10, 12
ENTRIES = 8
PAGE = 4096
PATIENCE = 60.0


class NvmeDriver:
    """What a guest's driver does, step by step."""

    def __init__(self, client: Client, memory: mmap.mmap) -> None:
        """Over a connected client, with this guest memory."""
        self.client = client
        self.memory = memory
        self.tails = [0, 0]
        self.heads = [0, 0]
        self.phases = [1, 1]
        self._command_id = 0

    def serve_dma(self, command: int, address: int, count: int, data: bytes) -> bytes:
        """An OnDma over all of guest memory."""
        at = address - BASE
        if command == DMA_READ:
            return self.memory[at : at + count]
        self.memory[at : at + count] = data
        return b""

    def map_all(self, fd: int | None) -> None:
        """One mapping for all of guest memory."""
        self.client.dma_map(BASE, len(self.memory), fd)

    def enable(self) -> None:
        """Version, bus mastering, admin queues, CC.EN."""
        self.client.version()
        self.client.bus_master()

    def start(self) -> None:
        """Set up the admin queue and enable the controller."""
        self.tails, self.heads, self.phases = [0, 0], [0, 0], [1, 1]
        self.memory[ADMIN_CQ : ADMIN_CQ + PAGE] = bytes(PAGE)
        self.memory[IO_CQ : IO_CQ + PAGE] = bytes(PAGE)
        self.client.write(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1))
        self.client.write(ASQ, BASE + ADMIN_SQ, 8)
        self.client.write(ACQ, BASE + ADMIN_CQ, 8)
        self.client.write(CC, 0x460001)
        assert self.client.read(CSTS) == 1

    def create_io_queues(self, vector: int = 1) -> None:
        """One pair of I/O queues with interrupts."""
        size_and_id = (ENTRIES - 1) << 16 | 1
        assert self.admin(CREATE_CQ, prp1=BASE + IO_CQ, dw10=size_and_id, dw11=vector << 16 | 3)[0] == 0
        assert self.admin(CREATE_SQ, prp1=BASE + IO_SQ, dw10=size_and_id, dw11=1 << 16 | 1)[0] == 0

    def submit(self, queue: int, opcode: int, nsid: int = 0, prp1: int = 0, prp2: int = 0, **dwords: int) -> int:
        """Put a command into a queue and ring; its id."""
        self._command_id = (self._command_id + 1) & 0xFFFF
        entry = bytearray(64)
        struct.pack_into("<BBHI", entry, 0, opcode, dwords.pop("flags", 0), self._command_id, nsid)
        struct.pack_into("<QQ", entry, 24, prp1, prp2)
        for name, value in dwords.items():
            struct.pack_into("<I", entry, 4 * int(name.removeprefix("dw")), value)
        at = (IO_SQ if queue else ADMIN_SQ) + 64 * self.tails[queue]
        self.memory[at : at + 64] = bytes(entry)
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES
        self.client.write(DOORBELLS + 8 * queue, self.tails[queue], posted=True)
        return self._command_id

    def completed(self, queue: int) -> tuple[int, int, int] | None:
        """The next completion, if it is there: (command id, status, dword 0). Frees its entry."""
        at = (IO_CQ if queue else ADMIN_CQ) + 16 * self.heads[queue]
        result, _, _, _, command_id, state = struct.unpack("<IIHHHH", self.memory[at : at + 16])
        if state & 1 != self.phases[queue]:
            return None
        self.heads[queue] = (self.heads[queue] + 1) % ENTRIES
        if self.heads[queue] == 0:
            self.phases[queue] ^= 1
        self.client.write(DOORBELLS + 8 * queue + 4, self.heads[queue], posted=True)
        return command_id, state >> 1, result

    def wait(self, queue: int) -> tuple[int, int, int]:
        """The next completion."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.completed(queue)
            if found is not None:
                return found
            assert time.monotonic() < deadline, "no completion"
            self.client.read(CSTS)  # a round trip; serves the device's messages meanwhile

    def admin(self, opcode: int, nsid: int = 0, prp1: int = 0, prp2: int = 0, **dwords: int) -> tuple[int, int]:
        """Run an admin command: (status, dword 0)."""
        command_id = self.submit(0, opcode, nsid, prp1, prp2, **dwords)
        got_id, status, result = self.wait(0)
        assert got_id == command_id
        return status, result

    def io(self, opcode: int, lba: int, blocks: int, prp1: int, prp2: int = 0, **dwords: int) -> int:
        """Run an I/O command: its status."""
        dwords = {"dw10": lba & 0xFFFFFFFF, "dw11": lba >> 32, "dw12": blocks - 1, **dwords}
        command_id = self.submit(1, opcode, dwords.pop("nsid", 1), prp1, prp2, **dwords)
        got_id, status, _ = self.wait(1)
        assert got_id == command_id
        return status

    def identify(self, what: int, nsid: int = 0) -> bytes:
        """The 4096 bytes of an Identify that succeeds."""
        assert self.admin(IDENTIFY, nsid, BASE + DATA, dw10=what)[0] == 0
        return self.memory[DATA : DATA + PAGE]


def vector_eventfd(client: Client, vector: int) -> int:
    """A new eventfd on an MSI-X vector; the caller closes it."""
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    client.set_irqs(0x24, MSIX, vector, 1, [fd])
    return fd
