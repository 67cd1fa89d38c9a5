"""Devices in other processes under a Linux guest, confined by viommud to what the guest's own drivers map."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from devices.process import Device
from integration.daemon import Daemon
from vm import backend, confined
from vm.confined import Confined, Mode
from vm.guest import Guest, Shape, start

from guests.test_devices_straight import intact, values

ADDRESS = "00:02.0"
OTHER = "00:03.0"
MEMORY_MIB = 512
MODES: tuple[Mode, ...] = ("strict", "shared")
TIMEOUTS = "nvme_core.io_timeout=2 nvme_core.admin_timeout=2"


@dataclass
class Rig:
    """Device servers, a daemon in front of them, and a guest."""

    directory: Path
    mode: Mode
    stack: ExitStack
    more: str = ""
    """Further keys of [endpoint.vfio-user], each with a comma in front."""
    devices: dict[str, Device] = field(default_factory=dict)

    def device(self, program: str, *options: str, address: str = ADDRESS) -> Device:
        """Start a device server."""
        server = Device(program, self.directory / f"{address}.server", *options)
        self.devices[address] = self.stack.enter_context(server)
        return server

    def boot(self, command_line: str = "", modules: Sequence[str] = ("virtio-iommu",)) -> tuple[Guest, Daemon]:
        """A guest with the devices that were started, behind a daemon that lets none of them have anything at first."""
        endpoints = [
            Confined(address, device.socket, self.directory / f"{address}.client", self.mode, self.more)
            for address, device in self.devices.items()
        ]
        shape = Shape(
            memory_mib=MEMORY_MIB,
            devices={},
            programs=("block_io", "dma_check", "vfio_map"),
            arguments=[option for each in endpoints for option in confined.client(each.address, each.listen)],
            command_line=command_line,
            endpoints=list(self.devices),
        )
        config = confined.config(shape, endpoints, '[device]\nmsi = "arm64"\nbypass = false\n')
        daemon = self.stack.enter_context(backend.start(self.directory, config=config))
        guest = self.stack.enter_context(start(self.directory, shape, daemon.socket_path))
        if modules:
            guest.load(modules)
        return guest, daemon


@pytest.fixture(params=MODES)
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """In either mode."""
    with ExitStack() as stack:
        yield Rig(tmp_path, request.param, stack)


def summary_of(daemon: Daemon, address: str) -> dict[str, Any]:
    """What the daemon says of an endpoint in the end."""
    return daemon.logged("vfio-user-summary", lambda line: line["endpoint"] == address)


def finish(guest: Guest, daemon: Daemon) -> dict[str, Any]:
    """Power off; what the daemon says of the endpoint at ADDRESS."""
    assert guest.power_off() == 0
    assert daemon.wait() == 0
    return summary_of(daemon, ADDRESS)


@pytest.mark.parametrize("flushing", ["iommu.strict=1", "iommu.strict=0"])
def test_the_stock_driver_does_block_io(rig: Rig, flushing: str) -> None:
    """Checksums match, and the device could reach a small part of memory only; with strict and lazy flushing."""
    nvme = rig.device("nvme")
    guest, daemon = rig.boot(flushing)
    intact(guest, 4)
    summary = finish(guest, daemon)
    told = nvme.stop()
    assert told["writes"] > 200
    assert 0 < summary["peak_reachable_bytes"] < (MEMORY_MIB << 20) // 16
    assert told["reachable_peak_bytes"] == summary["peak_reachable_bytes"]
    assert summary["memory_bytes"] >= MEMORY_MIB << 20
    assert (summary["refused"], summary["server_failures"]) == (0, 0)
    assert (summary["writes"] > 200) == (rig.mode == "strict")
    assert daemon.logged("session-ended")["requests"]["map"].keys() == {"ok"}


def test_the_disk_survives_rebinding_and_resets(rig: Rig) -> None:
    """Driver unbound and bound, controller reset, function level reset, reset of the machine: data stay, I/O works."""
    rig.device("nvme")
    guest, daemon = rig.boot()
    full = f"0000:{ADDRESS}"
    intact(guest)
    guest.check(f"cd /sys/bus/pci/drivers/nvme && echo {full} > unbind && echo {full} > bind")
    intact(guest)
    guest.check("echo 1 > /sys/class/nvme/nvme0/reset_controller")
    intact(guest)
    guest.check(f"echo 1 > /sys/bus/pci/devices/{full}/reset")
    intact(guest)
    guest.check("block_io --area 1 --seed 77 check")
    before = values(guest.check("block_io --area 1 read"), "read")
    guest.reboot()
    guest.load(["virtio-iommu"])
    assert values(guest.check("block_io --area 1 read"), "read") == before
    guest.qemu.qmp.command("system_reset")
    guest.wait_ready()
    guest.load(["virtio-iommu"])
    assert values(guest.check("block_io --area 1 read"), "read") == before
    intact(guest)
    summary = finish(guest, daemon)
    assert summary["server_failures"] == 0


def test_dma_follows_the_mappings(rig: Rig) -> None:
    """Every check of dma_check holds, and each refused access is a fault in the guest's log."""
    engine = rig.device("dma_engine")
    guest, daemon = rig.boot(modules=("virtio-iommu", "vfio-pci", "vfio_iommu_type1"))
    done = guest.run(f"dma_check 0000:{ADDRESS}")
    assert done.status == 0, done.output
    log = "\n".join(guest.iommu_log())
    refused = re.findall("RESULT refused (0x[0-9a-f]+)", done.output)
    assert refused
    for address in refused:
        assert f"at {address} " in log
    finish(guest, daemon)
    assert engine.stop()["refused"] == len(refused)


