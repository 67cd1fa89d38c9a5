"""The driver's side of a packed virtqueue (VIRTIO 1.3, 2.8)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from frontend.memory import GuestMemory
from frontend.ring import INDIRECT, NEXT, WRITE, Buffer, Ring, Used
from frontend.wire import PACKED_INITIAL_BASE

AVAIL = 1 << 7
USED = 1 << 15

EVENTS_ENABLE = 0
EVENTS_DISABLE = 1
EVENTS_AT_DESCRIPTOR = 2


def descriptor(address: int, length: int, identifier: int, flags: int) -> bytes:
    """16 bytes of a descriptor ring."""
    return struct.pack("<QIHH", address & (1 << 64) - 1, length, identifier, flags)


class PackedRing(Ring):
    """Chains take consecutive slots; the flags of a chain's first slot are written last."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = False) -> None:
        super().__init__(memory, size, event_idx=event_idx)
        self.desc = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(4, 4)
        self.used = memory.allocate(4, 4)
        self.reset()

    def reset(self) -> None:
        """What a driver does with a ring before its first use."""
        self.memory.write(self.desc, bytes(16 * self.size))
        self.memory.write(self.avail, bytes(4))
        self.memory.write(self.used, bytes(4))
        self.base = PACKED_INITIAL_BASE
        self.next_avail, self.avail_wrap = 0, True
        self.next_used, self.used_wrap = 0, True
        self.free_slots = self.size
        self.ids = list(range(self.size))
        self.lengths: dict[int, int] = {}
        self._heads: list[tuple[int, int]] = []

    # Raw

    def write_descriptor(self, slot: int, raw: bytes) -> None:
        """Put any 16 bytes into the ring, the flags last."""
        address = self.desc + 16 * slot
        self.memory.write(address, raw[:14])
        self.memory.barrier()
        self.memory.store16(address + 14, int.from_bytes(raw[14:], "little"))

    def available_flags(self) -> int:
        """AVAIL and USED as they make the next slot available."""
        return AVAIL if self.avail_wrap else USED

    # As a driver does it

    def add(self, chain: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Write the chain's descriptors, all but the flags of the first."""
        if indirect:
            table = self.memory.allocate(16 * len(chain), 16)
            raw = b"".join(descriptor(b.address, b.length, 0, WRITE if b.writable else 0) for b in chain)
            self.memory.write(table, raw)
            elements = [(table, len(raw), INDIRECT)]
        else:
            last = len(chain) - 1
            elements = [
                (b.address, b.length, (WRITE if b.writable else 0) | (NEXT if position < last else 0))
                for position, b in enumerate(chain)
            ]
        assert len(elements) <= self.free_slots, "the ring is full"
        self.free_slots -= len(elements)
        identifier = self.ids.pop(0)
        self.lengths[identifier] = len(elements)
        for position, (address, length, flags) in enumerate(elements):
            flags |= self.available_flags()
            slot = self.desc + 16 * self.next_avail
            self.memory.write(slot, struct.pack("<QIH", address, length, identifier))
            if position == 0:
                self._heads.append((slot + 14, flags))
            else:
                self.memory.store16(slot + 14, flags)
            self.next_avail += 1
            if self.next_avail == self.size:
                self.next_avail, self.avail_wrap = 0, not self.avail_wrap
        return identifier

    def publish(self) -> None:
        """Write the flags of the chains' first slots, the last chain's first: the device meets all or none."""
        self.memory.barrier()
        for address, flags in reversed(self._heads):
            self.memory.store16(address, flags)
        self._heads.clear()
        self.memory.barrier()

    def kick_is_wanted(self) -> bool:
        """By the device's event suppression area; an exact slot is taken as any, which costs a spurious kick."""
        return self.memory.load16(self.used + 2) != EVENTS_DISABLE

    def want_calls(self, wanted: bool) -> None:
        """Ask for notifications, or for none."""
        if wanted and self.event_idx:
            self.memory.store16(self.avail, self.next_used | self.used_wrap << 15)
            self.memory.store16(self.avail + 2, EVENTS_AT_DESCRIPTOR)
        else:
            self.memory.store16(self.avail + 2, EVENTS_ENABLE if wanted else EVENTS_DISABLE)
        self.memory.barrier()

    def take(self) -> Used | None:
        """The next used buffer; its slots are free again."""
        slot = self.desc + 16 * self.next_used
        flags = self.memory.load16(slot + 14)
        if bool(flags & AVAIL) != self.used_wrap or bool(flags & USED) != self.used_wrap:
            return None
        length, identifier = struct.unpack("<IH", self.memory.read(slot + 8, 6))
        count = self.lengths.pop(identifier)
        self.ids.append(identifier)
        self.free_slots += count
        self.next_used += count
        if self.next_used >= self.size:
            self.next_used, self.used_wrap = self.next_used - self.size, not self.used_wrap
        # VIRTIO 1.3, 2.8.5: without the WRITE flag the length means nothing.
        return Used(identifier, length if flags & WRITE else 0)
