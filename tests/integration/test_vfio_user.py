"""A daemon between a vfio-user client and a real device server, with a guest that maps: everything but QEMU."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from devices.client import Client, RefusedError
from devices.process import Device
from frontend import iommu
from frontend.guest import Guest
from frontend.ring import wait_until

from integration.daemon import Daemon

ENDPOINT = 0x10
RAM = 0x4000_0000
PAGE = 0x1000
SOURCE, DESTINATION, COUNT, COMMAND, RESULT, DONE = 0x80, 0x88, 0x90, 0x98, 0xA0, 0xA8
START, TO_MEMORY = 1, 2
BUFFER = 0x40000

CONFIG = """
[device]
bypass = false
msi = "none"

[[endpoint]]
id = "00:02.0"
vfio-user = {{ listen = "{directory}/client.sock", server = "{directory}/device.sock", mode = "{mode}"{more} }}
"""


@dataclass
class Machine:
    """A guest, its device's client and server, and the daemon between them."""

    daemon: Daemon
    guest: Guest
    client: Client
    device: Device
    client_path: Path

    def transfer(self, source: int, destination: int, count: int, command: int = 0) -> int:
        """One transfer of the DMA engine; its result, an errno."""
        done = self.client.read(DONE, 8)
        for register, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count)):
            self.client.write(register, value, 8, posted=True)
        self.client.write(COMMAND, START | command, posted=True)
        wait_until(lambda: self.client.read(DONE, 8) != done, "the end of a transfer")
        return self.client.read(RESULT, 8)

    def fetch(self, iova: int, count: int) -> int:
        """Memory into the device's buffer."""
        return self.transfer(iova, BUFFER, count)

    def store(self, iova: int, count: int) -> int:
        """The device's buffer into memory."""
        return self.transfer(BUFFER, iova, count, TO_MEMORY)


def boot(stack: ExitStack, directory: Path, mode: str, *options: str, more: str = ", timeout-ms = 60000") -> Machine:
    """Start all of it and do what QEMU does before a guest runs."""
    device = stack.enter_context(Device("dma_engine", directory / "device.sock", *options))
    config = CONFIG.format(directory=directory, mode=mode, more=more)
    daemon = stack.enter_context(Daemon(directory, config=config))
    guest = stack.enter_context(daemon.guest())
    guest.start()
    client = stack.enter_context(Client(directory / "client.sock"))
    client.version()
    ram = guest.memory.rams[0]
    client.dma_map(ram.gpa, ram.size, ram.fd)
    return Machine(daemon, guest, client, device, directory / "client.sock")


