"""ATTACH (VIRTIO 1.3, 5.13.6.3)."""

from __future__ import annotations

import pytest
from frontend import iommu
from frontend.guest import Guest

from conformance.backend import (
    ENDPOINT,
    GUARDED,
    HOLE_FIRST,
    MSI_FIRST,
    NOBODY,
    PAGE,
    RAM,
    SIBLING,
    Backend,
    pages,
)


@pytest.mark.rule("R-ATTACH-1")
@pytest.mark.parametrize("position", range(4))
def test_reserved_bytes(guest: Guest, backend: Backend, position: int) -> None:
    """A bit in any of the four is INVAL, and the endpoint is not attached."""
    for bit in range(8):
        reserved = bytes(1 << bit if index == position else 0 for index in range(4))
        assert guest.request(iommu.attach(1, ENDPOINT, reserved=reserved)).status == iommu.INVAL
    assert backend.domains() == []
    assert guest.map(1, *pages(1), RAM) == iommu.NOENT


@pytest.mark.rule("R-ATTACH-1", "R-ATTACH-2")
def test_a_refused_attach_does_not_detach(guest: Guest, backend: Backend) -> None:
    """The endpoint stays where it is, with its mappings."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    for body in (
        iommu.attach(2, ENDPOINT, reserved=b"\0\0\0\1"),
        iommu.attach(2, ENDPOINT, flags=2),
        iommu.attach(1, ENDPOINT, flags=1),
        iommu.attach(1, ENDPOINT, flags=0x8000_0000),
    ):
        assert guest.request(body).status == iommu.INVAL
        assert backend.domain_of(ENDPOINT) == 1
        assert backend.translate(ENDPOINT, PAGE) == RAM


@pytest.mark.rule("R-ATTACH-2")
def test_unknown_flags(guest: Guest, backend: Backend) -> None:
    """Bits 1 to 31, alone and beside BYPASS."""
    for bit in range(1, 32):
        for flags in (1 << bit, 1 << bit | iommu.ATTACH_BYPASS):
            assert guest.attach(1, ENDPOINT, flags=flags) == iommu.INVAL
    assert backend.domains() == []


@pytest.mark.rule("R-ATTACH-2")
def test_bypass_flag_without_its_feature(backend: Backend) -> None:
    """A driver that has not accepted BYPASS_CONFIG does not know the flag."""
    with backend.guest(features=backend.features(without=iommu.F_BYPASS_CONFIG)) as guest:
        assert guest.attach(1, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.INVAL
        assert backend.domains() == []
        assert guest.attach(1, ENDPOINT) == iommu.OK


@pytest.mark.rule("R-ATTACH-3")
@pytest.mark.parametrize("endpoint", [0, ENDPOINT - 1, ENDPOINT + 1, NOBODY, 0x1_0010, 0xFFFF_FFFF])
def test_an_endpoint_that_does_not_exist(guest: Guest, backend: Backend, endpoint: int) -> None:
    """NOENT, and no domain is made for it."""
    assert guest.attach(1, endpoint) == iommu.NOENT
    assert guest.attach(1, endpoint, flags=iommu.ATTACH_BYPASS) == iommu.NOENT
    assert backend.domains() == []


@pytest.mark.rule("R-ATTACH-4", "R-ATTACH-9")
def test_endpoints_share_a_domain(guest: Guest, backend: Backend) -> None:
    """One mapping, made before or after they come, is there for both, and for an endpoint with other regions too."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    assert guest.attach(1, SIBLING) == iommu.OK
    assert guest.attach(1, GUARDED) == iommu.OK
    assert guest.map(1, *pages(2), RAM + PAGE) == iommu.OK
    for endpoint in (ENDPOINT, SIBLING, GUARDED):
        assert backend.translate(endpoint, PAGE) == RAM
        assert backend.translate(endpoint, 2 * PAGE) == RAM + PAGE


