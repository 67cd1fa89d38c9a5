"""The driver's side of a split virtqueue (VIRTIO 1.3, 2.7)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from frontend.memory import GuestMemory
from frontend.ring import INDIRECT, NEXT, WRITE, Buffer, Ring, Used

NO_INTERRUPT = 1
NO_NOTIFY = 1


def descriptor(address: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    """16 bytes of a descriptor table."""
    return struct.pack("<QIHH", address & (1 << 64) - 1, length, flags, following)


class SplitRing(Ring):
    """Chains go into descriptors taken in turn; a chain's are reused when it comes back, in any order."""

    def __init__(self, memory: GuestMemory, size: int, *, event_idx: bool = False) -> None:
        super().__init__(memory, size, event_idx=event_idx)
        self.desc = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self.reset()

    def reset(self) -> None:
        """What a driver does with a ring before its first use."""
        self.memory.write(self.desc, bytes(16 * self.size))
        self.memory.write(self.avail, bytes(6 + 2 * self.size))
        self.memory.write(self.used, bytes(6 + 8 * self.size))
        self.base = 0
        self.next_avail = 0
        self.published = 0
        self.next_used = 0
        self.free = list(range(self.size))
        self.chains: dict[int, list[int]] = {}

    # Raw

    def write_descriptor(self, index: int, raw: bytes) -> None:
        """Put any 16 bytes into the table."""
        self.memory.write(self.desc + 16 * index, raw)

    def offer(self, head: int) -> None:
        """Put any head into the next slot of the available ring, without publishing it."""
        self.memory.store16(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def set_avail_idx(self, value: int) -> None:
        """Publish any index."""
        self.memory.store16(self.avail + 2, value)

    def used_idx(self) -> int:
        """Index of the used ring."""
        return self.memory.load16(self.used + 2)

    def used_element(self, slot: int) -> Used:
        """An entry of the used ring, whether it is new or not."""
        head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (slot % self.size), 8))
        return Used(head, length)

    # As a driver does it

    def add(self, chain: Sequence[Buffer], *, indirect: bool = False) -> int:
        """Write the chain's descriptors and offer its head."""
        if indirect:
            table = self.memory.allocate(16 * len(chain), 16)
            self.memory.write(table, self._table(chain, range(len(chain))))
            (head,) = slots = [self.free.pop(0)]
            self.write_descriptor(head, descriptor(table, 16 * len(chain), INDIRECT))
        else:
            slots = [self.free.pop(0) for _ in chain]
            head = slots[0]
            raw = self._table(chain, slots)
            for position, slot in enumerate(slots):
                self.write_descriptor(slot, raw[16 * position : 16 * position + 16])
        self.chains[head] = slots
        self.offer(head)
        return head

    @staticmethod
    def _table(chain: Sequence[Buffer], slots: Sequence[int]) -> bytes:
        raw = b""
        for position, buffer in enumerate(chain):
            last = position == len(chain) - 1
            flags = (WRITE if buffer.writable else 0) | (0 if last else NEXT)
            raw += descriptor(buffer.address, buffer.length, flags, 0 if last else slots[position + 1])
        return raw

    def publish(self) -> None:
        """Move the available index over everything that was offered."""
        self.published, before = self.next_avail, self.published
        self._before = before
        self.set_avail_idx(self.next_avail)
        self.memory.barrier()

    def kick_is_wanted(self) -> bool:
        """By avail_event, or by the used ring's flags."""
        if not self.event_idx:
            return not self.memory.load16(self.used) & NO_NOTIFY
        event = self.memory.load16(self.used + 4 + 8 * self.size)
        # VIRTIO 1.3, 2.7.10: the event index lies among those published just now.
        return (self.published - event - 1) & 0xFFFF < (self.published - self._before) & 0xFFFF

    def want_calls(self, wanted: bool) -> None:
        """Ask for notifications or not; with EVENT_IDX for the next used buffer, or for none in a long time."""
        self.memory.store16(self.avail, 0 if wanted or self.event_idx else NO_INTERRUPT)
        self.set_used_event(self.next_used if wanted else self.next_used - 1)
        self.memory.barrier()

    def set_used_event(self, value: int) -> None:
        """Ask to be notified when the used index passes a value (EVENT_IDX)."""
        self.memory.store16(self.avail + 4 + 2 * self.size, value)

    def take(self) -> Used | None:
        """The next used buffer; its descriptors are free again."""
        if self.used_idx() == self.next_used:
            return None
        used = self.used_element(self.next_used)
        self.next_used = (self.next_used + 1) & 0xFFFF
        self.free += self.chains.pop(used.id, [])
        return used
