"""The modern PCI transport of virtio, from the driver's side (VIRTIO 1.3, 4.1)."""

from __future__ import annotations

from frontend.ring import Ring, wait_until

from vm.pci import PciFunction

ACKNOWLEDGE = 1
DRIVER = 2
DRIVER_OK = 4
FEATURES_OK = 8
NEEDS_RESET = 64

ISR_QUEUE = 1
ISR_CONFIG = 2

_VENDOR_CAPABILITY = 9
_COMMON, _NOTIFY, _ISR, _DEVICE = 1, 2, 3, 4

# struct virtio_pci_common_cfg
_DEVICE_FEATURE_SELECT, _DEVICE_FEATURE = 0, 4
_DRIVER_FEATURE_SELECT, _DRIVER_FEATURE = 8, 12
_NUM_QUEUES, _DEVICE_STATUS, _CONFIG_GENERATION = 18, 20, 21
_QUEUE_SELECT, _QUEUE_SIZE, _QUEUE_ENABLE, _QUEUE_NOTIFY_OFF = 22, 24, 28, 30
_QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE = 32, 40, 48


class VirtioPci:
    """A virtio device behind a PCI function."""

    def __init__(self, function: PciFunction) -> None:
        """Place its BARs and find its registers; the device is not touched yet."""
        self.function = function
        self._registers = function.bus.registers
        function.enable()
        self._at: dict[int, int] = {}
        self._notify_multiplier = 0
        for identifier, at in function.capabilities():
            if identifier == _VENDOR_CAPABILITY:
                kind, bar = function.read(at + 3, 1), function.read(at + 4, 1)
                if kind in (_COMMON, _NOTIFY, _ISR, _DEVICE):
                    self._at[kind] = function.bars[bar] + function.read(at + 8, 4)
                if kind == _NOTIFY:
                    self._notify_multiplier = function.read(at + 16, 4)
        self._notify: dict[int, int] = {}

    def common(self, offset: int, size: int) -> int:
        """Read a field of the common configuration."""
        return self._registers.read(self._at[_COMMON] + offset, size)

    def set_common(self, offset: int, size: int, value: int) -> None:
        """Write a field of the common configuration."""
        self._registers.write(self._at[_COMMON] + offset, size, value)

    @property
    def status(self) -> int:
        """The device status."""
        return self.common(_DEVICE_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.set_common(_DEVICE_STATUS, 1, value)

    def reset(self) -> None:
        """Reset the device."""
        self.status = 0
        wait_until(lambda: self.status == 0, "the device's reset")
        self._notify.clear()

    def offered(self) -> int:
        """The features that the device offers."""
        features = 0
        for half in (0, 1):
            self.set_common(_DEVICE_FEATURE_SELECT, 4, half)
            features |= self.common(_DEVICE_FEATURE, 4) << 32 * half
        return features

    def negotiate(self, features: int) -> bool:
        """Accept these features; does the device agree?"""
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        for half in (0, 1):
            self.set_common(_DRIVER_FEATURE_SELECT, 4, half)
            self.set_common(_DRIVER_FEATURE, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        return bool(self.status & FEATURES_OK)

    @property
    def num_queues(self) -> int:
        """How many queues the device has."""
        return self.common(_NUM_QUEUES, 2)

    def queue_size(self, index: int) -> int:
        """The size of a queue: the largest one before set_up_queue()."""
        self.set_common(_QUEUE_SELECT, 2, index)
        return self.common(_QUEUE_SIZE, 2)

    def set_up_queue(self, index: int, ring: Ring) -> None:
        """Give the device a ring and enable the queue."""
        self.set_common(_QUEUE_SELECT, 2, index)
        self.set_common(_QUEUE_SIZE, 2, ring.size)
        for offset, address in ((_QUEUE_DESC, ring.desc), (_QUEUE_DRIVER, ring.avail), (_QUEUE_DEVICE, ring.used)):
            self.set_common(offset, 4, address & 0xFFFF_FFFF)
            self.set_common(offset + 4, 4, address >> 32)
        offset = self.common(_QUEUE_NOTIFY_OFF, 2)
        self._notify[index] = self._at[_NOTIFY] + offset * self._notify_multiplier
        self.set_common(_QUEUE_ENABLE, 2, 1)

    def driver_ok(self) -> None:
        """The driver is ready."""
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

    def notify(self, index: int) -> None:
        """Kick a queue."""
        self._registers.write(self._notify[index], 2, index)

    def isr(self) -> int:
        """Read and clear the interrupt status."""
        return self._registers.read(self._at[_ISR], 1)

    def config(self, offset: int, size: int) -> int:
        """Read a field of the device's configuration space."""
        return self._registers.read(self._at[_DEVICE] + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write a field of the device's configuration space."""
        self._registers.write(self._at[_DEVICE] + offset, size, value)

    @property
    def config_generation(self) -> int:
        """Changes when the configuration space does."""
        return self.common(_CONFIG_GENERATION, 1)
