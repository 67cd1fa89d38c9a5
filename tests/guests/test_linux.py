"""A stock Linux guest, its own virtio_iommu driver, and VFIO in it."""

from __future__ import annotations

import re
from pathlib import Path

from frontend.ring import wait_until
from vm import backend, guest
from vm.guest import DEVICES, IOMMU, Guest, Shape

from guests.conftest import Boot

ALL = " ".join(f"0000:{where}" for where in DEVICES)
GROUPS = "/sys/kernel/iommu_groups"
TROUBLE = re.compile(r"error|fail|unhandled|warning|bug:|\bfault", re.IGNORECASE)


def prepare(linux: Guest) -> None:
    """Insert the drivers and give every device to vfio-pci."""
    linux.load()
    linux.check(f"bind vfio-pci {ALL}")


def hold_mappings(linux: Guest, pages: int) -> None:
    """Leave a program running that has mapped so many pages and keeps them."""
    linux.check(
        f"mkfifo /tmp/hold; vfio_map -n {pages} -r 1 -k {ALL} </tmp/hold >/tmp/held & exec 9>/tmp/hold;"
        " until grep -q mapped= /tmp/held; do usleep 10000; done"
    )


def assert_quiet(linux: Guest) -> None:
    """The guest's kernel has nothing bad to say about its IOMMU."""
    assert [line for line in linux.iommu_log() if TROUBLE.search(line)] == []


def test_driver_binds_and_attaches_every_endpoint(boot: Boot) -> None:
    """Each endpoint gets a group and a translated domain; the MSI window is the one of the configuration."""
    linux, daemon = boot()
    linux.load(["virtio-iommu"])
    driver = linux.check(f"readlink /sys/bus/pci/devices/0000:{IOMMU}/virtio*/driver").output
    assert driver.strip().endswith("/virtio_iommu")
    prepare(linux)
    assert linux.check(f"ls {GROUPS}").output.split() == ["0", "1"]
    assert linux.check(f"ls {GROUPS}/*/devices | grep :").output.split().count("0000:00:02.0") == 1
    assert linux.check(f"cat {GROUPS}/*/type").output.split() == ["DMA", "DMA"]
    windows = linux.check(f"cat {GROUPS}/*/reserved_regions").output.splitlines()
    assert windows == ["0x0000000008000000 0x00000000080fffff msi"] * 2
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert session["endpoints"] == list(DEVICES)
    assert session["requests"]["probe"] == {"ok": 2}
    assert session["rings_broken"] == 0


def test_vfio_maps_and_unmaps(boot: Boot) -> None:
    """Both functions in one container: one domain, and every page a MAP and an UNMAP that succeed."""
    pages, rounds = 500, 2
    linux, daemon = boot()
    prepare(linux)
    assert len(linux.check(f"vfio_map -n {pages} -r {rounds} {ALL}").results()) == rounds
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert {status for counts in session["requests"].values() for status in counts} == {"ok"}
    assert session["requests"]["map"]["ok"] >= pages * rounds
    assert session["requests"]["unmap"]["ok"] >= pages * rounds
    assert session["peak_mappings"] >= pages


def test_reboot_inside_qemu(boot: Boot) -> None:
    """The guest goes without unmapping anything; the next boot starts from nothing and works as the first."""
    pages = 300
    linux, daemon = boot()
    prepare(linux)
    for _ in range(3):
        hold_mappings(linux, pages)
        linux.reboot()
        prepare(linux)
    assert len(linux.check(f"vfio_map -n {pages} -r 1 {ALL}").results()) == 1
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert {status for counts in session["requests"].values() for status in counts} == {"ok"}
    # Had a reboot left mappings behind, they would add up.
    assert pages <= session["peak_mappings"] < 2 * pages


def test_system_reset_by_qemu(boot: Boot) -> None:
    """As a reset button does it: nobody asks the guest."""
    pages = 300
    linux, daemon = boot()
    prepare(linux)
    hold_mappings(linux, pages)
    linux.qemu.qmp.command("system_reset")
    linux.wait_ready()
    prepare(linux)
    linux.check(f"vfio_map -n {pages} -r 1 {ALL}")
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    assert pages <= daemon.logged("session-ended")["peak_mappings"] < 2 * pages


