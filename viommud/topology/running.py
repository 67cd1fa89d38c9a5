"""The PCI functions and virtio-mmio devices of a running QEMU, and what each is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from viommud.topology.errors import TopologyError

VIRTIO_IOMMU = (0x1AF4, 0x1057)
"""PCI vendor and device ID of a virtio-iommu."""
TRANSLATED = frozenset({"vfio-pci", "vfio-pci-nohotplug", "vfio-user-pci"})
"""QEMU's device types whose DMA a process outside QEMU can translate."""
_TEST_DEVICE = re.compile(r"vhost-user-(test-)?device")
_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon")
_CHILD = re.compile(r"child<(.+)>")
_MMIO_BUS = re.compile(r"virtio-mmio-bus\.(\d+)$")
_SLOT = re.compile(r"([0-9a-fA-F]{1,2})\.([0-7])")


class Asker(Protocol):
    """Somebody who answers QMP commands."""

    def ask(self, command: str, **arguments: object) -> Any:
        """What the command returns."""


@dataclass(frozen=True, slots=True)
class Function:
    """A PCI function that a guest sees; QEMU does not tell the segment, and its own machines have only segment 0."""

    rid: int
    vendor: int
    device: int
    kind: str | None
    """QEMU's type of the device; None where it cannot be found out."""


@dataclass(frozen=True, slots=True)
class Running:
    """What is plugged into the machine."""

    functions: tuple[Function, ...]
    mmio_slots: tuple[int, ...]
    """Numbers of the virtio-mmio slots that hold a generic vhost-user device."""


@dataclass(frozen=True, slots=True)
class _Plugged:
    """A device given on the command line or hot-plugged."""

    name: str
    kind: str
    parent_bus: str
    devfn: int | None
    """device<<3 | function; None where QEMU does not tell it."""


def look(qemu: Asker) -> Running:
    """Ask QEMU.

    :raises TopologyError: QEMU refuses, or its answers are not understood.
    """
    plugged = list(_plugged(qemu))
    try:
        functions = [
            found
            for bus in qemu.ask("query-pci")
            for found in _functions(bus["bus"], bus["devices"], plugged, root=True)
        ]
    except (KeyError, TypeError) as error:
        raise TopologyError(f"QEMU's answer to query-pci is not understood: {error!r}") from error
    slots = [
        int(match[1])
        for device in plugged
        if _TEST_DEVICE.fullmatch(device.kind) and (match := _MMIO_BUS.search(device.parent_bus))
    ]
    return Running(tuple(functions), tuple(slots))


def _plugged(qemu: Asker) -> Iterable[_Plugged]:
    for container in _CONTAINERS:
        for child in qemu.ask("qom-list", path=container):
            if match := _CHILD.fullmatch(child["type"]):
                path = f"{container}/{child['name']}"
                properties = {entry["name"] for entry in qemu.ask("qom-list", path=path)}
                bus = qemu.ask("qom-get", path=path, property="parent_bus") if "parent_bus" in properties else ""
                address = qemu.ask("qom-get", path=path, property="addr") if "addr" in properties else None
                yield _Plugged(child["name"], match[1], str(bus or ""), _devfn(address))


def _devfn(address: object) -> int | None:
    """A device's place on its bus: QEMU 11 tells a number; as a string it is what -device takes, "02.0"."""
    if isinstance(address, int):
        return address
    match = _SLOT.fullmatch(str(address))
    return int(match[1], 16) << 3 | int(match[2]) if match else None


def _functions(
    bus: int, devices: Iterable[Mapping[str, Any]], plugged: Iterable[_Plugged], *, root: bool
) -> Iterable[Function]:
    for device in devices:
        slot, function = device["slot"], device["function"]
        kind = _kind(device.get("qdev_id", ""), slot, function, plugged, root and bus == 0)
        yield Function(bus << 8 | slot << 3 | function, device["id"]["vendor"], device["id"]["device"], kind)
        if "pci_bridge" in device:
            below = device["pci_bridge"]
            yield from _functions(below["bus"]["number"], below.get("devices", ()), plugged, root=False)


def _kind(name: str, slot: int, function: int, plugged: Iterable[_Plugged], on_root: bool) -> str | None:
    """QEMU's type of a function: by its name, or by its address for one without a name on the root bus."""
    for device in plugged:
        if name and device.name == name:
            return device.kind
        if (
            on_root
            and not name
            and device.devfn == slot << 3 | function
            and device.parent_bus.rsplit("/", 1)[-1] in ("pcie.0", "pci.0")
        ):
            return device.kind
    return None