@pytest.fixture(params=["strict", "shared"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """One with a device that behaves, in either mode."""
    with ExitStack() as stack:
        running = boot(stack, tmp_path, request.param)
        running.client.bus_master()
        yield running


def test_dma_follows_the_guest(machine: Machine) -> None:
    """Data arrive where the guest mapped them, one way or both; after UNMAP and DETACH nothing does."""
    ram = machine.guest.memory.rams[0].bytes
    page = 0x10_0000
    ram[page : page + 16] = b"through the IOMM"
    machine.guest.attach(1, ENDPOINT)
    assert machine.guest.map(1, 0x1000, 0x1FFF, RAM + page, flags=iommu.READ) == iommu.OK
    assert machine.guest.map(1, 0x2000, 0x2FFF, RAM + page + PAGE) == iommu.OK
    assert machine.fetch(0x1000, 16) == 0
    assert machine.store(0x2800, 16) == 0
    assert bytes(ram[page + PAGE + 0x800 : page + PAGE + 0x810]) == b"through the IOMM"
    assert machine.store(0x1000, 16) != 0
    assert machine.fetch(0x3000, 16) == errno.EFAULT
    assert machine.fetch(RAM, 16) == errno.EFAULT
    assert machine.guest.unmap(1, 0x2000, 0x2FFF) == iommu.OK
    assert machine.store(0x2000, 16) == errno.EFAULT
    assert machine.guest.detach(1, ENDPOINT) == iommu.OK
    assert machine.fetch(0x1000, 16) == errno.EFAULT


def test_refused_access_is_a_fault(machine: Machine) -> None:
    """The guest is told reason, direction, endpoint and address; the log and the summary tell of it too."""
    buffers = machine.guest.post_event_buffers(4)
    assert buffers
    machine.guest.attach(1, ENDPOINT)
    assert machine.fetch(0xDEAD000, 64) == errno.EFAULT
    line = machine.daemon.logged("fault-reported")
    assert (line["endpoint"], line["reason"], line["address"]) == ("00:02.0", "mapping", "0xdead000")
    machine.client.close()
    summary = machine.daemon.logged("vfio-user-summary")
    assert summary["refused"] == 1
    assert summary["peak_reachable_bytes"] == 0
    assert summary["memory_bytes"] == machine.guest.memory.rams[0].size


def test_summary_tells_what_could_be_reached(machine: Machine) -> None:
    """At most what was mapped at one time, of all that the client shared; the device's own account agrees."""
    machine.guest.attach(1, ENDPOINT)
    for first in range(0, 10 * PAGE, PAGE):
        assert machine.guest.map(1, first, first + PAGE - 1, RAM + first) == iommu.OK
    assert machine.guest.unmap(1, 0, 5 * PAGE - 1) == iommu.OK
    assert machine.guest.map(1, 0, 2 * PAGE - 1, RAM) == iommu.OK
    assert machine.fetch(0, 16) == 0
    machine.client.close()
    summary = machine.daemon.logged("vfio-user-summary")
    assert summary["peak_reachable_bytes"] == 10 * PAGE
    assert (summary["dma_maps"], summary["dma_unmaps"]) == (11, 5)
    assert machine.device.stop()["reachable_peak_bytes"] == 10 * PAGE


def test_a_client_comes_back(machine: Machine) -> None:
    """The next client of the endpoint finds the guest's mappings in force, and no memory but its own."""
    machine.guest.attach(1, ENDPOINT)
    assert machine.guest.map(1, 0x1000, 0x1FFF, RAM + 0x10_0000) == iommu.OK
    machine.client.close()
    machine.daemon.logged("vfio-user-summary")
    ram = machine.guest.memory.rams[0]
    with Client(machine.client_path) as client:
        client.version()
        machine.client = client
        client.bus_master()
        assert machine.fetch(0x1000, 16) == errno.EFAULT
        client.dma_map(ram.gpa, ram.size, ram.fd)
        assert machine.fetch(0x1000, 16) == 0


def test_a_second_client_is_turned_away(machine: Machine) -> None:
    """A device has one client; the one that is served does not notice."""
    with Client(machine.client_path) as other, pytest.raises((ConnectionError, RefusedError)):
        other.version()
    assert machine.client.read(0) == 0x010000ED


def test_the_server_dies(machine: Machine) -> None:
    """The client's requests get errors, the guest's are answered, and the daemon lives on."""
    machine.guest.attach(1, ENDPOINT)
    assert machine.guest.map(1, 0x1000, 0x1FFF, RAM + 0x10_0000) == iommu.OK
    os.kill(machine.device.pid, signal.SIGKILL)
    assert machine.daemon.logged("vfio-user-server-cut-off")["reason"] == "it closed the connection"
    with pytest.raises(RefusedError) as refused:
        machine.client.read(0)
    assert refused.value.errno == errno.EIO
    assert machine.guest.unmap(1, 0x1000, 0x1FFF) == iommu.OK
    assert machine.guest.map(1, 0x1000, 0x1FFF, RAM) == iommu.OK
    assert machine.guest.detach(1, ENDPOINT) == iommu.OK


@pytest.mark.parametrize("mode", ["strict", "shared"])
def test_a_server_that_keeps_a_mapping(tmp_path: Path, mode: str) -> None:
    """One that never answers DMA_UNMAP is cut off after the time that was configured; the guest gets DEVERR once."""
    with ExitStack() as stack:
        machine = boot(stack, tmp_path, mode, "--no-unmap-reply", more=", timeout-ms = 100")
        machine.guest.attach(1, ENDPOINT)
        assert machine.guest.map(1, 0x1000, 0x1FFF, RAM) == iommu.OK
        assert machine.guest.unmap(1, 0x1000, 0x1FFF) == iommu.DEVERR
        assert "give up a mapping" in machine.daemon.logged("vfio-user-server-cut-off")["reason"]
        assert machine.guest.map(1, 0x1000, 0x1FFF, RAM) == iommu.OK
        assert machine.guest.unmap(1, 0x1000, 0x1FFF) == iommu.OK


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """The client is told within its own patience, the log says why, and the next attempt is served."""
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(tmp_path, config=CONFIG.format(directory=tmp_path, mode="strict", more="")))
        stack.enter_context(daemon.guest()).start()
        with Client(tmp_path / "client.sock") as client, pytest.raises(RefusedError):
            client.version()
        assert "does not listen" in daemon.logged("vfio-user-not-connected")["reason"]
        stack.enter_context(Device("dma_engine", tmp_path / "device.sock"))
        with Client(tmp_path / "client.sock") as client:
            client.version()
            assert client.read(0) == 0x010000ED


def test_the_daemon_ends_while_relaying(machine: Machine) -> None:
    """A signal ends it as ever: status 0, sockets removed, the peers see the end of their connections."""
    assert machine.daemon.terminate() == 0
    assert not machine.client_path.exists()
    with pytest.raises((ConnectionError, BrokenPipeError)):
        machine.client.read(0)


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ('id = "00:02.0-00:03.0"\nvfio-user = { listen = "a", server = "b" }', "single endpoint"),
        ('id = "00:02.0"\nvfio-user = { listen = "a", server = "a" }', "another socket"),
        ('id = "00:02.0"\nvfio-user = { listen = "", server = "a" }', "1 to 107 bytes"),
        ('id = "00:02.0"\nvfio-user = { listen = "a" }', "server is missing"),
        ('id = "00:02.0"\nvfio-user = { listen = "a", server = "b", mode = "fast" }', 'one of "shared", "strict"'),
        ('id = "00:02.0"\nvfio-user = { listen = "a", server = "b", timeout-ms = 0 }', "from 1 to 600000"),
        ('id = "00:02.0"\nvfio-user = { listen = "/nonexistent/a", server = "b" }', "No such file"),
        (
            'id = "00:02.0"\nvfio-user = { listen = "a", server = "b" }\n'
            '[[endpoint]]\nid = "00:03.0"\nvfio-user = { listen = "a", server = "c" }',
            "apart from the sockets of endpoint[0]",
        ),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, endpoint: str, said: str) -> None:
    """Each gives one line that says what and what is allowed, and status 2."""
    with Daemon(tmp_path, config="[[endpoint]]\n" + endpoint) as daemon:
        assert daemon.wait() == 2
        assert said in daemon.log_text
        assert len(daemon.log_text.splitlines()) == 1
