"""A guest and its IOMMU over the real socket: requests, pauses, resets, memory, and what the log says of it."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.client import Client
from frontend.guest import Guest
from frontend.memory import GuestMemory, Ram
from frontend.ring import Buffer, wait_until

from integration.daemon import Daemon

ENDPOINT = 0x10
RAM = 0x4000_0000
PAGE = 0x1000

CONFIG = """
[device]
msi = "arm64"
bypass = false

[limits]
domains = 4
mappings = 40
mappings-per-domain = 32

[[endpoint]]
id = "00:02.0"
reserved = [{ start = 0x1000_0000, end = 0x1000_ffff }]

[[endpoint]]
id = "01:00.0-01:00.7"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a configuration of two endpoint entries and small limits."""
    with Daemon(tmp_path, config=CONFIG) as running:
        yield running


@pytest.fixture
def guest(daemon: Daemon) -> Iterator[Guest]:
    """A guest whose driver has started."""
    with daemon.guest() as started:
        started.start()
        yield started


def test_configuration_space_shows_the_settings(guest: Guest) -> None:
    """Page sizes, ranges, the size of properties, and bypass as configured."""
    assert guest.config() == iommu.Config((1 << 64) - PAGE, 0, (1 << 64) - 1, 0, (1 << 32) - 1, 512, 0)


def test_every_request(guest: Guest) -> None:
    """Attach, map, unmap, detach and probe, each answered in full."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL
    assert guest.unmap(1, 0, PAGE - 1) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
    assert guest.detach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, PAGE, 2 * PAGE - 1, RAM) == iommu.NOENT
    reply = guest.probe(ENDPOINT)
    assert reply.status == iommu.OK
    assert iommu.reserved_regions(reply.data) == [
        iommu.ReservedRegion(1, 0x800_0000, 0x80F_FFFF),
        iommu.ReservedRegion(0, 0x1000_0000, 0x1000_FFFF),
    ]


def test_only_configured_endpoints_exist(guest: Guest) -> None:
    """A range names all of its functions and nothing beside them."""
    for endpoint in (0x100, 0x107):
        assert guest.attach(1, endpoint) == iommu.OK
    for endpoint in (0, 0x0F, 0x11, 0x108):
        assert guest.attach(1, endpoint) == iommu.NOENT


def test_the_driver_changes_bypass(guest: Guest) -> None:
    """Writing the whole configuration space, as QEMU does, changes bypass and nothing else."""
    before = guest.config()
    guest.client.do(wire.SET_CONFIG, wire.config(0, b"\xff" * iommu.BYPASS_OFFSET + b"\x01\xff\xff\xff"))
    assert guest.config().bypass == 1
    guest.client.do(wire.SET_CONFIG, wire.config(0, bytes(iommu.CONFIG_SIZE)))
    assert guest.config() == before


def test_bypass_survives_a_device_reset_and_not_the_vm(tmp_path: Path) -> None:
    """VIRTIO 1.3, 5.13.4: sticky over a device reset, initial after a system reset; here, for the next VM."""
    with Daemon(tmp_path, "--keep-listening", config=CONFIG) as daemon:
        with daemon.guest() as guest:
            guest.start()
            guest.client.do(wire.SET_CONFIG, wire.config(0, bytes(iommu.BYPASS_OFFSET) + b"\x01\0\0\0"))
            guest.reset_and_start()
            assert guest.config().bypass == 1
        with daemon.guest() as guest:
            assert guest.config().bypass == 0
        assert daemon.terminate() == 0


def test_pause_keeps_everything(guest: Guest) -> None:
    """QMP stop and cont: domains and mappings are as before."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
    guest.pause_and_continue()
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.INVAL, "the mapping must still be there"
    assert guest.unmap(1, 0, PAGE - 1) == iommu.OK


def test_reset_forgets_everything(guest: Guest) -> None:
    """After a device reset no endpoint is attached and no domain exists."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, 0, PAGE - 1, RAM) == iommu.OK
    guest.reset_and_start()
    assert guest.map(1, PAGE, 2 * PAGE - 1, RAM) == iommu.NOENT


def test_requests_in_memory_that_was_added_later(guest: Guest) -> None:
    """Hot-added RAM is guest memory at once, and removed RAM is not any more."""
    added = Ram(gpa=0x1_0000_0000, size=1 << 20)
    guest.memory.rams.append(added)
    guest.add_memory(added)
    ring = guest.rings[iommu.REQUEST_QUEUE]
    body = iommu.attach(1, ENDPOINT)
    guest.memory.write(added.gpa, body + b"\xa5" * iommu.TAIL)
    chain = [Buffer(added.gpa, len(body)), Buffer(added.gpa + len(body), iommu.TAIL, writable=True)]
    ring.submit(chain)
    (used,) = ring.wait()
    assert used.length == iommu.TAIL
    assert guest.memory.read(added.gpa + len(body), iommu.TAIL) == bytes(iommu.TAIL)
    guest.remove_memory(added)
    ring.submit(chain)
    assert ring.broken()


