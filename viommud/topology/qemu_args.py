"""The QEMU command line that goes with a configuration.

Which option is needed why: the generic vhost-user devices of QEMU (hw/virtio/vhost-user-test-device*.c) want to be told
the virtio device ID, queues and configuration size; guest memory must be shared; vfio-pci devices come before the
vhost-user device, so that they have been attached when the connection begins.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import quoteattr

from viommud.topology.errors import TopologyError
from viommud.topology.machines import mmio_slot
from viommud.topology.model import Topology
from viommud.topology.place import MmioPlace, PciPlace, rid_text
from viommud.topology.section import Machine

VIRTIO_ID_IOMMU = 23
QUEUES = 2
QUEUE_SIZE = 256

Accelerator = Literal["kvm", "tcg"]

_BINARIES: dict[Machine, str] = {
    "virt": "qemu-system-aarch64",
    "q35": "qemu-system-x86_64",
    "microvm": "qemu-system-x86_64",
}
_TCG_CPU: dict[Machine, str] = {"virt": "cortex-a72", "q35": "max", "microvm": "max"}
_ROOT_BUS = "pcie.0"
_MEMORY = "viommud-memory"
_CHARDEV = "viommud-socket"
_IOMMUFD = "viommud-iommufd"


@dataclass(frozen=True, slots=True)
class VfioPci:
    """A device of the host, assigned through iommufd."""

    endpoint: int
    host: str
    """Its PCI address on the host."""


@dataclass(frozen=True, slots=True)
class VfioUser:
    """A device in a process of its own, or viommud's relay to it."""

    endpoint: int
    socket: Path


Device = VfioPci | VfioUser


@dataclass(frozen=True, slots=True)
class Guest:
    """What the command line says besides the IOMMU."""

    memory_mib: int
    cpus: int
    accelerator: Accelerator
    socket: Path
    """viommud's vhost-user socket."""
    config_size: int
    """Bytes of the IOMMU's configuration space."""
    topology_file: Path | None
    """Device tree or VIOT; None where the machine takes none."""
    option_rom: Path | None = None
    """VIOT in an option ROM."""
    devices: tuple[Device, ...] = ()
    cpu: str | None = None
    """QEMU's name of the processor; None: the host's under KVM, otherwise one that boots quickly."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An option of QEMU with its value."""

    option: str
    value: str
    libvirt: bool = True
    """False: libvirt says this in its own elements."""


@dataclass(frozen=True, slots=True)
class Line:
    """A whole command line."""

    binary: str
    arguments: tuple[Argument, ...]

    def words(self) -> list[str]:
        """As a process is started with it."""
        return [self.binary, *(word for entry in self.arguments for word in (entry.option, entry.value))]


def iommu_line(topology: Topology, guest: Guest) -> Line:
    """The line that runs the guest behind the IOMMU.

    :raises TopologyError: QEMU's machine cannot have the topology.
    """
    machine = topology.machine
    _check_machine(topology, guest)
    arguments = [*_platform(machine, guest, _pcie(topology)), *_devices(topology, guest.devices)]
    arguments.append(Argument("-chardev", f"socket,id={_CHARDEV},path={_escape(guest.socket)}"))
    generic = (
        f"chardev={_CHARDEV},virtio-id={VIRTIO_ID_IOMMU},num_vqs={QUEUES},vq_size={QUEUE_SIZE}"
        f",config_size={guest.config_size}"
    )
    if isinstance(topology.iommu, MmioPlace):
        slot = mmio_slot(machine, topology.iommu.base)
        arguments.append(Argument("-global", "virtio-mmio.force-legacy=false"))
        arguments.append(Argument("-device", f"vhost-user-test-device,bus=virtio-mmio-bus.{slot},{generic}"))
    else:
        address = _address(topology.iommu, "the IOMMU")
        rom = f",romfile={_escape(guest.option_rom)}" if guest.option_rom is not None and machine == "virt" else ""
        arguments.append(Argument("-device", f"vhost-user-test-device-pci,{address},{generic}{rom}"))
    if guest.option_rom is not None and machine == "microvm":
        arguments.append(Argument("-option-rom", str(guest.option_rom)))
    if guest.topology_file is not None:
        if machine == "virt":
            arguments.append(Argument("-dtb", str(guest.topology_file)))
        else:
            arguments.append(Argument("-acpitable", f"file={_escape(guest.topology_file)}"))
    return Line(_BINARIES[machine], tuple(arguments))


def dump_line(topology: Topology, guest: Guest, tree: Path) -> Line:
    """The line that makes QEMU write the device tree of the same machine without the IOMMU, and exit.

    :raises TopologyError: the machine has no device tree.
    """
    if topology.machine != "virt":
        raise TopologyError(f"topology.machine: {topology.machine} has no device tree to dump; virt has")
    arguments = _platform(topology.machine, guest, f",dumpdtb={_escape(tree)}")
    return Line(_BINARIES[topology.machine], tuple(arguments))