def test_a_rogue_device_gets_nothing(rig: Rig) -> None:
    """Accesses outside the mappings are refused and faults, while the driver's I/O goes on."""
    rogue = ("--rogue-read", "0x12345000", "--rogue-write", "0x12346000", "--rogue-at", "50")
    nvme = rig.device("nvme", *rogue)
    guest, daemon = rig.boot()
    intact(guest)
    read, write = nvme.wait_event("rogue_read"), nvme.wait_event("rogue_write")
    assert (read["mapped"], read["by_message"]) == (False, "")
    assert read["errno"] != 0
    assert write["errno"] != 0
    log = "\n".join(guest.iommu_log())
    assert "page fault from EP 16 at 0x12345000" in log
    assert "page fault from EP 16 at 0x12346000" in log
    assert finish(guest, daemon)["refused"] == 2


def test_a_device_that_dies_is_an_error_for_the_guest(rig: Rig) -> None:
    """The process ends in the middle of a transfer: I/O errors, and guest, QEMU and daemon live on."""
    nvme = rig.device("nvme", "--die-after", "300")
    guest, daemon = rig.boot(TIMEOUTS)
    done = guest.run("block_io --area 4 check")
    assert done.status == 1
    assert values(done, "check")["errno"] == "5"
    assert nvme.wait() == 70
    assert daemon.logged("vfio-user-server-cut-off")["reason"] == "it closed the connection"
    assert guest.check("echo alive").output == "alive\n"
    assert finish(guest, daemon)["server_failures"] == 1


def test_a_device_that_falls_silent_is_an_error_for_the_guest(rig: Rig) -> None:
    """It reads everything and answers nothing: it is cut off, the guest gets errors, all else lives on."""
    rig.more = ", timeout-ms = 500, reply-timeout-ms = 1000"
    rig.device("nvme", "--mute-after", "300")
    guest, daemon = rig.boot(TIMEOUTS)
    done = guest.run("block_io --area 4 check")
    assert done.status == 1
    assert "in time" in daemon.logged("vfio-user-server-cut-off")["reason"]
    assert guest.check("echo alive").output == "alive\n"
    assert finish(guest, daemon)["server_failures"] == 1


def test_two_devices_in_two_domains(rig: Rig) -> None:
    """Two disks, each with a domain of its own driver's: I/O on both at once, each in its own mappings."""
    rig.device("nvme")
    rig.device("nvme", address=OTHER)
    guest, daemon = rig.boot()
    both = " & ".join(f"block_io --device /dev/nvme{n}n1 --area 2 --ops 100 check > /{n}" for n in (0, 1))
    guest.check(f"{both}; wait")
    for number in (0, 1):
        result = values(guest.check(f"cat /{number}"), "check")
        assert result["written"] == result["read"]
        assert (result["mismatches"], result["errors"]) == ("0", "0")
    summary = finish(guest, daemon)
    other = summary_of(daemon, OTHER)
    assert summary["refused"] == other["refused"] == 0
    assert min(summary["dma_maps"], other["dma_maps"]) > 100
    assert daemon.logged("session-ended")["peak_domains"] == 2


def test_two_devices_in_one_domain(rig: Rig) -> None:
    """Two functions in one VFIO container: each mapping reaches both servers, and is taken back from both."""
    engines = [rig.device("dma_engine"), rig.device("dma_engine", address=OTHER)]
    guest, daemon = rig.boot(modules=("virtio-iommu", "vfio-pci", "vfio_iommu_type1"))
    guest.check("echo Y > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")
    full = f"0000:{ADDRESS} 0000:{OTHER}"
    guest.check(f"bind vfio-pci {full}")
    guest.check(f"vfio_map -n 200 -r 2 {full}")
    summaries = finish(guest, daemon), summary_of(daemon, OTHER)
    for summary in summaries:
        assert summary["dma_maps"] >= 400
        assert summary["server_failures"] == 0
    assert {engine.stop()["maps"] >= 400 for engine in engines} == {True}
