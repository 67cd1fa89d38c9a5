"""The lab's kernel: Debian's sources, an own configuration, a cross compiler.  No kernel of Debian has iommufd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from vm import archive
from vm.archive import Archive, ArchiveError
from vm.assets import host_architecture

from lab.cache import directory, entry, say

RELEASE = "trixie"
SOURCE = "linux-source-7.2"
"""A package of that release's backports."""
CONFIG = Path(__file__).with_name("kernel.config")

_TOOLS = ("make", "flex", "bison", "bc", "gcc")
_PROGRESS_EVERY = 250
"""Compiled files between two lines of progress."""


def image() -> Path:
    """The kernel as QEMU loads it; built when it is not there: 4 minutes on two processors, 3 GB for the time."""
    return entry("kernel", (SOURCE, CONFIG.read_bytes()), _build) / "Image"


def _build(target: Path) -> None:
    prefix = "" if host_architecture() == "arm64" else "aarch64-linux-gnu-"
    missing = [tool for tool in (*_TOOLS, f"{prefix}gcc") if shutil.which(tool) is None]
    if missing:
        raise ArchiveError(
            f"to build the kernel, {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            "apt-get install make flex bison bc gcc gcc-aarch64-linux-gnu"
        )
    tree = _sources(target)
    make = ["make", "-C", str(tree), "ARCH=arm64", f"CROSS_COMPILE={prefix}"]
    _run([*make, "-s", f"KCONFIG_ALLCONFIG={CONFIG}", "allnoconfig"])
    _check_config(tree / ".config")
    jobs = len(os.sched_getaffinity(0))
    say(f"compiling the kernel, {jobs} files at a time")
    log = directory() / "kernel.log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            ["nice", *make, f"-j{jobs}", "Image"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        compiled = 0
        for line in process.stdout:
            file.write(line)
            compiled += line.startswith("  CC ")
            if line.startswith("  CC ") and compiled % _PROGRESS_EVERY == 0:
                say(f"kernel: {compiled} files compiled")
    if process.returncode != 0:
        raise ArchiveError(f"the kernel cannot be built: see {log}")
    for name, inside in (("Image", "arch/arm64/boot/Image"), ("config", ".config")):
        shutil.copy(tree / inside, target / name)
    shutil.rmtree(tree)


def _sources(target: Path) -> Path:
    say(f"fetching {SOURCE} of {RELEASE}-backports: about 150 MB")
    with Archive(directory(), RELEASE, "arm64") as debian:
        archive.unpack(debian.download([SOURCE], backports=True), target)
    (packed,) = target.glob("usr/src/*.tar.xz")
    tree = target / "tree"
    tree.mkdir()
    _run(["tar", "-C", str(tree), "--strip-components=1", "-xf", str(packed)])
    shutil.rmtree(target / "usr")
    return tree


def _check_config(made: Path) -> None:
    """An option whose dependencies are not met is dropped without a word: find out now."""
    wanted = set(re.findall(r"^CONFIG_\w+=y$", CONFIG.read_text(), re.MULTILINE))
    lost = sorted(wanted - set(made.read_text().splitlines()))
    if lost:
        raise ArchiveError(f"{CONFIG}: {SOURCE} does not take {', '.join(lost)}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ArchiveError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()}")
