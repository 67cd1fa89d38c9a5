"""QEMU without a guest: a test reads and writes the machine's registers through QEMU's qtest protocol.

Guest RAM is a memfd that the test maps, so that rings and buffers cost nothing and only registers take the way through
the protocol (QEMU system/qtest.c).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from frontend.memory import GuestMemory, Ram

from vm import assets
from vm.pci import EcamBus, PciBus, PortBus
from vm.qemu import PATIENCE, Qemu, QemuError, wait_for_socket
from vm.qmp import Qmp

Board = Literal["virt", "q35"]

MEBIBYTE = 1 << 20
RAM_SIZE = 64 * MEBIBYTE
_LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}


class Registers:
    """The machine's physical address space and I/O ports."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(PATIENCE)
        self._buffer = b""

    def read(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes in one access."""
        return int(self._ask(f"read{_LETTERS[size]} {address:#x}"), 0)

    def write(self, address: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes in one access."""
        self._ask(f"write{_LETTERS[size]} {address:#x} {value:#x}")

    def port_read(self, port: int, size: int) -> int:
        """Read an I/O port of 1, 2 or 4 bytes."""
        return int(self._ask(f"in{_LETTERS[size]} {port:#x}"), 0)

    def port_write(self, port: int, size: int, value: int) -> None:
        """Write an I/O port of 1, 2 or 4 bytes."""
        self._ask(f"out{_LETTERS[size]} {port:#x} {value:#x}")

    def _ask(self, command: str) -> str:
        self._socket.sendall(command.encode() + b"\n")
        while True:
            line = self._line()
            if line.startswith("IRQ"):
                continue  # told without being asked
            word, _, rest = line.partition(" ")
            if word != "OK":
                raise QemuError(f"{command}: {line}")
            return rest

    def _line(self) -> str:
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise QemuError("QEMU hung up")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()


@dataclass(frozen=True)
class Machine:
    """A machine under test."""

    board: Board
    qemu: Qemu
    registers: Registers
    bus: PciBus
    memory: GuestMemory
    """The part of RAM that neither firmware nor QEMU writes to, also when the system resets."""

    @property
    def qmp(self) -> Qmp:
        """QEMU's control channel."""
        return self.qemu.qmp


@contextmanager
def start(
    directory: Path,
    board: Board,
    arguments: Sequence[str],
    *,
    ram: str = "",
    shared: bool = True,
    pass_fds: Sequence[int] = (),
) -> Iterator[Machine]:
    """Start a machine; it ends with the block.

    :param arguments: further options of QEMU: devices above all.
    :param ram: more for -m, as "slots=2,maxmem=1G".
    :param shared: as a vhost-user back-end needs it; otherwise the test does not see what is written to RAM either.
    :param pass_fds: descriptors that QEMU inherits.
    """
    if board == "virt":
        # QEMU puts its device tree at the start of RAM at every reset.
        piece = Ram(0x4000_0000 + 2 * MEBIBYTE, RAM_SIZE - 2 * MEBIBYTE, offset=2 * MEBIBYTE)
        machine = ["-machine", "virt,highmem-ecam=off,memory-backend=ram", "-cpu", "cortex-a57"]
    else:
        # The BIOS and its shadow are below.
        piece = Ram(MEBIBYTE, RAM_SIZE - MEBIBYTE, offset=MEBIBYTE)
        machine = ["-machine", "q35,memory-backend=ram"]
    with GuestMemory(piece) as memory:
        backing = f"memory-backend-file,id=ram,size={RAM_SIZE},mem-path=/proc/self/fd/{piece.fd}"
        options = [
            *machine,
            *("-accel", "qtest", "-qtest", "chardev:qtest", "-qtest-log", "/dev/null"),
            *("-m", f"{RAM_SIZE // MEBIBYTE}M" + (f",{ram}" if ram else "")),
            *("-object", f"{backing},share={'on' if shared else 'off'}"),
            *arguments,
        ]
        emulator = assets.emulator("arm64" if board == "virt" else "amd64")
        with Qemu(emulator, options, directory, sockets=("qtest",), pass_fds=(piece.fd, *pass_fds)) as qemu:
            registers = Registers(qemu.channel("qtest"))
            bus: PciBus = EcamBus(registers) if board == "virt" else PortBus(registers)
            yield Machine(board, qemu, registers, bus, memory)


def vhost_user_iommu(socket_path: Path, *, address: str = "05.0", more: str = "") -> list[str]:
    """QEMU's options for an IOMMU of a back-end, as soon as its socket is there."""
    wait_for_socket(socket_path)
    device = f"{assets.QEMU_DEVICE},id=viommu,chardev=viommu,virtio-id=23,num_vqs=2,vq_size=256,config_size=40"
    return [
        *("-chardev", f"socket,id=viommu,path={socket_path}"),
        *("-device", f"{device},addr={address}{more}"),
    ]


def qemu_iommu(*, address: str = "05.0", more: str = "") -> list[str]:
    """QEMU's options for its own IOMMU."""
    return ["-device", f"virtio-iommu-pci,id=viommu,addr={address}{more}"]
