"""The lab's user space: packages of Debian, unpacked and not configured, so that no arm64 program runs here."""

from __future__ import annotations

import shutil
from pathlib import Path

from vm import archive
from vm.archive import Archive

from lab.cache import directory, entry, say

RELEASE = "trixie"
PACKAGES = ("python3", "bash", "coreutils", "util-linux", "mount", "libc-bin", "busybox-static", "pciutils", "hostname")
BACKPORTS = ("qemu-system-arm",)
PYTHON = "3.13"
"""Debian's in that release: what wheels are chosen for."""

_UNWANTED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt")


def root() -> Path:
    """The root directory; made when it is not there: about a minute."""
    return entry("userland", (RELEASE, *PACKAGES, *BACKPORTS, "merged-usr 1"), _make)


def _make(target: Path) -> None:
    for name in ("bin", "sbin", "lib"):  # as base-files and usrmerge leave them
        (target / "usr" / name).mkdir(parents=True)
        (target / name).symlink_to(f"usr/{name}")
    for name in ("dev", "proc", "sys", "tmp", "run", "root", "etc", "project", "cache", "site", "out", "opt"):
        (target / name).mkdir()
    say(f"fetching Debian {RELEASE} and QEMU for arm64: about 150 MB")
    with Archive(directory(), RELEASE, "arm64") as debian:
        packages = debian.download_with_dependencies(BACKPORTS, backports=True)
        have = {path.name.partition("_")[0] for path in packages}
        more = [path for path in debian.download_with_dependencies(PACKAGES) if path.name.partition("_")[0] not in have]
        say(f"unpacking {len(packages) + len(more)} packages")
        archive.unpack([*packages, *more], target)
    for name in _UNWANTED:
        shutil.rmtree(target / name, ignore_errors=True)
    (target / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    (target / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (target / "etc/hostname").write_text("lab\n")
