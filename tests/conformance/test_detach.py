"""DETACH (VIRTIO 1.3, 5.13.6.4)."""

from __future__ import annotations

import pytest
from frontend import iommu
from frontend.guest import Guest

from conformance.backend import ENDPOINT, NOBODY, PAGE, RAM, SIBLING, Backend, pages


@pytest.mark.rule("R-DETACH-1")
def test_reserved_bytes(guest: Guest, backend: Backend) -> None:
    """Each of the eight, and all together, is ignored."""
    for reserved in [*(bytes(255 if at == index else 0 for at in range(8)) for index in range(8)), b"\xff" * 8]:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.request(iommu.detach(1, ENDPOINT, reserved=reserved)).status == iommu.OK
        assert backend.domain_of(ENDPOINT) is None


@pytest.mark.rule("R-DETACH-2")
@pytest.mark.parametrize("endpoint", [0, ENDPOINT + 1, NOBODY, 0xFFFF_FFFF])
def test_an_endpoint_that_does_not_exist(guest: Guest, endpoint: int) -> None:
    """NOENT, whether the domain exists or not."""
    assert guest.detach(1, endpoint) == iommu.NOENT
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.detach(1, endpoint) == iommu.NOENT


@pytest.mark.rule("R-DETACH-3")
def test_an_endpoint_that_is_not_in_the_domain(guest: Guest, backend: Backend) -> None:
    """INVAL for no such domain, for another endpoint's and for one that was never attached; nothing is detached."""
    assert guest.detach(1, ENDPOINT) == iommu.INVAL
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.attach(2, SIBLING) == iommu.OK
    for domain in (0, 2, 3):
        assert guest.detach(domain, ENDPOINT) == iommu.INVAL
    assert (backend.domain_of(ENDPOINT), backend.domain_of(SIBLING)) == (1, 2)
    assert guest.detach(1, ENDPOINT) == iommu.OK
    assert guest.detach(1, ENDPOINT) == iommu.INVAL


@pytest.mark.rule("R-DETACH-4")
def test_nothing_is_reached_any_more(guest: Guest, backend: Backend) -> None:
    """The mappings are another endpoint's still, and the detached one's no more."""
    assert guest.attach(1, ENDPOINT) == iommu.OK
    assert guest.attach(1, SIBLING) == iommu.OK
    assert guest.map(1, *pages(1), RAM) == iommu.OK
    assert guest.detach(1, ENDPOINT) == iommu.OK
    assert backend.translate(ENDPOINT, PAGE) is None
    assert backend.translate(SIBLING, PAGE) == RAM


@pytest.mark.rule("R-DETACH-4")
def test_a_bypass_domain_is_left(guest: Guest, backend: Backend) -> None:
    """Identity ends with the attachment when nothing else gives it."""
    assert guest.attach(1, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.OK
    assert backend.translate(ENDPOINT, RAM) == RAM
    assert guest.detach(1, ENDPOINT) == iommu.OK
    assert backend.translate(ENDPOINT, RAM) is None


@pytest.mark.rule("R-DETACH-5")
def test_the_last_endpoint_ends_the_domain(guest: Guest, backend: Backend) -> None:
    """Its mappings go, and its number is free, for a domain of either kind."""
    for flags in (0, iommu.ATTACH_BYPASS, 0):
        assert guest.attach(1, ENDPOINT, flags=flags) == iommu.OK
        assert guest.attach(1, SIBLING, flags=flags) == iommu.OK
        if not flags:
            assert backend.mappings(1) == []
            assert guest.map(1, *pages(1), RAM) == iommu.OK
        assert guest.detach(1, ENDPOINT) == iommu.OK
        assert backend.domains() == [1]
        assert guest.detach(1, SIBLING) == iommu.OK
        assert backend.domains() == []
        assert guest.map(1, *pages(2), RAM) == iommu.NOENT
        assert guest.unmap(1, *pages(1)) == iommu.NOENT
