"""A whole guest: memory, a connection, two rings, and a driver that asks one thing at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from frontend import iommu, wire
from frontend.client import Client
from frontend.memory import GuestMemory, Ram
from frontend.packed import PackedRing
from frontend.ring import Buffer, Ring
from frontend.split import SplitRing

POISON = 0xA5
"""What a buffer for an answer holds before; a byte of it in an answer was not written by the device."""


@dataclass(frozen=True)
class Reply:
    """What the device put into the writable part of a request."""

    used_length: int
    data: bytes
    """The whole writable part, written or not."""

    @property
    def untouched(self) -> bool:
        """Was the buffer given back as it was, with nothing written?"""
        return self.used_length == 0 and self.data == bytes([POISON]) * len(self.data)

    @property
    def status(self) -> int:
        """Of the tail; the three bytes after it must be zero."""
        assert self.used_length == len(self.data), f"used length {self.used_length} of {len(self.data)}"
        status, reserved = struct.unpack("<B3s", self.data[-iommu.TAIL :])
        assert reserved == bytes(3)
        return int(status)


class Guest:
    """Everything a guest with a virtio-iommu driver brings, minus the guest."""

    def __init__(
        self,
        client: Client,
        memory: GuestMemory | None = None,
        *,
        features: int | None = None,
        protocol_features: int | None = None,
        queue_size: int = 256,
        num_queues: int = 2,
        memory_slots: bool = True,
    ) -> None:
        """Negotiate and share memory.  None: every feature that is offered.  The rings come with start()."""
        self.client = client
        self._stack = ExitStack()
        self._stack.callback(client.close)
        try:
            self.memory = self._stack.enter_context(memory or GuestMemory())
            self.features, self.protocol_features = client.negotiate(features, protocol_features)
            self.gpa_addresses = bool(self.protocol_features & wire.P_GPA_ADDRESSES)
            self.rings = [self._new_ring(queue_size) for _ in range(num_queues)]
            if memory_slots and self.protocol_features & wire.P_CONFIGURE_MEM_SLOTS:
                for ram in self.memory.rams:
                    self.add_memory(ram)
            else:
                self.set_memory_table(self.memory.rams)
        except BaseException:
            self._stack.close()
            raise

    def _new_ring(self, size: int) -> Ring:
        kind = PackedRing if self.features & wire.F_RING_PACKED else SplitRing
        ring = kind(self.memory, size, event_idx=bool(self.features & wire.F_EVENT_IDX))
        self._stack.callback(ring.close)
        return ring

    def close(self) -> None:
        """Close the connection, then everything else."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Memory

    def add_memory(self, ram: Ram) -> None:
        """Share one piece of RAM."""
        body = wire.single_region(ram.wire_region(gpa_addresses=self.gpa_addresses))
        self.client.do(wire.ADD_MEM_REG, body, [ram.fd])

    def remove_memory(self, ram: Ram) -> None:
        """Take one piece of RAM back."""
        self.client.do(wire.REM_MEM_REG, wire.single_region(ram.wire_region(gpa_addresses=self.gpa_addresses)))

    def set_memory_table(self, rams: Sequence[Ram]) -> None:
        """Share all of RAM at once."""
        regions = [ram.wire_region(gpa_addresses=self.gpa_addresses) for ram in rams]
        self.client.do(wire.SET_MEM_TABLE, wire.memory_table(*regions), [ram.fd for ram in rams])

    def ring_address(self, address: int) -> int:
        """A guest address as SET_VRING_ADDR wants it."""
        if self.gpa_addresses:
            return address
        ram, offset = self.memory.find(address)
        return ram.user_addr + offset

    # Rings, in QEMU's order

    def configure_ring(self, index: int, base: int | None = None) -> None:
        """Everything about one ring except enabling it.  None: the base of an unused ring."""
        ring = self.rings[index]
        do = self.client.do
        do(wire.SET_VRING_NUM, wire.vring_state(index, ring.size))
        do(wire.SET_VRING_BASE, wire.vring_state(index, ring.base if base is None else base))
        do(wire.SET_VRING_ADDR, self.addresses(index))
        do(wire.SET_VRING_ERR, wire.u64(index), [ring.err_fd])
        do(wire.SET_VRING_KICK, wire.u64(index), [ring.kick_fd])
        do(wire.SET_VRING_CALL, wire.u64(index), [ring.call_fd])

    def addresses(self, index: int, *, flags: int = 0, log: int = 0) -> bytes:
        """The payload of SET_VRING_ADDR."""
        ring = self.rings[index]
        desc, used, avail = (self.ring_address(address) for address in (ring.desc, ring.used, ring.avail))
        return wire.vring_addr(index, desc, used, avail, flags=flags, log=log)

    def start(self, bases: Sequence[int] | None = None) -> None:
        """Configure and enable every ring."""
        for index in range(len(self.rings)):
            self.configure_ring(index, None if bases is None else bases[index])
        self.enable(True)

    def enable(self, on: bool) -> None:
        """Enable or disable every ring; nothing without PROTOCOL_FEATURES, where they always are."""
        if self.features & wire.F_PROTOCOL_FEATURES:
            for index in range(len(self.rings)):
                self.client.do(wire.SET_VRING_ENABLE, wire.vring_state(index, int(on)))

    def stop(self) -> list[int]:
        """Stop every ring as QEMU does for a pause, a reset and an exit; the bases."""
        self.enable(False)
        return [self.client.get_base(index) for index in range(len(self.rings))]

    def pause_and_continue(self) -> None:
        """QMP stop and cont."""
        bases = self.stop()
        self.client.do(wire.SET_FEATURES, wire.u64(self.features))
        self.start(bases)

    def reset_and_start(self) -> None:
        """The driver resets the device and binds again, with zeroed rings."""
        self.stop()
        for ring in self.rings:
            ring.reset()
        self.client.do(wire.SET_FEATURES, wire.u64(self.features))
        self.start()

    # Requests

    def queue_request(
        self,
        readable: bytes,
        writable: int | Sequence[int],
        *,
        queue: int = iommu.REQUEST_QUEUE,
        indirect: bool = False,
        split: Sequence[int] = (),
    ) -> tuple[int, list[Buffer]]:
        """Put one request into a ring without publishing it.

        :param writable: size of the buffer for the answer, or sizes of several.
        :param split: sizes of the first descriptors of the readable part; the rest is one more.
        :returns: the chain's id and its buffers.
        """
        chain = []
        for size in (*split, len(readable) - sum(split)):
            if size or not readable:
                part, readable = readable[:size], readable[size:]
                if part:
                    address = self.memory.allocate(len(part))
                    self.memory.write(address, part)
                    chain.append(Buffer(address, len(part)))
        for size in [writable] if isinstance(writable, int) else writable:
            if size:
                address = self.memory.allocate(size)
                self.memory.write(address, bytes([POISON]) * size)
                chain.append(Buffer(address, size, writable=True))
        return self.rings[queue].add(chain, indirect=indirect), chain

    def request(
        self,
        readable: bytes,
        writable: int | Sequence[int] = iommu.TAIL,
        *,
        indirect: bool = False,
        split: Sequence[int] = (),
    ) -> Reply:
        """Send one request and wait for its answer."""
        mark = self.memory.mark()
        ring = self.rings[iommu.REQUEST_QUEUE]
        head, chain = self.queue_request(readable, writable, indirect=indirect, split=split)
        ring.publish()
        if ring.kick_is_wanted():
            ring.kick()
        (used,) = ring.wait()
        assert used.id == head
        data = b"".join(self.memory.read(b.address, b.length) for b in chain if b.writable)
        self.memory.release(mark)
        return Reply(used.length, data)

    def attach(self, domain: int, endpoint: int, *, flags: int = 0) -> int:
        """Status of an ATTACH."""
        return self.request(iommu.attach(domain, endpoint, flags=flags)).status

    def detach(self, domain: int, endpoint: int) -> int:
        """Status of a DETACH."""
        return self.request(iommu.detach(domain, endpoint)).status

    def map(self, domain: int, first: int, last: int, phys: int, *, flags: int = iommu.READ | iommu.WRITE) -> int:
        """Status of a MAP; `last` is inclusive."""
        return self.request(iommu.map_(domain, first, last, phys, flags=flags)).status

    def unmap(self, domain: int, first: int, last: int) -> int:
        """Status of an UNMAP; `last` is inclusive."""
        return self.request(iommu.unmap(domain, first, last)).status

    def probe(self, endpoint: int, probe_size: int | None = None) -> Reply:
        """Reply to a PROBE; its data ends with the tail."""
        size = self.config().probe_size if probe_size is None else probe_size
        return self.request(iommu.probe(endpoint), size + iommu.TAIL)

    def config(self) -> iommu.Config:
        """The device's configuration space."""
        return iommu.config(self.client.get_config(iommu.CONFIG_SIZE))

    def post_event_buffers(self, count: int, size: int = iommu.FAULT_SIZE) -> dict[int, int]:
        """Give the device buffers for fault reports; address by id."""
        ring = self.rings[iommu.EVENT_QUEUE]
        posted = {}
        for _ in range(count):
            address = self.memory.allocate(size)
            self.memory.write(address, bytes([POISON]) * size)
            posted[ring.add([Buffer(address, size, writable=True)])] = address
        ring.publish()
        if ring.kick_is_wanted():
            ring.kick()
        return posted


def memfd(size: int, name: str = "test") -> int:
    """A memfd of that size."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
