"""What the vhost-user session asks of the device behind it.

The session owns the protocol: which message may come when, which file descriptor belongs where, when a ring
starts and stops.  The device owns guest memory, the rings while they run, and everything the guest can see.
The two meet here and nowhere else.

All calls come from one thread (the control plane), one at a time.  Integers are host integers, addresses and
sizes are bytes.  File descriptors in arguments are borrowed: a device duplicates those it keeps.  The peer keeps
its own duplicates, so an eventfd may block, be full, or change its flags at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from viommud.vhost_user.errors import Refused


class DeviceRefused(Refused):
    """The device cannot or will not do what the front-end asked; nothing has changed.

    The message is one clause without a full stop: it is logged and the request is answered with a non-zero
    acknowledgement.
    """


@dataclass(frozen=True, slots=True)
class Region:
    """One range of guest memory as the front-end describes it (SET_MEM_TABLE, ADD_MEM_REG).

    The session has checked that the size is not zero, that no sum of a start and the size exceeds 2**64, and
    that neither guest nor user addresses overlap another region.
    """

    guest_addr: int
    """Guest-physical address of the first byte."""
    size: int
    user_addr: int
    """Address of the first byte as ring addresses name it; equal to guest_addr under GPA_ADDRESSES."""
    mmap_offset: int
    """Offset of the first byte in the file that came with the region; need not be page-aligned."""

    @property
    def guest_last(self) -> int:
        """Guest-physical address of the last byte."""
        return self.guest_addr + self.size - 1

    @property
    def user_last(self) -> int:
        """Ring-side address of the last byte."""
        return self.user_addr + self.size - 1


@dataclass(frozen=True, slots=True)
class QueueSetup:
    """Everything needed to run one ring; never changes while the ring runs."""

    size: int
    """Descriptors: for a split ring a power of two; never over the device's max_queue_size."""
    desc: int
    avail: int
    """Available ring, or the driver event suppression area of a packed ring."""
    used: int
    """Used ring, or the device event suppression area of a packed ring."""
    addresses_are_gpa: bool
    """True: desc, avail and used are guest-physical; False: they lie in the regions' user address space."""
    base: int
    """As in SET_VRING_BASE.  Split: next available index, 16 bits.  Packed: bits 0-14 next available slot, bit 15
    its wrap counter, bits 16-30 next used slot, bit 31 its wrap counter; both slots are below size."""
    log_addr: int | None
    """Guest-physical address under which writes to the used ring are logged; None: they are not logged."""
    kick_fd: int
    """eventfd; may already be signalled."""
    call_fd: int | None
    err_fd: int | None


class MappedRegion(Protocol):
    """A region mapped into this process; opaque to the session apart from these two."""

    @property
    def region(self) -> Region:
        """The description it was mapped from."""

    def close(self) -> None:
        """Unmap.  Only called once set_memory() has been called with a table that lacks this region."""


class Device(Protocol):
    """A virtio device that a session drives."""

    @property
    def offered_features(self) -> int:
        """Virtio feature bits; without VHOST_F_LOG_ALL (26) and PROTOCOL_FEATURES (30), which are the session's."""

    @property
    def num_queues(self) -> int:
        """Rings, at most 256."""

    @property
    def max_queue_size(self) -> int:
        """Greatest number of descriptors of one ring, at most 32768."""

    @property
    def config_size(self) -> int:
        """Bytes of device configuration space; at most 256."""

    @property
    def needs_reset(self) -> bool:
        """True from a ring error until reset(): shown as DEVICE_NEEDS_RESET in GET_STATUS."""

    def config_read(self, offset: int, size: int) -> bytes:
        """Exactly size bytes; offset + size is within config_size."""

    def config_write(self, offset: int, data: bytes, migration: bool) -> None:
        """Write configuration space; offset + len(data) is within config_size.

        QEMU's generic device writes the whole space whatever the guest wrote, so fields that the driver may not
        write must be ignored rather than refused.  migration: the write restores a migrated device.

        :raises DeviceRefused: a writable field has a value that is not allowed.
        """

    def set_driver_features(self, features: int) -> None:
        """The negotiated features, a subset of offered_features.  Never changes while a ring runs."""

    def map_region(self, region: Region, fd: int) -> MappedRegion:
        """Map one region.  The session closes fd afterwards.

        fd is a regular file or memfd; whether it is long enough for the region is for the device to check.

        :raises DeviceRefused: it cannot be mapped.
        """

    def set_memory(self, regions: Sequence[MappedRegion]) -> None:
        """Make exactly these regions guest memory, atomically with respect to running rings.

        When it returns nothing refers to any other region.  The session has not checked that running rings still
        lie in the table; a ring that no longer does is a ring error.
        """

    def start_queue(self, index: int, setup: QueueSetup) -> None:
        """Run a stopped ring.  Descriptors that are already available are served without a kick.

        :raises DeviceRefused: an address is not inside any region, a ring crosses a region's end, ...
        """

    def stop_queue(self, index: int) -> int:
        """Stop a running ring; when it returns every started request has been answered.

        :returns: the base to resume from, in the format of QueueSetup.base.
        """

    def ring_looks_used(self, index: int, setup: QueueSetup) -> bool:
        """Has the device ever put a buffer with a length into this ring's memory?

        Asked for a stopped ring, when its base alone does not tell a continued guest from a reset one.  A driver
        hands over a zeroed ring; used.ring[0].len != 0 means it has been in service.  False when unreadable.
        """

    def set_call(self, index: int, fd: int | None) -> None:
        """Replace the eventfd that notifies the driver of a running ring.  None: no notifications."""

    def set_err(self, index: int, fd: int | None) -> None:
        """Replace the eventfd that tells the front-end about an error of a running ring."""

    def set_log(self, fd: int | None, size: int, offset: int) -> None:
        """Replace the dirty log: one bit per 4096 bytes of guest-physical memory, size bytes at offset in fd.

        offset need not be page-aligned; offset + size is within the file.  None: no log.

        :raises DeviceRefused: it cannot be mapped.
        """

    def set_logging(self, on: bool) -> None:
        """Log (VHOST_F_LOG_ALL) or stop logging what the device writes into guest memory; rings may be running."""

    def set_queue_log(self, index: int, log_addr: int | None) -> None:
        """Change QueueSetup.log_addr of a running ring."""

    def inflight_size(self, num_queues: int, queue_size: int) -> int:
        """Bytes of in-flight tracking memory for that many queues of that size."""

    def set_inflight(self, fd: int | None, size: int, offset: int, num_queues: int, queue_size: int) -> None:
        """Replace the in-flight tracking memory.  Only called while no ring runs.  None: no tracking.

        offset + size is within the file and size at least inflight_size(num_queues, queue_size).

        :raises DeviceRefused: it cannot be mapped.
        """

    def reset(self) -> None:
        """The guest's driver starts anew: forget domains, attachments, mappings, waiting faults and needs_reset.

        Only called while no ring runs.  Driver features, guest memory, log and in-flight memory stay: they belong
        to the front-end.
        """
