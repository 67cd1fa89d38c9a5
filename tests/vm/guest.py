"""A Linux guest: QEMU, a kernel, the test RAM disk, and a shell in it to run things.

The kernel's console goes to a file; the shell has a serial line of its own, so that nothing mixes.
"""

from __future__ import annotations

import itertools
import re
import select
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from vm import assets, description, initramfs
from vm.assets import Architecture
from vm.qemu import PATIENCE, Qemu, QemuError, wait_for_socket

IOMMU = "00:01.0"
"""Where the IOMMU is, in every guest."""
DEVICES: Mapping[str, str] = MappingProxyType({"00:02.0": "edu", "00:03.0": "pci-testdev"})
"""Functions for the guest to play with, and their kinds."""
MODULES = ("virtio-iommu", "vfio-pci", "vfio_iommu_type1")
_TROUBLE = re.compile(r"iommu|viot|vfio|WARNING|BUG|Oops|Call trace", re.IGNORECASE)


_UNSAFE = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"


class GuestError(QemuError):
    """The guest did not do what it should; the message has what it and QEMU said."""


@dataclass(frozen=True)
class Done:
    """What a command in the guest came to."""

    status: int
    output: str

    def results(self) -> list[dict[str, float]]:
        """The numbers of its RESULT lines: RESULT program key=value ..."""
        lines = [line.split()[2:] for line in self.output.splitlines() if line.startswith("RESULT ")]
        return [{key: float(value) for key, value in (item.split("=") for item in line)} for line in lines]


@dataclass(frozen=True)
class Shape:
    """What kind of guest."""

    kernel: str = "arm64"
    """A name of assets.KERNELS."""
    iommu: Literal["vhost-user", "qemu", "none"] = "vhost-user"
    """vhost-user: a back-end, whose socket is given; qemu: QEMU's own, in process."""
    memory_mib: int = 512
    cpus: int = 1
    processor: str | None = None
    devices: Mapping[str, str] = field(default_factory=lambda: DEVICES)
    """Functions on bus 0 and their kinds, QEMU's properties included: {"00:02.0": "edu"}."""
    modules: Sequence[str] = MODULES
    """In the RAM disk; Guest.load() inserts them."""
    programs: Sequence[str] = ("vfio_map", "raw_queue")
    """Of tests/guest, in /bin of the RAM disk."""
    files: Sequence[tuple[str, Path]] = ()
    """Further files for the RAM disk: path in the guest, path here."""
    command_line: str = ""
    """More for the kernel's."""
    arguments: Sequence[str] = ()
    """More for QEMU's."""
    endpoints: Sequence[str] | None = None
    """Functions that the guest is told are behind the IOMMU; None: all devices."""

    @property
    def architecture(self) -> Architecture:
        """The kernel's."""
        return assets.KERNELS[self.kernel].architecture

    def config(self, extra: str = "") -> str:
        """A configuration of viommud for this guest.

        :param extra: tables to put in front, in TOML.
        """
        machine = "virt" if self.architecture == "arm64" else "q35"
        msi = "arm64" if self.architecture == "arm64" else "x86"
        device = "" if "[device]" in extra else f'[device]\nmsi = "{msi}"\n'
        listed = "".join(f'[[endpoint]]\nid = "{where}"\n' for where in self.listed)
        return f'{extra}\n{device}[topology]\nmachine = "{machine}"\niommu = "{IOMMU}"\n{listed}'

    @property
    def listed(self) -> Sequence[str]:
        """The functions behind the IOMMU."""
        return tuple(self.devices) if self.endpoints is None else self.endpoints


