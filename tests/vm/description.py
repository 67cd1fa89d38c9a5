"""The device tree of a guest behind viommud: QEMU's own, and in it the IOMMU by `viommud topology dt`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vm.assets import Emulator
from vm.qemu import QemuError


def dump(emulator: Emulator, machine: str, arguments: Sequence[str], target: Path) -> None:
    """Write the tree that QEMU makes for a machine.

    :param machine: value of -machine; it, the processor, memory and serial lines must be those of the later run.
    :raises QemuError: with what QEMU said.
    """
    command = [
        *(*emulator.command, "-machine", f"{machine},dumpdtb={target}"),
        *("-display", "none", "-nodefaults", "-no-user-config"),
        *arguments,
    ]
    _run(command, dict(emulator.environment))


def add_iommu(config: Path, base: Path, target: Path) -> None:
    """Write the tree with the IOMMU and the endpoints of a configuration of viommud.

    :raises QemuError: with what viommud said.
    """
    command = [sys.executable, "-m", "viommud", "topology", "dt"]
    _run([*command, "--config", str(config), "--base", str(base), "--output", str(target)], {})


def write_viot(config: Path, target: Path) -> None:
    """Write the ACPI table VIOT for the endpoints of a configuration of viommud.

    :raises QemuError: with what viommud said.
    """
    command = [sys.executable, "-m", "viommud", "topology", "viot"]
    _run([*command, "--config", str(config), "--output", str(target)], {})


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise QemuError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()}")
