"""Descriptors as a launcher passes them to viommud and to a machine monitor, and a monitor that is the test itself."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from frontend.guest import Guest
from frontend.memory import GuestMemory
from integration.daemon import Daemon
from vm.qemu import PATIENCE

from host.edu import Edu
from host.machine import bind
from viommud.host import sysfs, uapi

Kind = Literal["iommufd", "type1"]

_TYPE = 0x3B << 8
_GROUP_SET_CONTAINER, _SET_IOMMU, _GROUP_GET_DEVICE = _TYPE | 104, _TYPE | 102, _TYPE | 106
_BIND, _ATTACH = _TYPE | 118, _TYPE | 119
_IOAS_ALLOC, _IOAS_MAP_FILE = _TYPE | 0x81, _TYPE | 0x8F
_TYPE1V2 = 3


@dataclass
class Passed:
    """A device of the lab, open."""

    device: int
    shared: dict[str, int]
    """What viommud is passed, by name."""
    key: str
    """What the configuration says of the endpoint."""
    iommufd: int | None = None
    stack: ExitStack | None = None


@contextmanager
def passed(kind: Kind, address: str) -> Iterator[Passed]:
    """Open a device for a test; everything is closed with the block."""
    bind(address, "vfio-pci")
    with ExitStack() as stack:

        def opened(path: str) -> int:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        if kind == "iommufd":
            iommufd, device = opened(uapi.IOMMU), opened(str(sysfs.vfio_device(address)))
            yield Passed(device, {"iommufd": iommufd, "edu": device}, 'host.fd = "edu"', iommufd)
            return
        container = opened("/dev/vfio/vfio")
        group = opened(f"/dev/vfio/{sysfs.look(address).group}")
        fcntl.ioctl(group, _GROUP_SET_CONTAINER, struct.pack("=i", container))
        fcntl.ioctl(container, _SET_IOMMU, _TYPE1V2)
        device = fcntl.ioctl(group, _GROUP_GET_DEVICE, bytearray(address.encode() + b"\0"), True)
        stack.callback(os.close, device)
        yield Passed(device, {"container": container}, 'host.container = "container"')


def bind_as_monitor(device: Passed, memory: GuestMemory) -> None:
    """What QEMU does with a device and guest memory: bind it, and attach it to all memory at its own addresses."""
    if device.iommufd is None:
        return
    fcntl.ioctl(device.device, _BIND, bytearray(struct.pack("=IIiI", 16, 0, device.iommufd, 0)), True)
    allocated = bytearray(struct.pack("=III", 12, 0, 0))
    fcntl.ioctl(device.iommufd, _IOAS_ALLOC, allocated, True)
    (ioas,) = struct.unpack_from("=I", allocated, 8)
    for ram in memory.rams:
        add_as_monitor(device, ioas, ram.fd, ram.gpa, ram.size, ram.offset)
    fcntl.ioctl(device.device, _ATTACH, bytearray(struct.pack("=III", 12, 0, ioas)), True)


def add_as_monitor(device: Passed, ioas: int, fd: int, gpa: int, size: int, offset: int) -> None:
    """Memory for all devices."""
    assert device.iommufd is not None
    request = struct.pack("=IIIiQQQ", 40, 7, ioas, fd, offset, size, gpa)
    fcntl.ioctl(device.iommufd, _IOAS_MAP_FILE, bytearray(request), True)


def _wait_for_socket(daemon: Daemon) -> None:
    """An emulated host takes seconds to start a program, and more when the machine under it is busy."""
    deadline = time.monotonic() + PATIENCE
    while not daemon.socket_path.exists() and daemon.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)  # and no busy waiting, which would take one of the lab's processors


@contextmanager
def served(
    kind: Kind, address: str, directory: Path, config: str = "", memory: GuestMemory | None = None
) -> Iterator[tuple[Daemon, Guest, Edu]]:
    """A daemon that was passed a device, a guest whose memory and driver are the test's, and the device."""
    with ExitStack() as stack:
        device = stack.enter_context(passed(kind, address))
        options = [word for name, fd in device.shared.items() for word in ("--pass-fd", f"{name}={fd}")]
        toml = f'{config}\n[[endpoint]]\nid = "00:02.0"\n{device.key}\n'
        descriptors: Sequence[int] = list(device.shared.values())
        daemon = stack.enter_context(Daemon(directory, *options, config=toml, pass_fds=descriptors))
        _wait_for_socket(daemon)
        client = daemon.connect()  # by now the daemon has asked the kernel what it can do for the device
        memory = memory or GuestMemory()
        bind_as_monitor(device, memory)
        guest = stack.enter_context(Guest(client, memory))
        guest.start()
        yield daemon, guest, Edu(device.device)