class Guest:
    """A running guest whose shell answers."""

    def __init__(self, qemu: Qemu, directory: Path) -> None:
        self.qemu = qemu
        self.console_log = directory / "console.log"
        self.release = ""
        """As uname -r says."""
        self._shell = qemu.channel("shell")
        self._buffer = b""
        self._tokens = itertools.count()

    def wait_ready(self) -> None:
        """Wait for the shell after a start or a reboot."""
        self.release = self._until("@ready ").strip()

    def run(self, command: str, *, seconds: float = PATIENCE) -> Done:
        """Run a shell command in the guest and wait for its end."""
        return self.finish(self.begin(command), seconds=seconds)

    def begin(self, command: str) -> str:
        """Start a shell command; the token is for finish()."""
        assert "\n" not in command
        token = f"t{next(self._tokens)}"
        self.send(f"{token} {command}\n")
        return token

    def send(self, text: str) -> None:
        """Type something: to the shell, or to the command that runs."""
        self._shell.sendall(text.encode())

    def wait_line(self, start: str, *, seconds: float = PATIENCE) -> str:
        """Wait for a line of the running command that begins so; the rest of the line."""
        return self._until(start, seconds=seconds)

    def finish(self, token: str, *, seconds: float = PATIENCE) -> Done:
        """Wait for the end of a command that begin() started."""
        lines: list[str] = []
        status = self._until(f"@{token} ", lines, seconds=seconds)
        return Done(int(status), "".join(lines))

    def check(self, command: str, *, seconds: float = PATIENCE) -> Done:
        """Run a command that must succeed.

        :raises GuestError: it does not.
        """
        done = self.run(command, seconds=seconds)
        if done.status != 0:
            raise self.error(f"in the guest, {command!r} ended with status {done.status}:\n{done.output}")
        return done

    def load(self, modules: Sequence[str] = MODULES) -> None:
        """Insert modules, and let VFIO work where no interrupt remapping is told of."""
        self.check(f"load {shlex.join(name.replace('-', '_') for name in modules)}")
        self.check(f"! [ -e {_UNSAFE} ] || echo Y > {_UNSAFE}")

    def dmesg(self) -> list[str]:
        """The kernel's log."""
        return self.check("dmesg").output.splitlines()

    def iommu_log(self) -> list[str]:
        """Lines of the kernel's log about IOMMUs, VFIO and its own mistakes."""
        return [line for line in self.dmesg() if _TROUBLE.search(line)]

    def power_off(self) -> int:
        """Power off; QEMU's exit status."""
        self.send("off poweroff -f\n")
        return self.qemu.wait()

    def reboot(self) -> None:
        """Reboot inside QEMU and wait for the new shell."""
        self.send("off reboot -f\n")
        self.wait_ready()

    def error(self, text: str) -> GuestError:
        """An error with what QEMU and the guest's kernel said."""
        console = self.console_log.read_text(errors="replace").strip().splitlines()[-40:]
        said = str(self.qemu.error(text))
        return GuestError(said + ("\n--- guest\n" + "\n".join(console) if console else ""))

    def _until(self, start: str, before: list[str] | None = None, *, seconds: float = PATIENCE) -> str:
        """The rest of the next line that begins so; the lines before it are added to a list."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._line(deadline, f"a line {start!r}")
            if line.startswith(start):
                return line[len(start) :]
            if before is not None:
                before.append(line)

    def _line(self, deadline: float, what: str) -> str:
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._shell], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self.error(f"the guest did not say {what} in time")
            data = self._shell.recv(65536)
            if not data:
                raise self.error(f"QEMU hung up before the guest said {what}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode(errors="replace").rstrip("\r") + "\n"


@contextmanager
def start(directory: Path, shape: Shape, socket_path: Path | None = None) -> Iterator[Guest]:
    """Boot a guest and wait for its shell; QEMU ends with the block.

    :param directory: for logs and the files of this run.
    :param socket_path: the back-end's socket, for the IOMMU "vhost-user".
    """
    kernel = assets.kernel(shape.kernel)
    emulator = assets.emulator(shape.architecture)
    ram_disk = directory / "initramfs"
    ram_disk.write_bytes(initramfs.make(kernel, shape.modules, shape.programs, shape.files))
    arm = shape.architecture == "arm64"
    machine = "virt" if arm else "q35"
    console, shell = ("ttyAMA0", "ttyAMA1") if arm else ("ttyS0", "ttyS1")
    board = [
        *("-cpu", shape.processor or ("cortex-a72" if arm else "max")),
        *("-m", f"{shape.memory_mib}M", "-smp", str(shape.cpus)),
        *("-object", f"memory-backend-memfd,id=ram,size={shape.memory_mib}M,share=on"),
        *("-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console"),
    ]
    machine = f"{machine},memory-backend=ram"
    devices = [option for where, kind in shape.devices.items() for option in ("-device", f"{kind},addr={where[3:]}")]
    arguments = [
        *("-machine", machine, "-accel", "tcg"),
        *board,
        *("-serial", "chardev:shell"),
        *devices,
        *_iommu(shape, emulator, machine, board, directory, socket_path),
        *("-kernel", str(kernel.image), "-initrd", str(ram_disk)),
        *("-append", f"console={console} panic=-1 quiet vm.shell={shell} {shape.command_line}".strip()),
        *shape.arguments,
    ]
    with Qemu(emulator, arguments, directory, sockets=("shell",)) as qemu:
        guest = Guest(qemu, directory)
        guest.wait_ready()
        yield guest


def _iommu(
    shape: Shape,
    emulator: assets.Emulator,
    machine: str,
    board: Sequence[str],
    directory: Path,
    socket_path: Path | None,
) -> list[str]:
    """QEMU's options for the IOMMU and for what the guest is told of it."""
    if shape.iommu == "none":
        return []
    if shape.iommu == "qemu":
        return ["-device", f"virtio-iommu-pci,addr={IOMMU[3:]}"]
    assert socket_path is not None, "a vhost-user IOMMU has a socket"
    config = directory / "topology.toml"
    config.write_text(shape.config())
    options = [
        *("-chardev", f"socket,id=viommu,path={socket_path}"),
        "-device",
        f"{assets.QEMU_DEVICE},chardev=viommu,virtio-id=23,num_vqs=2,vq_size=256,config_size=40,addr={IOMMU[3:]}",
    ]
    if shape.architecture == "arm64":
        base, tree = directory / "base.dtb", directory / "guest.dtb"
        description.dump(emulator, machine, [*board, "-serial", "null"], base)
        description.add_iommu(config, base, tree)
        wait_for_socket(socket_path)
        return [*options, "-dtb", str(tree)]
    table = directory / "viot.aml"
    description.write_viot(config, table)
    wait_for_socket(socket_path)
    return [*options, "-acpitable", f"file={table}"]