@pytest.mark.rule("R-ATTACH-6")
@pytest.mark.parametrize("first", [0, iommu.ATTACH_BYPASS])
def test_a_domain_is_of_one_kind(guest: Guest, backend: Backend, first: int) -> None:
    """Bypass or not is said by the first endpoint; one that says otherwise is refused and stays where it is."""
    second = first ^ iommu.ATTACH_BYPASS
    assert guest.attach(1, ENDPOINT, flags=first) == iommu.OK
    assert guest.attach(2, SIBLING) == iommu.OK
    assert guest.map(2, *pages(1), RAM) == iommu.OK
    assert guest.attach(1, SIBLING, flags=second) == iommu.INVAL
    assert guest.attach(1, ENDPOINT, flags=second) == iommu.INVAL
    assert (backend.domain_of(ENDPOINT), backend.domain_of(SIBLING)) == (1, 2)
    assert backend.translate(SIBLING, PAGE) == RAM
    assert guest.attach(1, SIBLING, flags=first) == iommu.OK


@pytest.mark.rule("R-ATTACH-7")
def test_moving_to_another_domain(guest: Guest, backend: Backend) -> None:
    """As DETACH and ATTACH: the old domain ends with its last endpoint, the new one's mappings are the endpoint's."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    assert guest.attach(2, SIBLING) == iommu.OK
    assert guest.map(2, *pages(2), RAM) == iommu.OK
    assert guest.attach(2, ENDPOINT) == iommu.OK
    assert guest.map(1, *pages(3), RAM) == iommu.NOENT
    assert backend.domains() == [2]
    assert backend.translate(ENDPOINT, PAGE) is None
    assert backend.translate(ENDPOINT, 2 * PAGE) == RAM
    # A domain that keeps another endpoint keeps its mappings.
    assert guest.attach(3, ENDPOINT) == iommu.OK
    assert backend.translate(SIBLING, 2 * PAGE) == RAM
    assert backend.translate(ENDPOINT, 2 * PAGE) is None


@pytest.mark.rule("R-ATTACH-7")
def test_attaching_again(guest: Guest, backend: Backend) -> None:
    """To the domain it is in: as DETACH and ATTACH, so a sole endpoint's mappings go, a shared domain's stay."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert backend.mappings(1) == []
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    assert guest.attach(1, SIBLING) == iommu.OK
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert backend.translate(ENDPOINT, PAGE) == RAM


@pytest.mark.rule("R-ATTACH-10", "R-ATTACH-8")
@pytest.mark.parametrize("region", [MSI_FIRST, HOLE_FIRST])
def test_reserved_regions_that_are_mapped(guest: Guest, backend: Backend, region: int) -> None:
    """UNSUPP, and the endpoint stays in its domain; when the mapping has gone, it is welcome."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.map(1, region, region + PAGE - 1, RAM) == iommu.OK
    assert guest.attach(2, GUARDED) == iommu.OK
    assert guest.map(2, *pages(1), RAM) == iommu.OK
    assert guest.attach(1, GUARDED) == iommu.UNSUPP
    assert backend.domain_of(GUARDED) == 2
    assert backend.translate(GUARDED, PAGE) == RAM
    assert backend.translate(ENDPOINT, region) == RAM
    assert guest.unmap(1, region, region + PAGE - 1) == iommu.OK
    assert guest.attach(1, GUARDED) == iommu.OK


@pytest.mark.rule("R-ATTACH-11")
def test_not_refused_is_attached(guest: Guest, backend: Backend) -> None:
    """After OK a mapping of the domain is the endpoint's."""
    for domain in range(8):
        assert guest.attach(domain, ENDPOINT) == iommu.OK
        assert backend.domain_of(ENDPOINT) == domain
        assert guest.map(domain, *pages(1), RAM + domain * PAGE) == iommu.OK
        assert backend.translate(ENDPOINT, PAGE, iommu.READ | iommu.WRITE) == RAM + domain * PAGE
