"""A Linux guest started by the very commands that viommud gives its users: `topology` and `qemu-args`.

The test adds what is the user's own: a kernel, a RAM disk, serial lines, and the devices that are not viommud's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vm import assets, initramfs
from vm.guest import MODULES, Guest
from vm.qemu import Qemu, QemuError, wait_for_socket

Machine = Literal["virt", "q35", "microvm"]
Description = Literal["device tree", "ACPI table", "option ROM", "initrd override", "none"]
"""How the guest is told."""

MEMORY_MIB = 512
PROGRAMS = ("vfio_map",)


@dataclass(frozen=True)
class Platform:
    """A kind of machine and a kernel on it."""

    kernel: str
    """A name of assets.KERNELS."""
    machine: Machine
    iommu: str
    """As [topology] has it."""
    description: Description
    uefi: bool = False
    cpu: str | None = None
    """QEMU's name of it; None: what viommud chooses."""

    @property
    def architecture(self) -> assets.Architecture:
        """The kernel's."""
        return assets.KERNELS[self.kernel].architecture

    def config(self, endpoints: Sequence[str], granule: str) -> str:
        """A configuration of viommud for this platform."""
        msi = "arm64" if self.architecture == "arm64" else "x86"
        listed = "".join(f'[[endpoint]]\nid = "{where}"\n' for where in endpoints)
        return (
            f'[device]\nmsi = "{msi}"\ngranule = "{granule}"\n'
            f'[topology]\nmachine = "{self.machine}"\niommu = "{self.iommu}"\n{listed}'
        )


def viommud(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of viommud to its end."""
    return subprocess.run([sys.executable, "-m", "viommud", *arguments], capture_output=True, text=True)


def _output(*arguments: str) -> str:
    done = viommud(*arguments)
    if done.returncode != 0:
        raise QemuError(f"viommud {' '.join(arguments)} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout


@contextmanager
def start(
    directory: Path,
    platform: Platform,
    config: Path,
    socket_path: Path,
    devices: Mapping[str, str],
    modules: Sequence[str] = MODULES,
) -> Iterator[Guest]:
    """Boot a guest and wait for its shell; QEMU ends with the block.

    :param directory: for logs and the files of this run; QEMU's control socket is qmp.sock there.
    :param config: viommud's configuration, of this platform.
    :param socket_path: where viommud listens.
    :param devices: functions on bus 0 and their kinds, listed as endpoints or not.
    :param modules: in the RAM disk.
    """
    kernel = assets.kernel(platform.kernel)
    emulator = assets.emulator(platform.architecture)
    ram_disk = directory / "initramfs"
    ram_disk.write_bytes(initramfs.make(kernel, modules, PROGRAMS))
    words = _command(platform, config, socket_path, emulator, directory, ram_disk)
    console, shell = ("ttyAMA0", "ttyAMA1") if platform.machine == "virt" else ("ttyS0", "ttyS1")
    second = (
        ("-device", "isa-serial,chardev=shell,index=1")
        if platform.machine == "microvm"
        else ("-serial", "chardev:shell")
    )
    arguments = [
        *words,
        *("-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off"),
        *("-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console", *second),
        *(word for where, kind in devices.items() for word in ("-device", f"{kind},bus=pcie.0,addr={where[3:]}")),
        *("-kernel", str(kernel.image), "-initrd", str(ram_disk)),
        *("-append", f"console={console} panic=-1 quiet vm.shell={shell}"),
        *(("-bios", str(assets.firmware())) if platform.uefi else ()),
        # Linux measures its clocks against each other, which fails on an emulated microvm while the host is busy: there
        # is no second clock to turn to.  With time that follows the guest's instructions it cannot fail.
        *(("-icount", "shift=1") if platform.machine == "microvm" else ()),
    ]
    wait_for_socket(socket_path)
    with Qemu(emulator, arguments, directory, sockets=("shell",)) as qemu:
        guest = Guest(qemu, directory)
        guest.wait_ready()
        yield guest


def _command(
    platform: Platform,
    config: Path,
    socket_path: Path,
    emulator: assets.Emulator,
    directory: Path,
    ram_disk: Path,
) -> list[str]:
    """QEMU's options, from viommud; the description is written first."""
    described: tuple[str, ...] = ()
    common = (
        *("--config", str(config), "--socket-path", str(socket_path)),
        *("--memory", f"{MEMORY_MIB}M", "--accel", "tcg", "--format", "json"),
        *(("--cpu", platform.cpu) if platform.cpu else ()),
    )
    write = ("--config", str(config), "-o")
    if platform.description == "device tree":
        base, tree = directory / "base.dtb", directory / "guest.dtb"
        dump: list[str] = json.loads(_output("qemu-args", *common, "--dump-dtb", str(base)))
        # A second serial line is in the tree if there is one.
        _run_qemu(emulator, [*dump[1:], "-nodefaults", "-display", "none", "-serial", "null", "-serial", "null"])
        _output("topology", "dt", "--base", str(base), *write, str(tree))
        described = ("--topology", str(tree))
    elif platform.description == "ACPI table":
        _output("topology", "viot", *write, str(directory / "viot.aml"))
        described = ("--topology", str(directory / "viot.aml"))
    elif platform.description == "option ROM":
        _output("topology", "viot", "--option-rom", *write, str(directory / "viot.rom"))
        described = ("--option-rom", str(directory / "viot.rom"))
    elif platform.description == "initrd override":
        _output("topology", "viot", "--initrd-override", *write, str(directory / "viot.cpio"))
        ram_disk.write_bytes((directory / "viot.cpio").read_bytes() + ram_disk.read_bytes())
    words: list[str] = json.loads(_output("qemu-args", *common, *described))
    return words[1:]


def _run_qemu(emulator: assets.Emulator, arguments: Sequence[str]) -> None:
    command = [*emulator.command, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **emulator.environment})
    if done.returncode != 0:
        raise QemuError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()}")