def _check_machine(topology: Topology, guest: Guest) -> None:
    for bridge in topology.bridges:
        if bridge.segment:
            raise TopologyError(f"{bridge}: the machines of QEMU have PCI segment 0 only")
    if topology.machine == "microvm" and guest.topology_file is not None:
        raise TopologyError(
            "topology.machine: microvm takes neither a device tree nor -acpitable",
            hint="make an option ROM with `viommud topology viot --option-rom` and give it with --option-rom",
        )
    if guest.option_rom is not None:
        if topology.machine == "q35":
            raise TopologyError("topology.machine: q35 takes no option ROM; give the VIOT with --topology")
        if topology.machine == "virt" and not isinstance(topology.iommu, PciPlace):
            raise TopologyError(
                f"topology.iommu: {topology.iommu} is no PCI function, and on virt a ROM belongs to a PCI function"
            )


def _pcie(topology: Topology) -> str:
    """What -machine needs besides, for a machine that has PCI only when told so."""
    on_pci = isinstance(topology.iommu, PciPlace) or topology.pci
    return ",pcie=on" if topology.machine == "microvm" and on_pci else ""


def _platform(machine: Machine, guest: Guest, more: str) -> list[Argument]:
    """Machine, memory and processors: what a dumped device tree depends on."""
    if machine == "virt" and guest.accelerator == "kvm":
        more = f",gic-version=host{more}"
    cpu = guest.cpu or ("host" if guest.accelerator == "kvm" else _TCG_CPU[machine])
    return [
        Argument("-machine", f"{machine},memory-backend={_MEMORY}{more}", libvirt=False),
        Argument("-accel", guest.accelerator, libvirt=False),
        Argument("-cpu", cpu, libvirt=False),
        Argument("-smp", str(guest.cpus), libvirt=False),
        Argument("-m", f"{guest.memory_mib}M", libvirt=False),
        Argument("-object", f"memory-backend-memfd,id={_MEMORY},size={guest.memory_mib}M,share=on", libvirt=False),
    ]


def _devices(topology: Topology, devices: Sequence[Device]) -> Iterable[Argument]:
    seen: set[int] = set()
    for device in devices:
        if device.endpoint in seen:
            raise TopologyError(f"endpoint {device.endpoint:#x} is given two devices")
        seen.add(device.endpoint)
    if any(isinstance(device, VfioPci) for device in devices):
        yield Argument("-object", f"iommufd,id={_IOMMUFD}")
    # The order of the devices is QEMU's order of making them.
    for device in sorted(devices, key=lambda device: (isinstance(device, VfioUser), device.endpoint)):
        place = topology.find(device.endpoint)
        if not isinstance(place, PciPlace):
            raise TopologyError(f"endpoint {device.endpoint:#x} is no PCI function of the topology")
        name = f"endpoint{device.endpoint:x}"
        if isinstance(device, VfioPci):
            address = _address(place, f"endpoint {device.endpoint:#x}")
            # QEMU 11.1 ends with a segmentation fault on a vfio-pci device without an id.
            yield Argument("-device", f"vfio-pci,id={name},host={device.host},iommufd={_IOMMUFD},{address}")
        else:
            _address(place, f"endpoint {device.endpoint:#x}")
            described = {
                "driver": "vfio-user-pci",
                "id": name,
                "bus": _ROOT_BUS,
                "addr": _slot(place),
                "socket": {"type": "unix", "path": str(device.socket)},
            }
            yield Argument("-device", json.dumps(described, separators=(",", ":")))


def _address(place: PciPlace, what: str) -> str:
    if place.segment or place.rid >> 8:
        raise TopologyError(
            f"{what}: {place} is not on bus 00 of segment 0, where QEMU puts what it is told to put there"
        )
    return f"bus={_ROOT_BUS},addr={_slot(place)}"


def _slot(place: PciPlace) -> str:
    """Device and function as QEMU's addr= has them."""
    return rid_text(place.rid).partition(":")[2]


def _escape(path: Path) -> str:
    """A path as the value of a key: QEMU reads two commas as one."""
    return str(path).replace(",", ",,")


def shell(line: Line) -> str:
    """One line for a shell, broken before every option."""
    options = (f"{entry.option} {shlex.quote(entry.value)}" for entry in line.arguments)
    return " \\\n  ".join([line.binary, *options]) + "\n"


def as_json(line: Line) -> str:
    """A list of words."""
    return json.dumps(line.words(), indent=2) + "\n"


def libvirt(line: Line) -> str:
    """A block for a libvirt domain.

    The domain element needs xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0"; memory, machine and processors are
    libvirt's own elements, and the memory must be shared.
    """
    lines = [
        "<!-- and in the domain: <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> -->",
        "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
    ]
    for entry in line.arguments:
        if entry.libvirt:
            lines += [f"  <qemu:arg value={quoteattr(word)}/>" for word in (entry.option, entry.value)]
    return "\n".join([*lines, "</qemu:commandline>", ""])
