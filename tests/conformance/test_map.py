"""MAP (VIRTIO 1.3, 5.13.6.5)."""

from __future__ import annotations

import pytest
from frontend import iommu
from frontend.guest import Guest

from conformance.backend import (
    CONFIG,
    ENDPOINT,
    GUARDED,
    HOLE_FIRST,
    HOLE_LAST,
    MSI_FIRST,
    MSI_LAST,
    PAGE,
    RAM,
    SIBLING,
    U64,
    Backend,
    pages,
)
from conformance.conftest import MakeBackend

HALF = PAGE // 2


@pytest.fixture
def attached(guest: Guest) -> Guest:
    """ENDPOINT is in domain 1."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    return guest


@pytest.mark.rule("R-MAP-1")
@pytest.mark.parametrize("offset", [1, 2, HALF, PAGE - 1])
def test_misaligned_start(attached: Guest, backend: Backend, offset: int) -> None:
    """RANGE, whatever the end."""
    assert attached.map(1, PAGE + offset, 2 * PAGE - 1, RAM) == iommu.RANGE
    assert attached.map(1, PAGE + offset, 2 * PAGE + offset - 1, RAM) == iommu.RANGE
    assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-2")
@pytest.mark.parametrize("offset", [1, 2, HALF, PAGE - 1])
def test_misaligned_target(attached: Guest, backend: Backend, offset: int) -> None:
    """RANGE."""
    assert attached.map(1, *pages(1), RAM + offset) == iommu.RANGE
    assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-3")
@pytest.mark.parametrize("last", [PAGE, PAGE + HALF - 1, 2 * PAGE - 2, 2 * PAGE])
def test_misaligned_end(attached: Guest, backend: Backend, last: int) -> None:
    """The last address but one, or the one behind it, is no end: RANGE."""
    assert attached.map(1, PAGE, last, RAM) == iommu.RANGE
    assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-3")
def test_the_end_of_the_address_space(attached: Guest, backend: Backend) -> None:
    """2^64 - 1 is aligned: the last page, and the whole space, can be mapped."""
    assert attached.map(1, U64 - PAGE + 1, U64, RAM) == iommu.OK
    assert backend.translate(ENDPOINT, U64) == RAM + PAGE - 1
    assert attached.unmap(1, 0, U64) == iommu.OK
    assert attached.map(1, 0, U64, 0) == iommu.OK
    assert backend.translate(ENDPOINT, U64) == U64
    assert attached.map(1, *pages(5), RAM) == iommu.INVAL


@pytest.mark.rule("R-MAP-4")
@pytest.mark.parametrize(
    ("first", "count"),
    [(10, 4), (8, 4), (8, 3), (13, 4), (11, 2), (10, 1), (13, 1), (8, 8), (0, 1 << 20), (10, 5), (9, 5)],
)
def test_overlaps(attached: Guest, backend: Backend, first: int, count: int) -> None:
    """Identical, left, right, inside, enclosing, by one page: INVAL, and the mapping that is there stays."""
    assert attached.map(1, *pages(10, 4), RAM) == iommu.OK
    before = backend.mappings(1)
    assert attached.map(1, *pages(first, count), 0x10_0000_0000) == iommu.INVAL
    assert backend.mappings(1) == before


@pytest.mark.rule("R-MAP-4")
def test_neighbours_are_no_overlap(attached: Guest, backend: Backend) -> None:
    """Right before and right behind; they are mappings of their own."""
    assert attached.map(1, *pages(10, 4), RAM) == iommu.OK
    assert attached.map(1, *pages(9), RAM) == iommu.OK
    assert attached.map(1, *pages(14), RAM) == iommu.OK
    assert [(m.first // PAGE, m.last // PAGE) for m in backend.mappings(1) or []] == [(9, 9), (10, 13), (14, 14)]


@pytest.mark.rule("R-MAP-5")
def test_unknown_flags(attached: Guest, backend: Backend) -> None:
    """Bits 3 to 31, alone and beside the known ones."""
    for bit in range(3, 32):
        for known in (0, iommu.READ | iommu.WRITE, iommu.MMIO):
            assert attached.map(1, *pages(1), RAM, flags=1 << bit | known) == iommu.INVAL
    assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-5")
def test_mmio_flag_without_its_feature(backend: Backend) -> None:
    """A driver that has not accepted MMIO does not know the flag."""
    with backend.guest(features=backend.features(without=iommu.F_MMIO)) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, *pages(1), RAM, flags=iommu.WRITE | iommu.MMIO) == iommu.INVAL
        assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-5")
@pytest.mark.parametrize("flags", range(8))
def test_known_flags(attached: Guest, backend: Backend, flags: int) -> None:
    """Each set of the three is accepted and kept as it is; none at all makes a mapping that nobody can use."""
    assert attached.map(1, *pages(1), RAM, flags=flags) == iommu.OK
    (found,) = backend.mappings(1) or []
    assert found.flags == flags


@pytest.mark.rule("R-MAP-6")
def test_no_such_domain(attached: Guest) -> None:
    """NOENT for one that never was and for one that has ended."""
    assert attached.map(2, *pages(1), RAM) == iommu.NOENT
    assert attached.detach(1, ENDPOINT) == iommu.OK
    assert attached.map(1, *pages(1), RAM) == iommu.NOENT


@pytest.mark.rule("R-MAP-7")
def test_a_bypass_domain(guest: Guest, backend: Backend) -> None:
    """INVAL, and identity stays as it is."""
    assert guest.attach(1, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.INVAL
    assert backend.translate(ENDPOINT, PAGE) == PAGE


@pytest.mark.rule("R-MAP-8", "R-MAP-9")
@pytest.mark.parametrize("flags", range(4))
def test_permissions(attached: Guest, backend: Backend, flags: int) -> None:
    """No write without WRITE; and no read without READ, even where WRITE is given."""
    assert attached.map(1, *pages(1), RAM, flags=flags) == iommu.OK
    for access in (iommu.READ, iommu.WRITE, iommu.READ | iommu.WRITE):
        allowed = access & ~flags == 0
        assert (backend.translate(ENDPOINT, PAGE, access) is not None) == allowed


@pytest.mark.rule("R-MAP-8")
def test_translation(attached: Guest, backend: Backend) -> None:
    """Byte by byte at the edges: what is mapped leads where it should, what lies beside it nowhere."""
    assert attached.map(1, 0x10_0000, 0x10_2FFF, RAM + 0x5000) == iommu.OK
    assert backend.translate(ENDPOINT, 0x10_0000) == RAM + 0x5000
    assert backend.translate(ENDPOINT, 0x10_1234) == RAM + 0x6234
    assert backend.translate(ENDPOINT, 0x10_2FFF) == RAM + 0x7FFF
    assert backend.translate(ENDPOINT, 0xF_FFFF) is None
    assert backend.translate(ENDPOINT, 0x10_3000) is None
    assert backend.translate(SIBLING, 0x10_0000) is None


@pytest.mark.rule("R-MAP-10")
def test_map_and_unmap_need_their_feature(backend: Backend) -> None:
    """For a driver that has not accepted MAP_UNMAP they are unknown types."""
    with backend.guest(features=backend.features(without=iommu.F_MAP_UNMAP | iommu.F_MMIO)) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.request(iommu.map_(1, *pages(1), RAM)).untouched
        assert guest.request(iommu.unmap(1, *pages(1))).untouched
        assert backend.mappings(1) == []


@pytest.mark.rule("R-MAP-11")
def test_targets_outside_the_guest(attached: Guest, backend: Backend) -> None:
    """RANGE where the target wraps around; FAULT where no guest memory is and the driver does not say MMIO."""
    assert attached.map(1, *pages(1, 2), U64 - PAGE + 1) == iommu.RANGE
    assert attached.map(1, 0, U64, PAGE) == iommu.RANGE
    assert attached.map(1, *pages(1), 0x8000_0000) == iommu.FAULT
    assert backend.mappings(1) == []
    assert attached.map(1, *pages(1), 0x8000_0000, flags=iommu.WRITE | iommu.MMIO) == iommu.OK


@pytest.mark.rule("R-MAP-11")
def test_targets_of_a_driver_without_the_mmio_flag(backend: Backend) -> None:
    """It cannot say that it means a device's registers, so they are mapped all the same."""
    with backend.guest(features=backend.features(without=iommu.F_MMIO)) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, *pages(1), 0x8000_0000) == iommu.OK


