"""The guest's own programs, in tests/guest, compiled for the guest when their sources changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from vm.assets import Architecture, host_architecture

SOURCES = Path(__file__).resolve().parents[1] / "guest"
BUILD = SOURCES.parents[1] / "build" / "guest"
_PREFIXES: dict[Architecture, str] = {"arm64": "aarch64-linux-gnu-", "amd64": "x86_64-linux-gnu-"}
_FLAGS = ("-std=c11", "-O2", "-static", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")


class BuildError(Exception):
    """A program cannot be built; the message says why."""


def compiler(architecture: Architecture) -> str:
    """The C compiler for a guest.

    :raises BuildError: there is none.
    """
    name = "gcc" if architecture == host_architecture() else f"{_PREFIXES[architecture]}gcc"
    found = shutil.which(name)
    if found is None:
        raise BuildError(f"{name} is missing: scripts/setup installs it")
    return found


def program(name: str, architecture: Architecture = "arm64") -> Path:
    """A static program for a guest, built from the sources as they are now.

    :raises BuildError: with what the compiler said.
    """
    gcc = compiler(architecture)
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256("\0".join([gcc, *_FLAGS]).encode())
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.read_bytes())
    built = BUILD / architecture / f"{name}-{digest.hexdigest()[:16]}"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=built.parent)
        os.close(descriptor)
        done = subprocess.run([gcc, *_FLAGS, "-o", temporary, str(source)], capture_output=True, text=True)
        if done.returncode != 0:
            os.unlink(temporary)
            raise BuildError(f"{source} cannot be compiled:\n{done.stderr}")
        for old in built.parent.glob(f"{name}-*"):
            old.unlink(missing_ok=True)
        os.rename(temporary, built)
    return built
