"""From power-on to the first answered request, as a driver does it."""

from __future__ import annotations

import pytest
from frontend import iommu, wire
from vm.iommu import ALL_FEATURES, QUEUES
from vm.virtio import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK

from qtest.conftest import ENDPOINT, MakeRig, Rig

SPLIT = ALL_FEATURES & ~wire.F_RING_PACKED
REQUIRED = iommu.F_MAP_UNMAP | iommu.F_INPUT_RANGE | iommu.F_DOMAIN_RANGE | iommu.F_PROBE | wire.F_VERSION_1


def test_what_is_offered(rig: Rig) -> None:
    """Features, queues and configuration space arrive through QEMU as the daemon has them."""
    device = rig.iommu.device
    device.reset()
    offered = device.offered()
    assert offered & REQUIRED == REQUIRED
    # QEMU's generic device hands these on without being able to keep their promises.
    for never in (26, 33, 38, 40):
        assert not offered & 1 << never
    assert device.num_queues == QUEUES
    assert [device.queue_size(index) for index in range(QUEUES)] == [256, 256]
    config = rig.iommu.config()
    assert config.page_size_mask & -config.page_size_mask == 4096
    assert (config.input_first, config.input_last) == (0, (1 << 64) - 1)
    assert (config.domain_first, config.domain_last) == (0, (1 << 32) - 1)
    assert config.probe_size == 512
    assert config.bypass == 1
    rig.finish()


@pytest.mark.parametrize(
    "ring",
    [0, wire.F_EVENT_IDX, wire.F_INDIRECT_DESC, wire.F_RING_PACKED, wire.F_RING_PACKED | wire.F_EVENT_IDX],
    ids=["split", "split-event-idx", "split-indirect", "packed", "packed-event-idx"],
)
def test_first_request_on_every_ring(rig: Rig, ring: int) -> None:
    """The driver comes up with each format of a ring and its requests are answered, more of them than it has slots."""
    rig.iommu.bring_up(REQUIRED | ring)
    assert rig.iommu.features == REQUIRED | ring
    assert rig.iommu.device.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    for _ in range(600):
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    assert rig.finish()["requests"] == {"attach": {"ok": 600}}


@pytest.mark.parametrize("size", [2, 16, 256])
def test_small_rings(rig: Rig, size: int) -> None:
    """A driver may use less of a queue than it has."""
    rig.iommu.bring_up(SPLIT, queue_size=size)
    for _ in range(3 * size):
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.finish()


def test_used_buffers_raise_the_interrupt(rig: Rig) -> None:
    """A driver that wants to be told of used buffers is, by the interrupt status; one that does not, is not."""
    rig.iommu.bring_up(REQUIRED)
    ring = rig.iommu.rings[iommu.REQUEST_QUEUE]
    ring.want_calls(False)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    assert rig.iommu.device.isr() == 0
    ring.want_calls(True)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.iommu.wait_interrupt()
    rig.finish()


def test_many_requests_with_one_kick(rig: Rig) -> None:
    """A batch is answered whole and in order."""
    rig.iommu.bring_up(SPLIT & ~wire.F_EVENT_IDX)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    heads = []
    ring = rig.iommu.rings[iommu.REQUEST_QUEUE]
    for page in range(100):
        first = page * 0x2000
        request = iommu.map_(1, first, first + 0xFFF, rig.machine.memory.rams[0].gpa)
        heads.append(rig.iommu.queue_request(request, iommu.TAIL)[0])
    ring.publish()
    ring.kick()
    assert [used.id for used in ring.wait(100)] == heads
    session = rig.finish()
    assert session["peak_mappings"] == 100


def test_bypass_can_be_written(rig: Rig) -> None:
    """The one writable byte, kept over a reset of the device; a value that is none changes nothing."""
    rig.iommu.bring_up(SPLIT)
    device = rig.iommu.device
    for written, read in ((0, 0), (1, 1), (2, 1), (0, 0), (255, 0)):
        device.set_config(iommu.BYPASS_OFFSET, 1, written)
        assert rig.iommu.config().bypass == read
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.config().bypass == 0


def test_memory_that_is_not_shared(make_rig: MakeRig) -> None:
    """QEMU shares nothing and carries on: the daemon says which option is missing."""
    rig = make_rig("virt", shared=False)
    rig.iommu.bring_up(SPLIT)
    line = rig.daemon.logged("frontend-request-refused")
    assert "share=on" in line["hint"]
    assert line["request"] == "SET_VRING_ENABLE"
