"""What holds for every request (VIRTIO 1.3, 5.13.6): head, tail, lengths, ranges."""

from __future__ import annotations

import pytest
from frontend import iommu
from frontend.guest import POISON, Guest

from conformance.backend import CONFIG, ENDPOINT, PAGE, RAM, U64, Backend, pages
from conformance.conftest import MakeBackend

PROBE_SIZE = 512
REQUESTS = {
    "attach": (iommu.attach(1, ENDPOINT), iommu.TAIL),
    "detach": (iommu.detach(1, ENDPOINT), iommu.TAIL),
    "map": (iommu.map_(1, *pages(8), RAM), iommu.TAIL),
    "unmap": (iommu.unmap(1, *pages(8)), iommu.TAIL),
    "probe": (iommu.probe(ENDPOINT), PROBE_SIZE + iommu.TAIL),
}
"""A good one of each kind: readable part, and size of the writable part."""


@pytest.mark.rule("R-OPS-1", "R-OPS-5")
def test_success(any_ring: Guest) -> None:
    """Status OK, three zero bytes, and a used length of exactly what is writable."""
    for name in ("attach", "map", "unmap", "probe", "detach"):
        reply = any_ring.request(*REQUESTS[name])
        assert reply.used_length == REQUESTS[name][1]
        assert reply.data[-iommu.TAIL :] == bytes([iommu.OK, 0, 0, 0])


@pytest.mark.rule("R-OPS-5")
def test_tail_of_every_status(guest: Guest) -> None:
    """The reserved bytes are zero whatever the status."""
    bodies = {
        iommu.NOENT: iommu.attach(1, 0x9999),
        iommu.INVAL: iommu.attach(1, ENDPOINT, flags=2),
        iommu.OK: iommu.attach(1, ENDPOINT),
        iommu.RANGE: iommu.map_(1, 1, PAGE, RAM),
    }
    for status, body in bodies.items():
        reply = guest.request(body)
        assert (reply.used_length, reply.data) == (4, bytes([status, 0, 0, 0]))


@pytest.mark.rule("R-OPS-2", "R-OPS-3")
@pytest.mark.parametrize("writable", [iommu.TAIL, PROBE_SIZE + iommu.TAIL])
def test_unknown_types(any_ring: Guest, writable: int) -> None:
    """No type but the five is answered: the buffer is given back as it was, with length 0, and the next is served."""
    for kind in range(256):
        if not iommu.ATTACH <= kind <= iommu.PROBE:
            assert any_ring.request(iommu.head(kind) + bytes(68), writable).untouched
    assert any_ring.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-OPS-4")
@pytest.mark.parametrize("reserved", [b"\xff\0\0", b"\0\xff\0", b"\0\0\xff", b"\xff\xff\xff"])
def test_reserved_bytes_of_the_head(guest: Guest, reserved: bytes) -> None:
    """Whatever they are, the request is served."""
    for name in ("attach", "map", "unmap", "probe", "detach"):
        readable, writable = REQUESTS[name]
        assert guest.request(readable[:1] + reserved + readable[4:], writable).status == iommu.OK


@pytest.mark.rule("R-OPS-6")
def test_an_unattached_endpoint_reaches_nothing(guest: Guest, backend: Backend) -> None:
    """Before it is attached and after it is detached, wherever it reads or writes."""
    body = iommu.map_(1, 0, PAGE - 1, RAM)
    for access in (iommu.READ, iommu.WRITE):
        for iova in (0, PAGE, RAM, U64):
            assert backend.translate(ENDPOINT, iova, access) is None
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.request(body).status == iommu.OK
    assert backend.translate(ENDPOINT, 0) == RAM
    assert guest.detach(1, ENDPOINT) == iommu.OK
    assert backend.translate(ENDPOINT, 0) is None


@pytest.mark.rule("R-OPS-7")
@pytest.mark.parametrize("name", REQUESTS)
def test_requests_cut_short(any_ring: Guest, backend: Backend, name: str) -> None:
    """Each length of the readable part below the request's: given back unwritten, and nothing is done."""
    readable, writable = REQUESTS[name]
    if name in ("map", "unmap", "detach"):
        assert any_ring.attach(1, ENDPOINT) == iommu.OK
    if name == "unmap":
        assert any_ring.map(1, *pages(8), RAM) == iommu.OK
    before = backend.mappings(1)
    for size in range(1, len(readable)):
        assert any_ring.request(readable[:size], writable).untouched
    assert backend.mappings(1) == before
    assert any_ring.request(readable, writable).status == iommu.OK


