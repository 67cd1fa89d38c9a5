"""Resets, pauses, hot-added memory, ends: what happens to a device while nobody is in the guest."""

from __future__ import annotations

import pytest
from frontend import iommu, wire
from frontend.memory import Ram
from vm.iommu import ALL_FEATURES
from vm.qemu import QemuError

from qtest.conftest import ENDPOINT, SIBLING, MakeRig, Rig

SPLIT = ALL_FEATURES & ~wire.F_RING_PACKED
PACKED = ALL_FEATURES


def phys(rig: Rig) -> int:
    """Guest memory to map."""
    return rig.machine.memory.rams[0].gpa


@pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])
def test_device_reset_forgets_everything(rig: Rig, features: int) -> None:
    """After the driver resets the device no domain is there, and the same requests work again from the start."""
    for _ in range(4):
        rig.iommu.bring_up(features)
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.NOENT
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
        assert rig.iommu.attach(1, SIBLING) == iommu.OK
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.OK
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.INVAL
    assert rig.finish()["peak_mappings"] == 1


def test_system_reset_forgets_everything(rig: Rig) -> None:
    """As the driver's reset, with the machine around it."""
    for _ in range(3):
        rig.iommu.bring_up(SPLIT)
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.NOENT
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.OK
        rig.machine.qmp.command("system_reset")
        rig.machine.qmp.event("RESET")
        rig.iommu.pci.enable()
    rig.finish()


@pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("before", [2, 256, 300])
def test_pause_and_continue_keep_everything(rig: Rig, features: int, before: int) -> None:
    """Whatever the rings' indices are when the machine stops: domains and mappings are there when it goes on."""
    rig.iommu.bring_up(features)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    for page in range(before - 1):
        assert rig.iommu.map(1, page << 12, (page << 12) + 0xFFF, phys(rig)) == iommu.OK
    for _ in range(3):
        rig.machine.qmp.command("stop")
        rig.machine.qmp.command("cont")
        assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.INVAL
    assert rig.iommu.unmap(1, 0, (before << 12) - 1) == iommu.OK
    assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.OK
    rig.finish()


def test_nothing_is_served_while_paused(rig: Rig) -> None:
    """A request made while the machine stands still is answered when it goes on."""
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.machine.qmp.command("stop")
    rig.iommu.queue_request(iommu.map_(1, 0, 0xFFF, phys(rig)), iommu.TAIL)
    ring = rig.iommu.rings[iommu.REQUEST_QUEUE]
    ring.publish()
    # QEMU has waited for the daemon's answer to the stop: from there on the ring is its own.
    assert ring.take() is None
    rig.machine.qmp.command("cont")
    ring.kick()
    ring.wait()
    assert rig.iommu.map(1, 0, 0xFFF, phys(rig)) == iommu.INVAL
    rig.finish()


def test_memory_added_while_running(make_rig: MakeRig) -> None:
    """A DIMM that is plugged in can be mapped and can hold requests; before, its addresses were nobody's."""
    size = 128 << 20
    rig = make_rig("q35", ram="slots=2,maxmem=1G")
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.machine.qmp.command("object-add", qom_type="memory-backend-memfd", id="more", size=size, share=True)
    where = 0x1_0000_0000
    assert rig.iommu.map(1, 0, 0xFFF, where) == iommu.FAULT
    rig.machine.qmp.command("device_add", driver="pc-dimm", id="dimm", memdev="more", addr=where)
    assert rig.iommu.map(1, 0, 0xFFF, where) == iommu.OK
    assert rig.iommu.map(1, size, 2 * size - 1, where) == iommu.OK
    assert rig.iommu.map(1, 2 * size, 2 * size + 0xFFF, where + size) == iommu.FAULT
    rig.finish()


def test_requests_in_added_memory(make_rig: MakeRig) -> None:
    """Rings and requests may lie in memory that was plugged in after the daemon came up."""
    piece = Ram(0x1_0000_0000, 128 << 20)
    try:
        rig = make_rig("q35", ram="slots=2,maxmem=1G", pass_fds=(piece.fd,))
        rig.machine.qmp.command(
            "object-add",
            qom_type="memory-backend-file",
            id="more",
            size=piece.size,
            share=True,
            mem_path=f"/proc/self/fd/{piece.fd}",
        )
        rig.iommu.bring_up(SPLIT)
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
        rig.machine.qmp.command("device_add", driver="pc-dimm", id="dimm", memdev="more", addr=piece.gpa)
        rig.machine.memory.rams.insert(0, piece)
        rig.machine.memory.release(piece.gpa)
        assert rig.iommu.map(1, 0, 0xFFF, piece.gpa) == iommu.OK
        rig.iommu.bring_up(SPLIT)
        assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
        rig.machine.memory.rams.remove(piece)
        rig.finish()
    finally:
        piece.close()


def test_broken_ring_stops_until_reset(rig: Rig) -> None:
    """An impossible available index stops that ring, and only until the driver resets the device."""
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    ring = rig.iommu.rings[iommu.REQUEST_QUEUE]
    rig.machine.memory.store16(ring.avail + 2, 0x8000)
    ring.kick()
    assert rig.daemon.logged("ring-broken")["ring"] == "request"
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.iommu.close()
    assert rig.machine.qemu.quit() == 0
    assert rig.daemon.wait() == 0
    assert rig.daemon.logged("session-ended")["rings_broken"] == 1


def test_qemu_killed(rig: Rig) -> None:
    """The daemon ends by itself, well."""
    rig.iommu.bring_up(SPLIT)
    assert rig.iommu.attach(1, ENDPOINT) == iommu.OK
    rig.machine.qemu.process.kill()
    assert rig.daemon.wait() == 0


def test_qemu_that_refuses_its_command_line(make_rig: MakeRig) -> None:
    """Of the harness: that is an error at once, with QEMU's own words."""
    with pytest.raises(QemuError, match="no-such-device"):
        make_rig("virt", arguments=("-device", "no-such-device"))
