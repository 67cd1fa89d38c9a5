"""A virtio-iommu behind QEMU's PCI transport, driven by a test."""

from __future__ import annotations

from contextlib import ExitStack

from frontend import iommu, wire
from frontend.guest import Guest
from frontend.packed import PackedRing
from frontend.ring import Ring, wait_until
from frontend.split import SplitRing

from vm.qtest import Machine
from vm.virtio import ISR_QUEUE, VirtioPci

PCI_IDS = (0x1AF4, 0x1057)
QUEUES = 2
_DEVICE_FEATURES = (1 << 24) - 1
_RING_FEATURES = wire.F_INDIRECT_DESC | wire.F_EVENT_IDX | wire.F_RING_PACKED | wire.F_IN_ORDER | wire.F_VERSION_1
ALL_FEATURES = _DEVICE_FEATURES | _RING_FEATURES
"""What the rings here can do, and every feature of an IOMMU."""


class _KickedByRegister:
    """Kicks go through the device's notify register."""

    device: VirtioPci
    index: int

    def kick(self) -> None:
        self.device.notify(self.index)


class _Split(_KickedByRegister, SplitRing):
    pass


class _Packed(_KickedByRegister, PackedRing):
    pass


class Iommu(Guest):
    """The driver of an IOMMU: brought up through registers; requests are those of the guest over a plain connection."""

    def __init__(self, machine: Machine, address: str = "05.0") -> None:
        """Find the device; bring_up() does the rest.  Close with close()."""
        self.machine = machine
        self.memory = machine.memory
        self.pci = machine.bus.function(address)
        assert self.pci.ids == PCI_IDS, f"{address} is {self.pci.ids}"
        self.device = VirtioPci(self.pci)
        self.features = 0
        self.rings: list[Ring] = []
        self._stack = ExitStack()

    def negotiate(self, features: int = ALL_FEATURES) -> None:
        """Reset the device and agree on those of these features that it offers."""
        self.device.reset()
        self.features = self.device.offered() & features
        assert self.device.negotiate(self.features), f"the device refuses {self.features:#x}"

    def bring_up(self, features: int = ALL_FEATURES, *, queue_size: int | None = None) -> None:
        """From a reset to DRIVER_OK, with new rings.

        :param queue_size: None: as large as the device has them.
        """
        self.negotiate(features)
        self._stack.close()
        self.rings.clear()
        for index in range(QUEUES):
            kind = _Packed if self.features & wire.F_RING_PACKED else _Split
            size = queue_size or self.device.queue_size(index)
            ring = kind(self.memory, size, event_idx=bool(self.features & wire.F_EVENT_IDX))
            self._stack.callback(ring.close)
            ring.device, ring.index = self.device, index
            self.rings.append(ring)
            self.device.set_up_queue(index, ring)
        self.device.driver_ok()

    def wait_interrupt(self) -> None:
        """Wait until the device has raised the interrupt for used buffers, and clear it."""
        wait_until(lambda: bool(self.device.isr() & ISR_QUEUE), "an interrupt")

    def config(self) -> iommu.Config:
        """The device's configuration space, one field at a time as a driver reads it."""
        layout = ((0, 8), (8, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 1))
        return iommu.Config(*(self._field(offset, size) for offset, size in layout))

    def _field(self, offset: int, size: int) -> int:
        if size == 8:
            return self.device.config(offset, 4) | self.device.config(offset + 4, 4) << 32
        return self.device.config(offset, size)
