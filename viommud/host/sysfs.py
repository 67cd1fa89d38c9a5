"""A PCI function of the host as /sys shows it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from viommud.errors import UsageError

_DEVICES = Path("/sys/bus/pci/devices")
_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,4}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A PCI function."""

    address: str
    """With its segment: "0000:65:00.0"."""
    driver: str | None
    group: int | None
    """IOMMU group; None: no IOMMU translates for it."""
    vfio: Path | None
    """VFIO's character device."""

    @property
    def others_in_group(self) -> list[str]:
        """Functions that the IOMMU cannot tell from this one."""
        if self.group is None:
            return []
        members = Path(f"/sys/kernel/iommu_groups/{self.group}/devices")
        return sorted(path.name for path in members.iterdir() if path.name != self.address)


def normalise(address: str, key: str) -> str:
    """A PCI address in the kernel's spelling.

    :param key: where it was written, for the error.
    :raises UsageError: it is none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[3], 16) > 0x1F:
        raise UsageError(f'{key} = "{address}": must be a PCI function of the host as "0000:65:00.0"')
    segment, bus, device = (int(part or "0", 16) for part in match.groups()[:3])
    return f"{segment:04x}:{bus:02x}:{device:02x}.{match[4]}"


def look(address: str) -> HostDevice:
    """A function, as it is now.

    :raises UsageError: there is none at the address.
    """
    place = _DEVICES / address
    if not place.is_dir():
        raise UsageError(f"the host has no PCI function {address}")
    characters = sorted(place.glob("vfio-dev/vfio*"))
    return HostDevice(
        address,
        driver=_link(place / "driver"),
        group=None if (group := _link(place / "iommu_group")) is None else int(group),
        vfio=Path("/dev/vfio/devices") / characters[0].name if characters else None,
    )


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path).rpartition("/")[2]
    except FileNotFoundError:
        return None


def vfio_device(address: str) -> Path:
    """VFIO's character device of a function.

    :raises UsageError: with what to do about it.
    """
    device = look(address)
    if device.group is None:
        raise UsageError(
            f"{address}: no IOMMU of the host translates for it",
            hint="is the IOMMU on in the firmware, and on the kernel's command line?",
        )
    if device.driver != "vfio-pci":
        held = f"is held by the driver {device.driver}" if device.driver else "has no driver"
        raise UsageError(f"{address}: {held}", hint=f"driverctl set-override {address} vfio-pci")
    if device.vfio is None:
        raise UsageError(
            f"{address}: VFIO gives it no character device",
            hint="the kernel needs CONFIG_VFIO_DEVICE_CDEV and CONFIG_IOMMUFD",
        )
    return device.vfio
