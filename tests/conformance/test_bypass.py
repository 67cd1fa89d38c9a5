"""Who reaches memory without a mapping (VIRTIO 1.3, 5.13.4 and 5.13.6.2): every row of the table."""

from __future__ import annotations

import pytest
from frontend import iommu, wire

from conformance.backend import CONFIG, ENDPOINT, PAGE, RAM, SIBLING, U64, Backend, pages
from conformance.conftest import MakeBackend

NONE, OLD, CONFIGURED = "neither", "BYPASS", "BYPASS_CONFIG"


def identity(backend: Backend, endpoint: int) -> bool:
    """Does an endpoint reach all memory at its own addresses (or else nothing at all)?"""
    reached = {
        backend.translate(endpoint, iova, access) == iova
        for iova in (0, PAGE, RAM + 123, U64)
        for access in (iommu.READ, iommu.WRITE, iommu.READ | iommu.WRITE)
    }
    assert len(reached) == 1
    if reached == {False}:
        assert backend.translate(endpoint, RAM) is None
    return reached == {True}


def configuration(offered: str, boot: bool) -> str:
    """A device that offers one of the features or none.  The old feature is offered where bypass is on at boot."""
    assert not (offered == OLD and not boot)
    text = CONFIG if offered == CONFIGURED else CONFIG.replace("[device]", "[device]\nbypass-config = false")
    return text.replace("bypass = false", f"bypass = {'true' if boot else 'false'}")


@pytest.mark.rule("R-OPS-6", "R-CONF-3")
@pytest.mark.parametrize(
    ("offered", "boot", "accepted", "reaches"),
    [
        (CONFIGURED, True, True, True),
        (CONFIGURED, True, False, True),
        (CONFIGURED, False, True, False),
        (CONFIGURED, False, False, False),
        (OLD, True, True, True),
        (OLD, True, False, False),
        (NONE, False, False, False),
    ],
)
def test_unattached(make_backend: MakeBackend, offered: str, boot: bool, accepted: bool, reaches: bool) -> None:
    """BYPASS_CONFIG decides by config.bypass once it is offered; BYPASS has to be accepted; without both: blocked."""
    backend = make_backend(configuration(offered, boot))
    bits = {CONFIGURED: iommu.F_BYPASS_CONFIG, OLD: iommu.F_BYPASS, NONE: 0}[offered]
    features = backend.features()
    assert features & (iommu.F_BYPASS | iommu.F_BYPASS_CONFIG) == bits
    assert identity(backend, ENDPOINT) == (offered == CONFIGURED and boot), "before a driver is there"
    with backend.guest(features=features if accepted else features & ~bits) as guest:
        assert identity(backend, ENDPOINT) == reaches
        # Attached: only what is mapped, whatever the features.
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert not identity(backend, ENDPOINT)
        assert identity(backend, SIBLING) == reaches
        assert guest.map(1, *pages(1), RAM) == iommu.OK
        assert backend.translate(ENDPOINT, PAGE) == RAM
        assert backend.translate(ENDPOINT, RAM) is None
        assert guest.detach(1, ENDPOINT) == iommu.OK
        assert identity(backend, ENDPOINT) == reaches


@pytest.mark.rule("R-ATTACH-6", "R-ATTACH-11")
@pytest.mark.parametrize("bypass", [False, True])
def test_a_bypass_domain_is_identity(make_backend: MakeBackend, bypass: bool) -> None:
    """Whatever config.bypass says, and until the endpoint leaves it."""
    backend = make_backend(configuration(CONFIGURED, bypass))
    with backend.guest(features=backend.features()) as guest:
        assert guest.attach(7, ENDPOINT, flags=iommu.ATTACH_BYPASS) == iommu.OK
        for value in (1, 0, 1):
            guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))
            assert identity(backend, ENDPOINT)
            assert identity(backend, SIBLING) == bool(value)
        assert guest.attach(8, ENDPOINT) == iommu.OK
        assert not identity(backend, ENDPOINT)
        assert backend.domains() == [8]


@pytest.mark.rule("R-CONF-6", "R-OPS-6")
def test_the_driver_changes_it(backend: Backend) -> None:
    """For unattached endpoints at once, for attached ones when they are detached; 2 and 255 change nothing."""
    with backend.guest(features=backend.features()) as guest:

        def write(value: int) -> None:
            guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))

        assert guest.attach(1, SIBLING) == iommu.OK
        for value, expected in ((1, True), (2, True), (255, True), (0, False), (255, False), (2, False), (1, True)):
            write(value)
            assert identity(backend, ENDPOINT) == expected
            assert not identity(backend, SIBLING)
            assert guest.config().bypass == expected
        assert guest.detach(1, SIBLING) == iommu.OK
        assert identity(backend, SIBLING)


@pytest.mark.rule("R-CONF-4", "R-INIT-1")
def test_device_reset_keeps_it(backend: Backend) -> None:
    """Attached endpoints become unattached, and reach what config.bypass gives them."""
    with backend.guest(features=backend.features()) as guest:
        for value in (1, 0):
            guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))
            assert guest.attach(1, ENDPOINT) == iommu.OK
            assert guest.attach(2, SIBLING, flags=iommu.ATTACH_BYPASS) == iommu.OK
            guest.reset_and_start()
            assert identity(backend, ENDPOINT) == bool(value)
            assert identity(backend, SIBLING) == bool(value)


@pytest.mark.rule("R-OPS-6")
def test_the_old_feature_lasts_while_it_is_accepted(make_backend: MakeBackend) -> None:
    """A driver that comes without it after a reset finds its endpoints blocked."""
    backend = make_backend(configuration(OLD, boot=True))
    with backend.guest(features=backend.features()) as guest:
        assert identity(backend, ENDPOINT)
        guest.stop()
        for ring in guest.rings:
            ring.reset()
        guest.features &= ~iommu.F_BYPASS
        guest.client.do(wire.SET_FEATURES, wire.u64(guest.features))
        guest.start()
        assert not identity(backend, ENDPOINT)
