"""Kernel modules: what one needs, in the order in which they can be loaded."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

from vm.assets import Kernel

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class ModuleError(Exception):
    """A kernel lacks a module."""


class Modules:
    """The modules of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._files = {_name(path.name): path for path in (kernel.modules / "kernel").rglob("*.ko*")}
        listing = (kernel.modules / "modules.builtin").read_text().splitlines()
        self._builtin = {_name(Path(line).name) for line in listing}

    def closure(self, wanted: Iterable[str]) -> dict[str, bytes]:
        """Modules and all that they depend on, each after what it needs, uncompressed; built-in ones are left out.

        :raises ModuleError: one is neither a module nor built in.
        """
        ordered: dict[str, bytes] = {}
        for name in wanted:
            self._add(_name(name), ordered)
        return ordered

    def has(self, name: str) -> bool:
        """Whether the kernel has a module, built in or not."""
        return _name(name) in self._builtin or _name(name) in self._files

    def _add(self, name: str, ordered: dict[str, bytes]) -> None:
        if name in ordered or name in self._builtin:
            return
        if name not in self._files:
            raise ModuleError(f"Linux {self._kernel.release} has no module {name}")
        path = self._files[name]
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        found = _DEPENDS.search(content)
        for needed in found[1].decode().split(",") if found else ():
            if needed:
                self._add(_name(needed), ordered)
        ordered[name] = content


def _name(file: str) -> str:
    """As the kernel names a module: vfio-pci.ko.xz is vfio_pci."""
    return file.partition(".ko")[0].replace("-", "_")
