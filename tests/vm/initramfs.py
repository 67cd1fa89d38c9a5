"""Initial RAM disks: an archive in the format "newc".

Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from vm.assets import Kernel, busybox
from vm.modules import Modules
from vm.programs import SOURCES, program

_MAGIC = b"070701"


class Cpio:
    """An archive in the making; directories come by themselves."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._directories: set[PurePosixPath] = set()

    def add(self, path: str, content: bytes, permissions: int = 0o644) -> None:
        """Add a file."""
        where = PurePosixPath(path)
        for parent in [*reversed(where.parents)][1:]:
            if parent not in self._directories:
                self._directories.add(parent)
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")
        self._entry(str(where), stat.S_IFREG | permissions, content)

    def add_directory(self, path: str) -> None:
        """Add an empty directory."""
        self._directories.add(PurePosixPath(path))
        self._entry(path, stat.S_IFDIR | 0o755, b"")

    def add_console(self) -> None:
        """Add /dev/console, which the kernel opens for init before anything is mounted."""
        self.add_directory("dev")
        self._entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))

    def _entry(self, name: str, mode: int, content: bytes, *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        user, group, links, time, major, minor, check = 0, 0, 1, 0, 0, 0, 0
        numbers = (
            *(self._inode, mode, user, group, links, time, len(content)),
            *(major, minor, *device, len(encoded), check),
        )
        head = _MAGIC + b"".join(b"%08X" % number for number in numbers) + encoded
        self._parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


def make(
    kernel: Kernel, modules: Iterable[str], programs: Iterable[str], files: Iterable[tuple[str, Path]] = ()
) -> bytes:
    """The RAM disk of a test guest: busybox, tests/guest/init, programs in /bin, modules in /modules.

    :param modules: to be had in the guest, loaded or not; what they need comes with them.
    :param programs: names of programs in tests/guest.
    :param files: further ones: path in the guest and path here; permissions are kept.
    """
    archive = Cpio()
    archive.add_console()
    for empty in ("proc", "sys", "tmp"):
        archive.add_directory(empty)
    archive.add("init", (SOURCES / "init").read_bytes(), 0o755)
    archive.add("bin/busybox", busybox(kernel.architecture).read_bytes(), 0o755)
    for name in programs:
        archive.add(f"bin/{name}", program(name, kernel.architecture).read_bytes(), 0o755)
    known = Modules(kernel)
    order = {}
    for module in modules:
        closure = known.closure([module])
        for name, content in closure.items():
            if name not in order:
                order[name] = " ".join(known.closure([name]))
                archive.add(f"modules/{name}.ko", content)
    archive.add("modules/order", "".join(f"{name} {needs}\n" for name, needs in order.items()).encode())
    for inside, path in files:
        archive.add(inside, path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
    return archive.finish()
