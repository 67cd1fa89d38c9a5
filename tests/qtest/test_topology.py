"""The topology in configuration space, read through a real QEMU as each driver of its time read it; and `topology
check` against a running QEMU."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from devices.process import Device
from unit.topology import tables
from vm import assets, backend, platform, qtest
from vm.pci import PciFunction
from vm.qemu import Qemu, wait_for_socket
from vm.qtest import Machine
from vm.virtio import ACKNOWLEDGE, DRIVER, VirtioPci

TOPOLOGY = 1 << 6
"""The feature bit of all three proposals."""
LISTED = [
    {"endpoint": 0x10, "segment": 0, "first": 0x10, "last": 0x10},
    {"endpoint": 0x18, "segment": 0, "first": 0x18, "last": 0x1F},
]
CONFIG = """
[device]
bypass = false
bypass-config = false
[topology]
machine = "{board}"
iommu = "00:01.0"
builtin = "{shape}"
[[endpoint]]
id = "00:02.0"
[[endpoint]]
id = "00:03.0-00:03.7"
"""

# The capability through which configuration space can be read without a BAR: PCI_CFG, VIRTIO 1.3, 4.1.4.9.
_VENDOR_CAPABILITY, _PCI_CFG, _DEVICE_CFG = 9, 5, 4


@contextmanager
def machine_with(tmp_path: Path, board: qtest.Board, shape: str) -> Iterator[Machine]:
    """QEMU with the generic device as `qemu-args` has it for this configuration."""
    path = tmp_path / "shape.toml"
    path.write_text(CONFIG.format(board=board, shape=shape))
    with backend.start(tmp_path, config=path.read_text()) as daemon:
        done = platform.viommud(
            *("qemu-args", "--config", str(path), "--socket-path", str(daemon.socket_path), "--accel", "tcg"),
        )
        assert done.returncode == 0, done.stderr
        words = done.stdout.replace("\\\n", " ").split()
        devices = [(option, words[at + 1]) for at, option in enumerate(words) if option in ("-chardev", "-device")]
        with qtest.start(tmp_path, board, [word for pair in devices for word in pair]) as machine:
            yield machine


def capability(function: PciFunction, kind: int) -> int:
    """Where in PCI configuration space a capability of virtio is."""
    return next(
        at
        for identifier, at in function.capabilities()
        if identifier == _VENDOR_CAPABILITY and function.read(at + 3, 1) == kind
    )


def through_pci_cfg(function: PciFunction, size: int) -> bytes:
    """The device's configuration space in pieces of 16 bits, as the driver of November 2019 reads it."""
    window, device = capability(function, _PCI_CFG), capability(function, _DEVICE_CFG)
    start = function.read(device + 8, 4)
    function.write(window + 4, 1, function.read(device + 4, 1))
    content = b""
    for offset in range(0, size, 2):
        function.write(window + 8, 4, start + offset)
        function.write(window + 12, 4, 2)
        content += struct.pack("<H", function.read(window + 16, 2))
    return content


def through_bar(device: VirtioPci, size: int) -> bytes:
    """The same through the BAR, byte by byte."""
    return bytes(device.config(offset, 1) for offset in range(size))


def length(function: PciFunction) -> int:
    """How large QEMU makes the device's configuration space."""
    return function.read(capability(function, _DEVICE_CFG) + 12, 4)


READERS: dict[str, Callable[[bytes], Iterator[dict[str, Any]]]] = {
    "2019-11": tables.list_2019,
    "2020-02": tables.array_2020,
    "2020-08": tables.records_2020,
}


@pytest.mark.parametrize("board", ["virt", "q35"])
@pytest.mark.parametrize("shape", READERS)
def test_a_driver_of_the_time_reads_it(tmp_path: Path, board: qtest.Board, shape: str) -> None:
    """Through the window in PCI space and through the BAR; before, between and after resets; never BYPASS_CONFIG."""
    with machine_with(tmp_path, board, shape) as machine:
        function = machine.bus.function("01.0")
        device = VirtioPci(function)
        size = 36 + {"2019-11": 4 + 2 * 16, "2020-02": 12 + 2 * 16, "2020-08": 4 + 2 * 16}[shape]
        assert length(function) >= size
        # QEMU 11.1 aborts when a guest of virt uses the window (hw/virtio/virtio-pci.c, virtio_address_space_lookup:
        # the machine shows PCI's memory through an alias, in which the registers are not found).
        first = through_pci_cfg(function, size) if board == "q35" else through_bar(device, size)
        assert list(READERS[shape](first)) == LISTED
        # August 2020: reset, ACKNOWLEDGE and DRIVER, read, reset again, all before the driver proper comes.
        for _ in range(3):
            device.reset()
            device.status = ACKNOWLEDGE
            device.status = ACKNOWLEDGE | DRIVER
            assert device.offered() & TOPOLOGY
            assert through_bar(device, size) == first
        device.reset()
        assert device.negotiate(device.offered())
        # What is BYPASS_CONFIG's byte in other devices cannot be written in this one.
        device.set_config(36, 1, first[36] ^ 1)
        assert through_bar(device, size) == first


def check(tmp_path: Path, config: str) -> tuple[int, list[str]]:
    """Exit status and lines of `topology check` against the running QEMU."""
    path = tmp_path / "checked.toml"
    path.write_text(config)
    done = platform.viommud("topology", "check", "--config", str(path), "--qmp", str(tmp_path / "check.sock"))
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(("board", "architecture"), [("virt", "arm64"), ("q35", "amd64")])
def test_a_running_machine_is_checked(tmp_path: Path, board: str, architecture: assets.Architecture) -> None:
    """A machine as configured is good; each thing that is not so is one line, and the worst decides the status."""
    config = f'[topology]\nmachine = "{board}"\niommu = "00:01.0"\n[[endpoint]]\nid = "00:02.0"\n'
    path = tmp_path / "vm.toml"
    path.write_text(config)
    with (
        Device("nvme", tmp_path / "nvme.sock") as nvme,
        backend.start(tmp_path, config=config) as daemon,
    ):
        done = platform.viommud(
            *("qemu-args", "--config", str(path), "--socket-path", str(daemon.socket_path), "--accel", "tcg"),
            *("--memory", "64M", "--format", "json", "--device", f"00:02.0=vfio-user:{nvme.socket}"),
        )
        assert done.returncode == 0, done.stderr
        words: list[str] = json.loads(done.stdout)
        wait_for_socket(daemon.socket_path)
        control = ("-qmp", f"unix:{tmp_path / 'check.sock'},server=on,wait=off", "-S")
        with Qemu(assets.emulator(architecture), [*words[1:], *control, "-device", "edu,addr=05.0"], tmp_path):
            assert check(tmp_path, config) == (0, ["good: no difference found"])
            status, lines = check(tmp_path, config.replace("00:02.0", "00:05.0"))
            assert status == 4
            assert len(lines) == 2
            assert "error: 0000:00:05.0 is an endpoint and is edu" in lines[0]
            assert "warning: 0000:00:02.0 is vfio-user-pci" in lines[1]
            status, lines = check(tmp_path, config.replace("00:01.0", "00:04.0"))
            assert (status, lines) == (4, ["error: the IOMMU's place 0000:00:04.0 is empty"])