@pytest.mark.rule("R-MAP-12")
def test_a_refused_map_leaves_nothing(make_backend: MakeBackend) -> None:
    """At a limit, NOMEM and no mapping; when there is room again, the same request is OK."""
    backend = make_backend(CONFIG + "[limits]\nmappings-per-domain = 3\nmappings = 4\n")
    with backend.guest(features=backend.features()) as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.attach(2, SIBLING) == iommu.OK
        for page in range(3):
            assert guest.map(1, *pages(page), RAM) == iommu.OK
        assert guest.map(1, *pages(3), RAM) == iommu.NOMEM
        assert guest.map(1, *pages(2), RAM) == iommu.INVAL, "a full domain hides no overlap"
        assert guest.map(2, *pages(0), RAM) == iommu.OK
        assert guest.map(2, *pages(1), RAM) == iommu.NOMEM
        assert len(backend.mappings(1) or []) == 3
        assert len(backend.mappings(2) or []) == 1
        assert guest.unmap(1, *pages(0)) == iommu.OK
        assert guest.map(2, *pages(1), RAM) == iommu.OK


@pytest.mark.rule("R-RESV-4")
@pytest.mark.parametrize(("region_first", "region_last"), [(MSI_FIRST, MSI_LAST), (HOLE_FIRST, HOLE_LAST)])
def test_reserved_regions(guest: Guest, backend: Backend, region_first: int, region_last: int) -> None:
    """INVAL for a mapping that touches one by a page on either side, is inside, or covers it; beside it is OK."""
    assert guest.attach(1, GUARDED) == iommu.OK
    for first, last in (
        (region_first - PAGE, region_first + PAGE - 1),
        (region_first, region_first + PAGE - 1),
        (region_first + PAGE, region_first + 2 * PAGE - 1),
        (region_last - PAGE + 1, region_last + PAGE),
        (region_first, region_last),
        (0, U64),
    ):
        assert guest.map(1, first, last, 0) == iommu.INVAL
    assert backend.mappings(1) == []
    assert guest.map(1, region_first - PAGE, region_first - 1, RAM) == iommu.OK
    assert guest.map(1, region_last + 1, region_last + PAGE, RAM) == iommu.OK


