"""Configuration space (VIRTIO 1.3, 5.13.4) and what a device reset keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
from frontend import iommu, wire
from frontend.guest import Guest
from integration.daemon import Daemon

from conformance.backend import CONFIG, ENDPOINT, PAGE, RAM, Backend, pages
from conformance.conftest import MakeBackend
from viommud.config import parse
from viommud.device_setup import plan
from viommud.engine import Engine
from viommud.errors import UsageError
from viommud.settings import Settings


def write_bypass(guest: Guest, value: int) -> None:
    """As a driver writes the one byte."""
    guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))


@pytest.mark.rule("R-CONF-1")
def test_a_page_size_there_is(guest: Guest, tmp_path: Path) -> None:
    """At least one bit of the mask is set; a configuration without one is refused, by the engine too."""
    assert guest.config().page_size_mask
    with pytest.raises(UsageError, match="page-size-mask"):
        plan(parse("[device]\npage-size-mask = 0\n"))
    with pytest.raises(ValueError, match="contradict"):
        Engine(Settings(page_size_mask=0))
    with Daemon(tmp_path, config="[device]\npage-size-mask = 0\n") as daemon:
        assert daemon.wait() == 2


@pytest.mark.rule("R-CONF-2")
def test_several_page_sizes(make_backend: MakeBackend) -> None:
    """Bits above the lowest are hints: the lowest is the granularity."""
    backend = make_backend("[device]\npage-size-mask = 0x4020_1000\nmsi = 'none'\n")
    with backend.guest() as guest:
        assert guest.config().page_size_mask == 0x4020_1000
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, *pages(1), RAM) == iommu.OK
        assert guest.map(1, 0x20_0000, 0x3F_FFFF, RAM) == iommu.OK
        assert guest.map(1, 0x2800, 0x37FF, RAM) == iommu.RANGE


@pytest.mark.rule("R-CONF-2")
@pytest.mark.parametrize("granule", [1, 512, 16384, 65536])
def test_other_granules(make_backend: MakeBackend, granule: int) -> None:
    """From one byte up: mappings of one granule, and none that are smaller."""
    backend = make_backend(f"[device]\ngranule = {granule}\nmsi = 'none'\n")
    with backend.guest() as guest:
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, granule, 2 * granule - 1, RAM) == iommu.OK
        assert guest.map(1, 2 * granule, 3 * granule - 1, RAM) == iommu.OK
        if granule > 1:
            assert guest.map(1, 3 * granule, 3 * granule + granule // 2 - 1, RAM) == iommu.RANGE
        assert [(m.first, m.last) for m in backend.mappings(1) or []] == [
            (granule, 2 * granule - 1),
            (2 * granule, 3 * granule - 1),
        ]


@pytest.mark.rule("R-CONF-3")
@pytest.mark.parametrize("value", [0, 1])
def test_bypass_starts_as_configured(make_backend: MakeBackend, value: int) -> None:
    """0 or 1, as the user says."""
    backend = make_backend(f"[device]\nbypass = {'true' if value else 'false'}\n")
    with backend.guest() as guest:
        assert guest.client.get_config(iommu.CONFIG_SIZE)[iommu.BYPASS_OFFSET] == value


@pytest.mark.rule("R-CONF-4", "R-INIT-1")
@pytest.mark.parametrize("how", ["stop and start", "RESET_DEVICE", "SET_STATUS 0"])
@pytest.mark.parametrize("value", [0, 1])
def test_device_reset(make_backend: MakeBackend, how: str, value: int) -> None:
    """However a front-end resets the device: bypass keeps what the driver wrote, endpoints and domains do not stay."""
    backend = make_backend(CONFIG.replace("bypass = false", f"bypass = {'false' if value else 'true'}"))
    with backend.guest(features=backend.features()) as guest:
        write_bypass(guest, value)
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert guest.map(1, *pages(1), RAM) == iommu.OK
        if how == "stop and start":
            guest.reset_and_start()
        else:
            if how == "RESET_DEVICE":
                guest.client.do(wire.RESET_DEVICE)
            else:
                guest.client.do(wire.SET_STATUS, wire.u64(0))
            assert backend.domain_of(ENDPOINT) is None
            assert backend.domains() == []
            for ring in guest.rings:
                ring.reset()
            guest.start()
        assert guest.config().bypass == value
        assert backend.domain_of(ENDPOINT) is None
        assert guest.map(1, *pages(2), RAM) == iommu.NOENT
        assert guest.attach(1, ENDPOINT) == iommu.OK
        assert backend.mappings(1) == []


@pytest.mark.rule("R-CONF-5")
@pytest.mark.parametrize("boot", [0, 1])
def test_the_next_vm_starts_with_the_configured_bypass(tmp_path: Path, boot: int) -> None:
    """A new connection is a machine that was switched on: bypass is what the user configured."""
    config = CONFIG.replace("bypass = false", f"bypass = {'true' if boot else 'false'}")
    with Daemon(tmp_path, "--keep-listening", config=config) as daemon:
        for _ in range(2):
            with daemon.guest() as guest:
                guest.start()
                assert guest.config().bypass == boot
                write_bypass(guest, 1 - boot)
                assert guest.config().bypass == 1 - boot


@pytest.mark.rule("R-CONF-6")
def test_bypass_is_0_or_1(guest: Guest, backend: Backend) -> None:
    """Every other value that is written leaves it as it was; nothing else is ever read."""
    for before in (0, 1):
        write_bypass(guest, before)
        assert guest.config().bypass == before
        for value in range(2, 256):
            guest.client.send(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, bytes([value])))
        assert guest.config().bypass == before
        assert (backend.translate(ENDPOINT, PAGE) is not None) == bool(before)


@pytest.mark.rule("R-CONF-7")
def test_the_rest_of_the_space_is_read_only(guest: Guest) -> None:
    """One byte after the other, and all at once, is written in vain."""
    before = guest.client.get_config(iommu.CONFIG_SIZE)
    for offset in range(iommu.CONFIG_SIZE):
        if offset != iommu.BYPASS_OFFSET:
            guest.client.send(wire.SET_CONFIG, wire.config(offset, bytes([before[offset] ^ 0xFF])))
    guest.client.send(wire.SET_CONFIG, wire.config(0, b"\xff" * iommu.BYPASS_OFFSET + b"\0" + b"\xff" * 3))
    assert guest.client.get_config(iommu.CONFIG_SIZE) == before


@pytest.mark.rule("R-CONF-7")
def test_bypass_needs_its_feature(backend: Backend) -> None:
    """A driver that has not accepted BYPASS_CONFIG cannot write bypass; migration of the device can."""
    with backend.guest(features=backend.features(without=iommu.F_BYPASS_CONFIG)) as guest:
        guest.client.send(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, b"\x01"))
        assert guest.config().bypass == 0
        guest.client.do(wire.SET_CONFIG, wire.config(iommu.BYPASS_OFFSET, b"\x01", flags=1))
        assert guest.config().bypass == 1
