"""UNMAP (VIRTIO 1.3, 5.13.6.6)."""

from __future__ import annotations

import pytest
from frontend import iommu
from frontend.guest import Guest

from conformance.backend import ENDPOINT, PAGE, RAM, SIBLING, U64, Backend, pages
from conformance.conftest import MakeBackend

BYTES = '[device]\ngranule = 1\nmsi = "none"\n'
"""Granularity of one byte, as the examples of the specification have it."""


def mapped(backend: Backend) -> list[tuple[int, int]]:
    """First and last address of domain 1's mappings."""
    return [(m.first, m.last) for m in backend.mappings(1) or []]


@pytest.fixture
def attached(guest: Guest) -> Guest:
    """ENDPOINT is in domain 1."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    return guest


@pytest.mark.rule("R-UNMAP-1")
def test_reserved_bytes(attached: Guest, backend: Backend) -> None:
    """They are ignored: of the two answers that the specification allows, this device gives OK and unmaps."""
    for reserved in (b"\1\0\0\0", b"\0\0\0\x80", b"\xff" * 4):
        assert attached.map(1, *pages(1), RAM) == iommu.OK
        assert attached.request(iommu.unmap(1, *pages(1), reserved=reserved)).status == iommu.OK
        assert mapped(backend) == []


@pytest.mark.rule("R-UNMAP-2")
def test_no_such_domain(attached: Guest) -> None:
    """NOENT for one that never was and for one that has ended."""
    assert attached.unmap(2, *pages(1)) == iommu.NOENT
    assert attached.detach(1, ENDPOINT) == iommu.OK
    assert attached.unmap(1, 0, U64) == iommu.NOENT


@pytest.mark.rule("R-UNMAP-3")
def test_a_bypass_domain(guest: Guest, backend: Backend) -> None:
    """INVAL, and identity stays as it is."""
    assert guest.attach(1, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.OK
    assert guest.unmap(1, 0, U64) == iommu.INVAL
    assert backend.translate(ENDPOINT, PAGE) == PAGE


@pytest.mark.rule("R-UNMAP-4")
@pytest.mark.parametrize(("first", "last"), [(0, 4), (5, 9), (2, 7), (0, 8), (1, 9), (0, 0), (9, 9), (9, 20), (4, 4)])
def test_splitting(make_backend: MakeBackend, first: int, last: int) -> None:
    """RANGE for every part of a mapping, and the mapping stays."""
    backend = make_backend(BYTES)
    with backend.guest() as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, 0, 9, RAM) == iommu.OK
        assert guest.unmap(1, first, last) == iommu.RANGE
        assert mapped(backend) == [(0, 9)]
        assert backend.translate(ENDPOINT, 9) == RAM + 9


@pytest.mark.rule("R-UNMAP-5")
@pytest.mark.parametrize(("first", "last"), [(0, 7), (0, 12), (5, 12), (2, 14), (2, 40), (0, 22)])
def test_splitting_removes_nothing_else(make_backend: MakeBackend, first: int, last: int) -> None:
    """Whole mappings before and behind the one that would be split stay as well."""
    backend = make_backend(BYTES)
    with backend.guest() as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        there = [(0, 4), (5, 9), (10, 14), (20, 24), (30, 34)]
        for each in there:
            assert guest.map(1, *each, RAM) == iommu.OK
        assert guest.unmap(1, first, last) == iommu.RANGE
        assert mapped(backend) == there


@pytest.mark.rule("R-UNMAP-6", "R-UNMAP-4")
@pytest.mark.parametrize(
    ("there", "unmap", "status", "left"),
    [
        ([], (0, 4), iommu.OK, []),
        ([(0, 9)], (0, 9), iommu.OK, []),
        ([(0, 4), (5, 9)], (0, 9), iommu.OK, []),
        ([(0, 9)], (0, 4), iommu.RANGE, [(0, 9)]),
        ([(0, 4), (5, 9)], (0, 4), iommu.OK, [(5, 9)]),
        ([(0, 4)], (0, 9), iommu.OK, []),
        ([(0, 4), (10, 14)], (0, 14), iommu.OK, []),
    ],
    ids=[f"example {number}" for number in range(1, 8)],
)
def test_examples(
    make_backend: MakeBackend,
    there: list[tuple[int, int]],
    unmap: tuple[int, int],
    status: int,
    left: list[tuple[int, int]],
) -> None:
    """The seven examples of the specification, in its order."""
    backend = make_backend(BYTES)
    with backend.guest() as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        for each in there:
            assert guest.map(1, *each, RAM) == iommu.OK
        assert guest.unmap(1, *unmap) == status
        assert mapped(backend) == left


@pytest.mark.rule("R-UNMAP-6")
def test_alignment_does_not_matter(attached: Guest, backend: Backend) -> None:
    """Ends within holes, at odd addresses, are OK as long as no mapping is split."""
    assert attached.map(1, *pages(2), RAM) == iommu.OK
    assert attached.unmap(1, 0x123, 0x456) == iommu.OK
    assert attached.unmap(1, 0x2000 + 1, 0x2FFF) == iommu.RANGE
    assert mapped(backend) == [pages(2)]
    assert attached.unmap(1, 0x1FFF, 0x3001) == iommu.OK
    assert mapped(backend) == []


@pytest.mark.rule("R-UNMAP-6")
def test_all_there_is(attached: Guest, backend: Backend) -> None:
    """One request over the whole space removes every mapping of this domain and of no other."""
    assert attached.attach(2, SIBLING) == iommu.OK
    assert attached.map(2, *pages(1), RAM) == iommu.OK
    for page in range(0, 2000, 2):
        assert attached.map(1, *pages(page), RAM) == iommu.OK
    assert attached.unmap(1, 0, U64) == iommu.OK
    assert mapped(backend) == []
    assert backend.translate(SIBLING, PAGE) == RAM
    assert backend.translate(ENDPOINT, PAGE) is None


@pytest.mark.rule("R-UNMAP-6")
def test_an_end_before_the_start(attached: Guest, backend: Backend) -> None:
    """INVAL, and nothing is removed."""
    assert attached.map(1, *pages(1), RAM) == iommu.OK
    for first, last in ((2 * PAGE, PAGE - 1), (1, 0), (U64, 0), (PAGE, PAGE - 1)):
        assert attached.unmap(1, first, last) == iommu.INVAL
    assert mapped(backend) == [pages(1)]