@pytest.mark.rule("R-RESV-4")
def test_reserved_regions_of_all_endpoints_of_a_domain(guest: Guest) -> None:
    """One endpoint's regions count for the domain while it is there."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.attach(1, GUARDED) == iommu.OK
    assert guest.attach(1, SIBLING) == iommu.OK
    assert guest.map(1, MSI_FIRST, MSI_FIRST + PAGE - 1, RAM) == iommu.INVAL
    assert guest.detach(1, GUARDED) == iommu.OK
    assert guest.map(1, MSI_FIRST, MSI_FIRST + PAGE - 1, RAM) == iommu.OK


@pytest.mark.rule("R-RESV-5")
def test_regions_are_their_endpoints_own(guest: Guest, backend: Backend) -> None:
    """An endpoint's doorbell window leads nowhere through the IOMMU, and takes nothing from another endpoint."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.attach(2, GUARDED) == iommu.OK
    assert guest.map(1, MSI_FIRST, MSI_LAST, RAM) == iommu.OK
    assert backend.translate(ENDPOINT, MSI_FIRST, iommu.WRITE) == RAM
    assert backend.translate(GUARDED, MSI_FIRST, iommu.WRITE) is None


@pytest.mark.rule("R-MAP-4")
@pytest.mark.parametrize(("first", "last"), [(PAGE, 0), (2 * PAGE, PAGE - 1), (U64 - PAGE + 1, 0), (PAGE, PAGE - 1)])
def test_an_end_before_the_start(attached: Guest, backend: Backend, first: int, last: int) -> None:
    """INVAL, also where it is empty by one."""
    assert attached.map(1, first, last, RAM) == iommu.INVAL
    assert backend.mappings(1) == []
