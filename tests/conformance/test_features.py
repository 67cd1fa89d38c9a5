"""What is offered, what is accepted, and when (VIRTIO 1.3, 2.2, 5.13.3)."""

from __future__ import annotations

import itertools

import pytest
from frontend import iommu, wire
from hypothesis import given
from hypothesis import strategies as st

from conformance.backend import CONFIG, Backend
from conformance.conftest import MakeBackend
from viommud.config import Config, Device
from viommud.device_setup import plan
from viommud.engine import Engine
from viommud.errors import UsageError
from viommud.settings import Feature, Settings

RING_RESET = 1 << 40
SUSPEND = 1 << 43


def offered(backend: Backend) -> int:
    """Features as a front-end is told them."""
    return backend.client.ask(wire.GET_FEATURES).u64


@pytest.mark.rule("R-FEAT-1", "R-FEAT-2")
def test_offers(make_backend: MakeBackend) -> None:
    """MAP_UNMAP always; the old BYPASS not by default."""
    assert offered(make_backend("")) & (iommu.F_MAP_UNMAP | iommu.F_BYPASS) == iommu.F_MAP_UNMAP
    assert offered(make_backend(CONFIG)) & (iommu.F_MAP_UNMAP | iommu.F_BYPASS) == iommu.F_MAP_UNMAP


@pytest.mark.rule("R-FEAT-3")
@given(
    bypass=st.booleans(),
    bypass_config=st.none() | st.booleans(),
    mmio=st.none() | st.booleans(),
    personality=st.sampled_from(["1.x", "0.9", "0.5"]),
)
def test_bypass_is_told_in_one_way(
    bypass: bool, bypass_config: bool | None, mmio: bool | None, personality: str
) -> None:
    """No configuration offers BYPASS beside BYPASS_CONFIG."""
    device = Device(bypass=bypass, bypass_config=bypass_config, mmio=mmio, personality=personality)  # type: ignore[arg-type]
    try:
        features = plan(Config(device=device)).settings.features
    except UsageError:
        return
    assert features & (Feature.BYPASS | Feature.BYPASS_CONFIG) != Feature.BYPASS | Feature.BYPASS_CONFIG


@pytest.mark.rule("R-FEAT-3")
def test_the_engine_refuses_both() -> None:
    """Whoever makes an engine without a configuration file cannot offer both either."""
    with pytest.raises(ValueError, match="contradict"):
        Engine(Settings(features=Settings().features | Feature.BYPASS))


@pytest.mark.rule("R-FEATN-1")
def test_no_feature_without_its_prerequisite(make_backend: MakeBackend) -> None:
    """VERSION_1 is always there; MMIO comes with MAP_UNMAP; nothing is offered that this device does not do."""
    for packed, in_order, indirect, event_idx in itertools.product(("true", "false"), repeat=4):
        features = offered(
            make_backend(
                f"[device]\npacked-ring = {packed}\nin-order = {in_order}\n"
                f"indirect = {indirect}\nevent-idx = {event_idx}\n"
            )
        )
        assert features & wire.F_VERSION_1
        if features & iommu.F_MMIO:
            assert features & iommu.F_MAP_UNMAP
        known = sum(Feature) | wire.F_PROTOCOL_FEATURES
        assert features & ~known == 0


@pytest.mark.rule("R-FEATN-1")
def test_features_that_were_not_offered_are_refused(backend: Backend) -> None:
    """Each bit that is not offered, alone beside a good set, is refused, and the good set is accepted afterwards."""
    backend.client.negotiate(features=backend.features())
    good = backend.features()
    for bit in range(64):
        if not offered(backend) >> bit & 1 and 1 << bit != wire.F_LOG_ALL:
            assert backend.client.acknowledged(wire.SET_FEATURES, wire.u64(good | 1 << bit)) != 0
    assert backend.client.acknowledged(wire.SET_FEATURES, wire.u64(good)) == 0


@pytest.mark.rule("R-RR-1", "R-SUSP-1")
def test_what_is_not_done_is_not_offered(backend: Backend) -> None:
    """Resetting one queue and suspending are not offered, and cannot be negotiated."""
    assert offered(backend) & (RING_RESET | SUSPEND) == 0
    backend.client.negotiate(features=backend.features())
    for feature in (RING_RESET, SUSPEND):
        assert backend.client.acknowledged(wire.SET_FEATURES, wire.u64(backend.features() | feature)) != 0


@pytest.mark.rule("R-STAT-4")
def test_accepted_once_accepted_again(backend: Backend) -> None:
    """A feature set is accepted again after any number of device resets, also with another one in between."""
    other = backend.features(without=wire.F_EVENT_IDX)
    with backend.guest(features=backend.features()) as guest:
        for number in range(6):
            guest.stop()
            for ring in guest.rings:
                ring.reset()
                ring.event_idx = not number % 2
            guest.client.do(wire.RESET_DEVICE)
            guest.client.do(wire.SET_FEATURES, wire.u64(other if number % 2 else backend.features()))
            guest.start()
            assert guest.attach(1, 0x10) == iommu.OK


@pytest.mark.rule("R-CFG-1")
def test_config_is_readable_before_features_are_settled(backend: Backend) -> None:
    """Every field of an offered feature has its value before the driver has accepted anything."""
    client = backend.client
    client.send(wire.SET_PROTOCOL_FEATURES, wire.u64(wire.P_CONFIG | wire.P_REPLY_ACK))
    config = iommu.config(client.get_config(iommu.CONFIG_SIZE))
    assert config == iommu.Config((1 << 64) - 4096, 0, (1 << 64) - 1, 0, (1 << 32) - 1, 512, 0)