@pytest.mark.rule("R-OPS-7")
@pytest.mark.parametrize("name", REQUESTS)
def test_no_room_for_a_tail(any_ring: Guest, backend: Backend, name: str) -> None:
    """Without four writable bytes nothing can be answered: given back unwritten, nothing is done."""
    readable, _ = REQUESTS[name]
    for writable in range(iommu.TAIL):
        assert any_ring.request(readable, writable).untouched
    assert backend.domains() == []
    assert any_ring.request(b"", iommu.TAIL).untouched


@pytest.mark.rule("R-OPS-7", "R-OPS-1")
@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("more", [1, 7, 4096])
def test_longer_than_needed(guest: Guest, name: str, more: int) -> None:
    """Readable bytes behind a request are not looked at; the tail is the last four writable bytes."""
    if name not in ("attach", "probe"):
        assert guest.attach(1, ENDPOINT) == iommu.OK
    readable, writable = REQUESTS[name]
    reply = guest.request(readable + b"\xff" * more, writable + more)
    assert reply.used_length == writable + more
    assert reply.status == iommu.OK
    assert not any(reply.data[: -iommu.TAIL])


@pytest.mark.rule("R-OPS-8")
def test_input_range(make_backend: MakeBackend) -> None:
    """RANGE one granule before its start and behind its end; all of it can be mapped. Offered is enough."""
    config = CONFIG.replace("[device]", "[device]\ninput-range = { start = 0x10_0000, end = 0x7fff_ffff }")
    for without in (0, iommu.F_INPUT_RANGE):
        backend = make_backend(config)
        with backend.guest(features=backend.features(without=without)) as guest:
            assert guest.attach(1, ENDPOINT) == iommu.OK
            for first, last in (
                (0x10_0000 - PAGE, 0x10_0000 - 1),
                (0x10_0000 - PAGE, 0x10_0FFF),
                (0x7FFF_F000, 0x8000_0FFF),
                (0x8000_0000, 0x8000_0FFF),
                (0, U64),
                (U64 - 0xFFF, U64),
            ):
                assert guest.map(1, first, last, 0) == iommu.RANGE
            assert backend.mappings(1) == []
            assert guest.map(1, 0x10_0000, 0x7FFF_FFFF, RAM - 0x10_0000) == iommu.OK


@pytest.mark.rule("R-OPS-9")
def test_domain_range(make_backend: MakeBackend) -> None:
    """RANGE for a domain before or behind it, in every request that names one. Offered is enough."""
    config = CONFIG.replace("[device]", "[device]\ndomain-range = { start = 5, end = 9 }")
    for without in (0, iommu.F_DOMAIN_RANGE):
        backend = make_backend(config)
        with backend.guest(features=backend.features(without=without)) as guest:
            for domain in (0, 4, 10, 0xFFFF_FFFF):
                assert guest.attach(domain, ENDPOINT) == iommu.RANGE
                assert guest.detach(domain, ENDPOINT) == iommu.RANGE
                assert guest.map(domain, *pages(1), RAM) == iommu.RANGE
                assert guest.unmap(domain, *pages(1)) == iommu.RANGE
            for domain in (5, 9):
                assert guest.attach(domain, ENDPOINT) == iommu.OK
                assert guest.map(domain, *pages(1), RAM) == iommu.OK


@pytest.mark.rule("R-OPS-9")
def test_every_domain_without_a_range(guest: Guest) -> None:
    """The widest range is every number."""
    for domain in (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF):
        assert guest.attach(domain, ENDPOINT) == iommu.OK
        assert guest.map(domain, *pages(1), RAM) == iommu.OK


@pytest.mark.rule("R-OPS-5", "R-PROBE-8a")
def test_room_before_the_tail_is_zeroed(guest: Guest) -> None:
    """What a used length covers was written: no byte of the guest's old buffer and none of ours is in it."""
    assert guest.request(iommu.attach(1, ENDPOINT), 64).data == bytes(64)
    reply = guest.request(iommu.attach(1, 0x9999), 64)
    assert reply.data == bytes(60) + bytes([iommu.NOENT, 0, 0, 0])
    assert bytes([POISON]) not in reply.data
