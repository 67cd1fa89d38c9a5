"""What is fixed about QEMU's machines: where their virtio-mmio slots are (hw/arm/virt.c, hw/i386/microvm.c)."""

from __future__ import annotations

from viommud.topology.errors import TopologyError
from viommud.topology.section import Machine

_SLOTS = {"virt": (0x0A00_0000, 32), "microvm": (0xFEB0_0000, 24)}
"""First slot's base, and how many there are."""
_SLOT_BYTES = 0x200


def mmio_slot(machine: Machine, base: int) -> int:
    """The number N of virtio-mmio-bus.N whose window is at a base.

    :raises TopologyError: the machine has none there.
    """
    if machine not in _SLOTS:
        raise TopologyError(f"topology.iommu: the machine {machine} has no virtio-mmio windows; name a PCI function")
    first, count = _SLOTS[machine]
    slot, within = divmod(base - first, _SLOT_BYTES)
    if within or not 0 <= slot < count:
        last = first + (count - 1) * _SLOT_BYTES
        raise TopologyError(
            f"topology.iommu: the machine {machine} has its virtio-mmio windows from {first:#x} to {last:#x},"
            f" one every {_SLOT_BYTES:#x}; {base:#x} is none of them"
        )
    return slot
