"""The regions of guest memory as the front-end describes them: what is allowed, and what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from viommud.vhost_user.device import MappedRegion, Region
from viommud.vhost_user.errors import Refused
from viommud.vhost_user.fds import MAX_FILE_OFFSET
from viommud.vhost_user.payloads import MemoryRegion

ADDRESS_SPACE = 1 << 64


def checked_region(wire: MemoryRegion, *, addresses_are_gpa: bool) -> Region:
    """The region of a message, if its numbers are possible.

    :raises Refused: it is empty, or a sum leaves the address space or the file.
    """
    user_addr = wire.guest_addr if addresses_are_gpa else wire.user_addr
    region = Region(wire.guest_addr, wire.size, user_addr, wire.mmap_offset)
    what = describe(region)
    if region.size == 0:
        raise Refused(f"{what} is empty")
    if region.guest_addr + region.size > ADDRESS_SPACE:
        raise Refused(f"{what} ends beyond the last guest address")
    if region.user_addr + region.size > ADDRESS_SPACE:
        raise Refused(f"{what} ends beyond the last user address (it starts at {region.user_addr:#x})")
    if region.mmap_offset + region.size > MAX_FILE_OFFSET:
        raise Refused(f"{what} ends beyond the greatest file offset (it starts at {region.mmap_offset:#x})")
    return region


def check_apart(region: Region, others: Sequence[Region]) -> None:
    """Refuse a region that overlaps another one, in guest or in user addresses.

    :raises Refused: naming both.
    """
    for other in others:
        if region.guest_addr <= other.guest_last and other.guest_addr <= region.guest_last:
            raise Refused(f"{describe(region)} overlaps {describe(other)}")
        if region.user_addr <= other.user_last and other.user_addr <= region.user_last:
            raise Refused(f"{describe(region)} overlaps {describe(other)} in user addresses")


def describe(region: Region) -> str:
    """The region as it is named in messages."""
    return f"memory region {region.guest_addr:#x}+{region.size:#x}"


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """All regions at one moment."""

    mapped: tuple[MappedRegion, ...] = ()

    @property
    def regions(self) -> tuple[Region, ...]:
        """Their descriptions."""
        return tuple(mapped.region for mapped in self.mapped)

    def has_user_address(self, address: int) -> bool:
        """Is there a region that a ring address (user or guest, as negotiated) lies in?"""
        return any(region.user_addr <= address <= region.user_last for region in self.regions)

    def find(self, wanted: Region) -> MappedRegion | None:
        """The region that REM_MEM_REG means: same guest address, user address and size."""
        key = (wanted.guest_addr, wanted.user_addr, wanted.size)
        for mapped in self.mapped:
            region = mapped.region
            if (region.guest_addr, region.user_addr, region.size) == key:
                return mapped
        return None

    def with_region(self, added: MappedRegion) -> MemorySnapshot:
        """This memory and one region more."""
        return MemorySnapshot((*self.mapped, added))

    def without(self, removed: MappedRegion) -> MemorySnapshot:
        """This memory and one region less."""
        return MemorySnapshot(tuple(mapped for mapped in self.mapped if mapped is not removed))
