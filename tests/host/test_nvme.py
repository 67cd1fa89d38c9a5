"""A disk of the host, driven by the guest's own driver, with DMA through the guest's mappings."""

from __future__ import annotations

from pathlib import Path

from lab.machine import EDU, NVME

from host.machine import HostGuest, Shape, load, start

DISK = "00:04.0"
SHAPE = Shape({DISK: NVME, "00:02.0": EDU[0]}, "[device]\nbypass = false")


def check_disk(guest: HostGuest, *, seed: int = 1, ops: int = 200) -> None:
    """Data written past the page cache comes back whole."""
    done = guest.check(f"block_io --area 4 --ops {ops} --seed {seed} check", seconds=600)
    assert "mismatches=0 errors=0" in done.output, done.output


def test_checksummed_io_and_again_after_a_reboot(tmp_path: Path) -> None:
    """The driver maps and unmaps for every transfer; nothing else reaches memory, since there is no bypass."""
    with start(tmp_path, SHAPE) as guest:
        load(guest)
        guest.check(f"bind nvme 0000:{DISK}")
        check_disk(guest)
        # The same as every guest does: the machine starts anew, the device is reset, viommud has the same front-end.
        guest.reboot()
        load(guest)
        guest.check(f"bind nvme 0000:{DISK}")
        check_disk(guest, seed=2)
        assert guest.power_off() == 0
        (ended,) = guest.logged("session-ended")
        assert set(ended["requests"]["map"]) == {"ok"}
        assert set(ended["requests"]["unmap"]) == {"ok"}
        assert ended["requests"]["map"]["ok"] > 400  # one for each transfer at least


def test_another_device_moves_under_io(tmp_path: Path) -> None:
    """While the disk works, another device goes through domains and back: no transfer is lost, none is misdirected."""
    with start(tmp_path, SHAPE) as guest:
        load(guest)
        guest.check(f"bind nvme 0000:{DISK}")
        guest.check("(block_io --area 4 --ops 400 check; echo status $?) > /tmp/io 2>&1 &")
        for _ in range(3):
            guest.check("bind vfio-pci 0000:00:02.0")
            guest.check("edu_dma")
        guest.check("until grep -q status /tmp/io; do sleep 0.1; done", seconds=600)
        output = guest.check("cat /tmp/io").output
        assert "mismatches=0 errors=0" in output, output
        assert "status 0" in output, output


def test_the_disk_itself_moves_between_domains(tmp_path: Path) -> None:
    """From its driver to the guest's VFIO and back, three times, with I/O in between."""
    with start(tmp_path, SHAPE) as guest:
        load(guest)
        for round_number in range(3):
            guest.check(f"bind nvme 0000:{DISK}")
            check_disk(guest, seed=round_number + 1, ops=50)
            guest.check(f"bind vfio-pci 0000:{DISK}")
            guest.check(f"vfio_map -n 10 -r 1 0000:{DISK}")  # a container is a domain of its own
        assert guest.power_off() == 0
        (ended,) = guest.logged("session-ended")
        assert set(ended["requests"]["attach"]) == {"ok"}
        assert ended["requests"]["attach"]["ok"] >= 6  # into the container's and back, each time


def test_removed_by_the_guest(tmp_path: Path) -> None:
    """The guest takes its disk out of the bus after using it: viommud goes on, and serves the other device."""
    with start(tmp_path, SHAPE) as guest:
        load(guest)
        guest.check(f"bind nvme 0000:{DISK}")
        check_disk(guest, ops=20)
        guest.check(f"echo 1 > /sys/bus/pci/devices/0000:{DISK}/remove")
        guest.check("bind vfio-pci 0000:00:02.0")
        guest.check("edu_dma")
        assert guest.power_off() == 0
