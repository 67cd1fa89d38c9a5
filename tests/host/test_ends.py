"""What is left in the host when something ends before its time: nothing."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest
from lab.machine import EDU
from vm.qemu import QemuError

from host.machine import MEMORY_MIB, HostGuest, Shape, bind, load, pinned_pages, start
from viommud.host import sysfs, uapi

SHAPE = Shape({"00:02.0": EDU[0]})


def qemu_pid(guest: HostGuest) -> int:
    """The process that viommud started."""
    ours = guest.qemu.process.pid
    stats = {path.parent.name: path.read_text() for path in Path("/proc").glob("[0-9]*/stat")}
    # pid (name) state parent ...
    (pid,) = [int(pid) for pid, stat in stats.items() if int(stat.rpartition(")")[2].split()[1]) == ours]
    return pid


def check_free(address: str) -> None:
    """Nobody holds the device, and no page is pinned for it."""
    assert pinned_pages() == 0
    path = sysfs.vfio_device(address)
    assert uapi.iova_ranges(str(path)).ranges, "it can be bound and attached by the next one"


@pytest.mark.parametrize("victim", ["qemu", "viommud"])
def test_sigkill_leaves_nothing(tmp_path: Path, victim: str) -> None:
    """Whichever of the two is killed, the other ends too, and the device and all memory are free."""
    with start(tmp_path, SHAPE) as guest:
        load(guest)
        guest.check("bind vfio-pci 0000:00:02.0")
        guest.check("edu_dma")
        assert pinned_pages() >= MEMORY_MIB << 20 >> 12
        qemu = qemu_pid(guest)
        child = os.pidfd_open(qemu)
        try:
            os.kill(qemu if victim == "qemu" else guest.qemu.process.pid, signal.SIGKILL)
            assert guest.qemu.wait() != 0
            assert select.select([child], [], [], 60.0)[0], "QEMU lives on without its IOMMU"
        finally:
            os.close(child)
    check_free(EDU[0])


def test_memory_beyond_the_limit_is_not_pinned(tmp_path: Path) -> None:
    """With too small a limit on locked memory QEMU itself cannot start, and says so; nothing is left."""
    limited = Shape(
        SHAPE.devices,
        prefix=("setpriv", "--bounding-set=-ipc_lock", "prlimit", f"--memlock={MEMORY_MIB << 19}"),
    )
    with pytest.raises(QemuError, match=r"Cannot allocate memory"), start(tmp_path, limited):
        pass
    check_free(EDU[0])


def test_a_map_beyond_the_limit_is_refused_and_the_rest_works(tmp_path: Path) -> None:
    """Guest memory from its files counts a second time: the limit is enough for QEMU and for little more."""
    limited = Shape(
        SHAPE.devices,
        '[host]\nmemory = "files"',
        prefix=("setpriv", "--bounding-set=-ipc_lock", "prlimit", f"--memlock={(MEMORY_MIB + 4) << 20}"),
    )
    with start(tmp_path, limited) as guest:
        load(guest)
        guest.check("bind vfio-pci 0000:00:02.0")
        # 6 MiB.  Linux 6.12 does not look at the status of a MAP, so that the program in the guest goes on.
        guest.run("vfio_map -n 1500 -r 1 0000:00:02.0", seconds=600)
        refused = {(line["request"], line["status"]) for line in guest.logged("request-refused")}
        assert refused == {("map", "nomem")}
        guest.check("edu_dma")
    check_free(EDU[0])


def test_the_device_can_be_had_again(tmp_path: Path) -> None:
    """Two guests after each other; in between the device is a normal device of the host."""
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        with start(directory, SHAPE) as guest:
            load(guest)
            assert guest.power_off() == 0
        bind(EDU[0], "vfio-pci")
        check_free(EDU[0])
