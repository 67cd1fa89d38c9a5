"""A guest of the lab: QEMU with KVM, started by `viommud run`, and devices of the lab given to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lab.prepared import GUEST
from vm import description
from vm.assets import Emulator
from vm.guest import MODULES, Guest
from vm.qemu import Qemu

IOMMU = "00:01.0"
QEMU = "qemu-system-aarch64"
MEMORY_MIB = 256
_MACHINE = "virt,gic-version=3,memory-backend=ram"


def bind(address: str, driver: str) -> None:
    """Give a function of the lab to a driver."""
    device = Path("/sys/bus/pci/devices") / address
    if (device / "driver").exists():
        if os.readlink(device / "driver").rpartition("/")[2] == driver:
            return
        (device / "driver/unbind").write_text(address)
    (device / "driver_override").write_text(driver)
    Path("/sys/bus/pci/drivers_probe").write_text(address)
    bound = os.readlink(device / "driver").rpartition("/")[2]
    assert bound == driver, f"{address} is bound to {bound}"


def pinned_pages() -> int:
    """Pages that are pinned for devices in the whole lab."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters["nr_foll_pin_acquired"]) - int(counters["nr_foll_pin_released"])


def smmu_faults() -> list[int]:
    """Addresses of the accesses that the lab's SMMU has stopped, oldest first, as its kernel logs them."""
    log = subprocess.run(["busybox", "dmesg"], capture_output=True, text=True, check=True).stdout
    return [int(found, 16) for found in re.findall(r"arm-smmu-v3.*?(?:iova|input addr(?:ess)?):? ?(0x[0-9a-f]+)", log)]


@dataclass(frozen=True)
class Shape:
    """What kind of guest."""

    devices: Mapping[str, str]
    """Functions in the guest, and the lab's that they are: {"00:02.0": "0000:00:02.0"}."""
    config: str = ""
    """Tables of viommud's configuration besides [topology] and [[endpoint]]."""
    iommu: Literal["viommud", "qemu", "none"] = "viommud"
    """qemu: QEMU's own, in process, with iommufd behind it; none: devices reach all memory."""
    memory_mib: int = MEMORY_MIB
    cpus: int = 1
    arguments: Sequence[str] = field(default_factory=tuple)
    """More for QEMU's command line, in front of the devices."""
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = field(default_factory=tuple)
    """A command that starts viommud with something changed, as prlimit does."""

    def toml(self) -> str:
        """viommud's configuration."""
        endpoints = "".join(
            f'[[endpoint]]\nid = "{inside}"\nhost.device = "{outside}"\n' for inside, outside in self.devices.items()
        )
        return f'{self.config}\n[topology]\nmachine = "virt"\niommu = "{IOMMU}"\n{endpoints}'


class HostGuest(Guest):
    """A guest, and the daemon that started its QEMU."""

    def daemon_log(self) -> list[dict[str, Any]]:
        """What viommud has logged so far."""
        lines = self.qemu.log.read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The daemon's lines about one event."""
        return [line for line in self.daemon_log() if line["event"] == event]


_trees: dict[tuple[tuple[str, ...], int, int], bytes] = {}


def _tree(shape: Shape, board: Sequence[str], config: Path, directory: Path) -> bytes:
    """The guest's device tree; guests that differ in nothing that is in it share one."""
    key = (tuple(shape.devices), shape.cpus, shape.memory_mib)
    if key not in _trees:
        base, tree = directory / "base.dtb", directory / "made.dtb"
        description.dump(Emulator((QEMU,), ""), _MACHINE, [*board, "-serial", "null"], base)
        description.add_iommu(config, base, tree)
        _trees[key] = tree.read_bytes()
    return _trees[key]


def _with_viommud(shape: Shape, board: Sequence[str], directory: Path) -> tuple[Emulator, list[str]]:
    """The command that starts viommud and it QEMU, and what says where the IOMMU is."""
    config, tree = directory / "viommud.toml", directory / "guest.dtb"
    config.write_text(shape.toml())
    tree.write_bytes(_tree(shape, board, config, directory))
    run = (*shape.prefix, sys.executable, "-m", "viommud", "run", "--config", str(config))
    command = (*run, "--log-level", "debug", "--log-format", "json", "--", QEMU)
    return Emulator(command, "", shape.environment), ["-dtb", str(tree)]


def _without(shape: Shape) -> list[str]:
    """The same devices at the same places, and QEMU's IOMMU if there is to be one."""
    words = ["-device", f"virtio-iommu-pci,addr={IOMMU[3:]}"] if shape.iommu == "qemu" else []
    words += ["-object", "iommufd,id=iommufd"]
    for inside, outside in shape.devices.items():
        name = f"endpoint{outside[5:].replace(':', '').replace('.', '')}"
        words += ["-device", f"vfio-pci,id={name},host={outside},iommufd=iommufd,addr={inside[3:]}"]
    return words


@contextmanager
def start(directory: Path, shape: Shape) -> Iterator[HostGuest]:
    """Boot a guest and wait for its shell; everything ends with the block."""
    for address in shape.devices.values():
        bind(address, "vfio-pci")
    memory = f"{shape.memory_mib}M"
    board = [
        *("-accel", "kvm", "-cpu", "host", "-m", memory, "-smp", str(shape.cpus)),
        *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
        *("-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console"),
    ]
    if shape.iommu == "viommud":
        emulator, described = _with_viommud(shape, board, directory)
    else:
        emulator, described = Emulator((*shape.prefix, QEMU), "", shape.environment), _without(shape)
    arguments = [
        *("-machine", _MACHINE, *board, "-serial", "chardev:shell", *described),
        *("-kernel", str(GUEST / "Image"), "-initrd", str(GUEST / "initrd")),
        *("-append", "console=ttyAMA0 panic=-1 quiet vm.shell=ttyAMA1"),
        *shape.arguments,
    ]
    with Qemu(emulator, arguments, directory, sockets=("shell",)) as qemu:
        guest = HostGuest(qemu, directory)
        guest.wait_ready()
        yield guest


def load(guest: Guest) -> None:
    """Have the guest's drivers in."""
    guest.load(MODULES)