def test_a_broken_ring_is_logged_once_and_survives_a_reset(daemon: Daemon, guest: Guest) -> None:
    """The ring stops, the error eventfd and the status say so, and a device reset mends it."""
    ring = guest.rings[iommu.REQUEST_QUEUE]
    ring.submit([Buffer(0xDEAD_0000, 20), Buffer(0xDEAE_0000, 4, writable=True)])
    assert ring.broken()
    daemon.logged("ring-broken")
    for _ in range(10):
        ring.kick()
    guest.reset_and_start()
    assert guest.attach(1, ENDPOINT) == iommu.OK
    (line,) = daemon.log("ring-broken")
    assert (line["ring"], line["reason"]) == ("request", "a buffer lies outside guest memory")


def test_refused_requests_are_logged_rate_limited(daemon: Daemon, guest: Guest) -> None:
    """A guest that makes thousands of mistakes fills a handful of lines; the rest is counted."""
    count = 3000
    for _ in range(count):
        assert guest.map(7, 0, PAGE - 1, RAM) == iommu.NOENT
    first = daemon.logged("request-refused")
    assert (first["request"], first["status"], first["domain"], first["range"]) == ("map", "noent", 7, "0x0-0xfff")
    guest.close()
    assert daemon.wait() == 0
    assert len(daemon.log()) < 40
    (ended,) = daemon.log("session-ended")
    assert ended["requests"] == {"map": {"noent": count}}
    told = len(daemon.log("request-refused"))
    left_out = sum(line.get("left_out", 0) for line in daemon.log())
    lost = ended["records_lost"]
    assert told + left_out + lost == count


@pytest.mark.parametrize(
    ("limit", "requests"),
    [
        ("limits.domains", [("attach", domain) for domain in range(5)]),
        ("limits.mappings-per-domain", [("attach", 0), *(("map", 0) for _ in range(33))]),
        ("limits.mappings", [("attach", 0), ("attach", 1), *(("map", n % 2) for n in range(41))]),
    ],
    ids=["domains", "mappings-per-domain", "mappings"],
)
def test_limits(daemon: Daemon, guest: Guest, limit: str, requests: list[tuple[str, int]]) -> None:
    """Beyond a limit a request is refused with NOMEM, and the log names the limit."""
    statuses = []
    for number, (request, domain) in enumerate(requests):
        if request == "attach":
            statuses.append(guest.attach(domain, 0x100 + domain))
        else:
            statuses.append(guest.map(domain, number * PAGE, (number + 1) * PAGE - 1, RAM))
    assert statuses == [iommu.OK] * (len(requests) - 1) + [iommu.NOMEM]
    line = daemon.logged("request-refused")
    assert (line["status"], line["limit"]) == ("nomem", limit)


def test_limit_of_endpoints(tmp_path: Path) -> None:
    """Where none is configured, a guest cannot make up more of them than the limit."""
    with Daemon(tmp_path, config="limits.endpoints = 3") as daemon, daemon.guest() as guest:
        guest.start()
        assert [guest.attach(1, endpoint) for endpoint in range(4)] == [iommu.OK] * 3 + [iommu.NOMEM]
        assert daemon.logged("request-refused")["limit"] == "limits.endpoints"


def test_memory_that_is_not_shared(daemon: Daemon) -> None:
    """QEMU without share=on sends no memory at all: the ring is refused, and the log says what is missing."""
    with GuestMemory() as memory, daemon.connect() as client:
        client.negotiate()
        base = memory.rams[0].gpa
        client.do(wire.SET_VRING_NUM, wire.vring_state(0, 64))
        client.do(wire.SET_VRING_BASE, wire.vring_state(0, 0))
        client.do(wire.SET_VRING_ADDR, wire.vring_addr(0, base, base + 0x2000, base + 0x1000))
        refused = _kick_and_enable(client)
        assert refused
    line = daemon.logged("frontend-request-refused")
    assert "share=on" in line["hint"]
    assert daemon.wait() == 0


def _kick_and_enable(client: Client) -> bool:
    kick = os.eventfd(0)
    try:
        first = client.acknowledged(wire.SET_VRING_KICK, wire.u64(0), [kick])
        second = client.acknowledged(wire.SET_VRING_ENABLE, wire.vring_state(0, 1))
    finally:
        os.close(kick)
    return bool(first or second)


