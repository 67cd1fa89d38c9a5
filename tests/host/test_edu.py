"""What a device of the host can reach is what the guest has mapped for it, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.machine import EDU

from host.machine import MEMORY_MIB, Shape, load, pinned_pages, start

CHECKS = ("mapped", "read_only", "never_mapped", "unmapped", "mapped_again", "detached")


@pytest.mark.parametrize("memory", ["monitor", "files"])
def test_dma_is_bound_by_the_guests_mappings(tmp_path: Path, memory: str) -> None:
    """Mapped memory is written; read-only, unmapped and detached memory is not, whichever way memory comes."""
    # Nothing may be reached without a domain: the last check is made after the guest's VFIO has let go of the device.
    config = f'[device]\nbypass = false\n[host]\nmemory = "{memory}"'
    with start(tmp_path, Shape({"00:02.0": EDU[0]}, config)) as guest:
        load(guest)
        guest.check("bind vfio-pci 0000:00:02.0")
        done = guest.check("edu_dma")
        for check in CHECKS:
            assert {f"{check}0": 1.0} in done.results(), done.output
        (taken,) = guest.logged("host-memory")
        assert (taken["source"], taken["bytes"]) == (memory, MEMORY_MIB << 20)
        assert guest.power_off() == 0
    assert pinned_pages() == 0


def test_two_devices_in_one_domain(tmp_path: Path) -> None:
    """One container of the guest's VFIO is one domain: each device reaches the other's pages, and both lose them."""
    config = "[device]\nbypass = false"
    with start(tmp_path, Shape({"00:02.0": EDU[0], "00:03.0": EDU[1]}, config)) as guest:
        load(guest)
        guest.check("bind vfio-pci 0000:00:02.0 0000:00:03.0")
        done = guest.check("edu_dma 0000:00:02.0 0000:00:03.0")
        for check in CHECKS:
            for device in (0, 1):
                assert {f"{check}{device}": 1.0} in done.results(), done.output
        assert guest.power_off() == 0