def test_pause_and_continue_keep_everything(boot: Boot) -> None:
    """Mappings that were there before a pause can be unmapped after it, and only once."""
    pages = 300
    linux, daemon = boot()
    prepare(linux)
    program = linux.begin(f"vfio_map -n {pages} -r 1 -k {ALL}")
    linux.wait_line("RESULT vfio_map mapped=")
    for _ in range(3):
        linux.qemu.qmp.command("stop")
        linux.qemu.qmp.command("cont")
    linux.send("\n")
    assert linux.finish(program).status == 0
    linux.check(f"vfio_map -n {pages} -r 1 {ALL}")
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert {status for counts in session["requests"].values() for status in counts} == {"ok"}


def test_pause_in_the_middle_of_work(boot: Boot) -> None:
    """Pauses at any moment of a busy guest lose and repeat nothing."""
    pages, rounds = 400, 4
    linux, daemon = boot()
    prepare(linux)
    program = linux.begin(f"vfio_map -n {pages} -r {rounds} {ALL}")
    for number in range(rounds):
        for _ in range(5):
            linux.qemu.qmp.command("stop")
            linux.qemu.qmp.command("cont")
        linux.wait_line(f"RESULT vfio_map round={number} ")
    assert linux.finish(program).status == 0
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert {status for counts in session["requests"].values() for status in counts} == {"ok"}


def test_guest_at_the_limit_is_refused_and_lives_on(boot: Boot) -> None:
    """Too many mappings: those beyond the limit are refused, and when there are fewer again, none is.

    What the guest's programs see is its driver's choice: that of Linux 6.12 batches MAP requests and does not look at
    their status.
    """
    limit, pages = 100, 300
    linux, daemon = boot(extra=f"[limits]\nmappings = {limit}\n")
    prepare(linux)
    linux.run(f"vfio_map -n {pages} -r 1 {ALL}")
    linux.check(f"vfio_map -n {limit // 2} -r 1 {ALL}")
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert session["peak_mappings"] == limit
    assert session["requests"]["map"]["nomem"] >= 1
    assert session["limit_hits"] == session["requests"]["map"]["nomem"] <= pages - limit + 1
    assert set(session["requests"]["map"]) == {"ok", "nomem"}


def test_raw_queue(boot: Boot) -> None:
    """A program without the driver: one request at a time and in batches, none refused."""
    linux, daemon = boot()
    for result in linux.check(f"raw_queue -n 500 -r 2 0000:{IOMMU} 0x10").results():
        assert result["bad"] == 0
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    # Two ways to do it, two rounds.
    assert daemon.logged("session-ended")["requests"]["map"] == {"ok": 2000}


def test_several_processors(boot: Boot) -> None:
    """Four processes on two processors at once, each with a device of its own or a share of it."""
    linux, daemon = boot(Shape(cpus=2))
    prepare(linux)
    both = " & ".join(f"vfio_map -n 300 -r 3 0000:{where}" for where in DEVICES)
    done = linux.check(f"{both} & wait")
    assert len(done.results()) == 6
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0
    session = daemon.logged("session-ended")
    assert {status for counts in session["requests"].values() for status in counts} == {"ok"}
    assert session["peak_domains"] >= 2


def test_x86_guest_with_acpi(boot: Boot) -> None:
    """A PC learns of the endpoints from VIOT; the doorbells of its MSIs are reserved."""
    linux, daemon = boot(Shape(kernel="amd64-backports", memory_mib=1024))
    prepare(linux)
    windows = linux.check(f"cat {GROUPS}/*/reserved_regions").output
    assert windows.count("0x00000000fee00000 0x00000000feefffff msi") == 2
    linux.check(f"vfio_map -n 200 -r 1 {ALL}")
    assert_quiet(linux)
    assert linux.power_off() == 0
    assert daemon.wait() == 0


def test_qemu_that_dies_takes_the_daemon_along(tmp_path: Path) -> None:
    """QEMU is killed in the middle of work: the daemon ends, with status 0, and says what was served."""
    shape = Shape()
    with backend.start(tmp_path, config=shape.config()) as daemon:
        with guest.start(tmp_path, shape, daemon.socket_path) as linux:
            prepare(linux)
            linux.begin(f"vfio_map -n 500 -r 1000 {ALL}")
            linux.wait_line("RESULT vfio_map round=1 ")
            linux.qemu.process.kill()
            assert daemon.wait() == 0
        wait_until(lambda: not daemon.socket_path.exists(), "the socket's end")
        assert daemon.logged("session-ended")["requests"]["map"]["ok"] >= 1000