def test_summary_of_a_session(daemon: Daemon, guest: Guest) -> None:
    """The last line tells what was negotiated, asked, refused and kept at most."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.attach(2, 0x100) == iommu.OK
    for page in range(3):
        assert guest.map(1, page * PAGE, (page + 1) * PAGE - 1, RAM) == iommu.OK
    assert guest.unmap(1, 0, 3 * PAGE - 1) == iommu.OK
    assert guest.probe(ENDPOINT).status == iommu.OK
    assert guest.unmap(9, 0, PAGE - 1) == iommu.NOENT
    guest.close()
    assert daemon.wait() == 0
    (line,) = daemon.log("session-ended")
    assert line["requests"] == {
        "attach": {"ok": 2},
        "map": {"ok": 3},
        "unmap": {"ok": 1, "noent": 1},
        "probe": {"ok": 1},
    }
    assert line["endpoints"] == ["00:02.0", "01:00.0"]
    assert (line["peak_domains"], line["peak_mappings"]) == (2, 3)
    assert {"MAP_UNMAP", "PROBE", "VERSION_1"} <= set(line["features"])
    assert (line["rings_broken"], line["protocol_errors"], line["limit_hits"]) == (0, 0, 0)


def test_an_idle_guest_costs_no_cpu(daemon: Daemon, guest: Guest) -> None:
    """When the spinning has ended, the worker sleeps: it makes no more rounds and no context switches."""
    assert guest.attach(1, ENDPOINT) == iommu.OK

    def switches() -> int:
        task = Path(f"/proc/{daemon.process.pid}/task")
        return sum(
            int(line.split()[1])
            for thread in task.iterdir()
            for line in (thread / "status").read_text().splitlines()
            if "ctxt_switches" in line
        )

    def ticks() -> int:
        fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    seen = [(-1, -1)]

    def settled() -> bool:
        select.select([], [], [], 0.2)
        seen.append((switches(), ticks()))
        return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

    wait_until(settled, "three looks in a row without a context switch or a tick")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_ring_formats(tmp_path: Path, packed: bool) -> None:
    """Packed rings, in-order use and the rest are offered when the configuration says so."""
    config = f"[device]\npacked-ring = {str(packed).lower()}\nin-order = true\nevent-idx = false\nindirect = false\n"
    with Daemon(tmp_path, config=config) as daemon, daemon.guest() as guest:
        assert bool(guest.features & wire.F_RING_PACKED) == packed
        assert guest.features & wire.F_IN_ORDER
        assert not guest.features & (wire.F_EVENT_IDX | wire.F_INDIRECT_DESC)
        guest.start()
        for page in range(600):
            assert guest.attach(1, 0x20) == iommu.OK
            assert guest.map(1, page * PAGE, (page + 1) * PAGE - 1, RAM) == iommu.OK


def test_an_early_personality(tmp_path: Path) -> None:
    """Drivers of 2017: a short configuration space with a number of domain bits, short requests, no newer feature."""
    config = '[device]\npersonality = "0.5"\nbypass = false\n[device.domain-range]\nend = 0xffff\n'
    with Daemon(tmp_path, config=config) as daemon, daemon.guest() as guest:
        assert not guest.features & (iommu.F_MMIO | iommu.F_BYPASS_CONFIG | iommu.F_BYPASS)
        guest.start()
        raw = guest.client.get_config(32)
        assert struct.unpack("<QQQB3xI", raw) == ((1 << 64) - PAGE, 0, (1 << 64) - 1, 16, 512)
        attach = iommu.head(iommu.ATTACH) + struct.pack("<III", 1, ENDPOINT, 0)
        assert guest.request(attach).status == iommu.OK
        map_ = iommu.head(iommu.MAP) + struct.pack("<IQQQI", 1, 0x10_0000, RAM, 2 * PAGE, 3)  # virt, phys, size
        assert guest.request(map_).status == iommu.OK
        unmap = iommu.head(iommu.UNMAP) + struct.pack("<IQQ4x", 1, 0x10_0000, 2 * PAGE)
        assert guest.request(unmap).status == iommu.OK
        detach = iommu.head(iommu.DETACH) + struct.pack("<II", ENDPOINT, 0)
        assert guest.request(detach).status == iommu.OK


def test_features_that_break_behind_qemu_are_never_offered(tmp_path: Path) -> None:
    """LOG_ALL would be seen by the guest; QEMU loses NOTIFICATION_DATA, RING_RESET and ACCESS_PLATFORM."""
    config = "[device]\npacked-ring = true\nin-order = true\n"
    with Daemon(tmp_path, config=config) as daemon, daemon.connect() as client:
        offered = client.ask(wire.GET_FEATURES).u64
        assert [bit for bit in (3, 26, 33, 38, 40) if offered >> bit & 1] == []
