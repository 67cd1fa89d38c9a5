"""viommud and the tests' libraries, installed for the lab's Python by pip, from wheels.

The wheel of viommud is cross-built by the project's own build: the same CMake lists, another compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from vm.archive import ArchiveError
from vm.assets import host_architecture

from lab.cache import entry, say
from lab.userland import PYTHON

ROOT = Path(__file__).resolve().parents[2]
TESTS_NEED = ("pytest>=8.4", "pytest-timeout>=2.4", "pytest-trio>=0.8")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64")


def site() -> Path:
    """A directory for the lab's PYTHONPATH; viommud is installed in it as the sources are now."""
    sources = sorted(_sources())
    parts = [part for path in sources for part in (str(path.relative_to(ROOT)), path.read_bytes())]
    return entry("site", (PYTHON, *TESTS_NEED, *parts), _make)


def _sources() -> Iterator[Path]:
    yield ROOT / "pyproject.toml"
    yield from (ROOT / "csrc").glob("*.[ch]")
    yield ROOT / "csrc/CMakeLists.txt"
    yield from (path for path in (ROOT / "viommud").rglob("*") if path.suffix in (".py", ".pyi", ".typed"))


def _make(target: Path) -> None:
    say("building viommud for arm64 and installing it")
    with tempfile.TemporaryDirectory() as name:
        wheel = _wheel(Path(name))
        _pip("install", "--no-compile", "--target", str(target), *_for_lab(), f"{wheel}[host]", *TESTS_NEED)
    for script in (target / "bin").iterdir():
        first, _, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!") and b"python" in first:
            script.write_bytes(b"#!/usr/bin/python3\n" + rest)


def _wheel(directory: Path) -> Path:
    """Build in a copy: a build in the sources would use what is there for this machine."""
    copy = directory / "source"
    for path in (*_sources(), ROOT / "README.md", ROOT / "LICENSE"):
        place = copy / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    # The build's own requirements run here; pip would choose them for the platform named below.
    tools = directory / "tools"
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    _pip("install", "--target", str(tools), *requires)
    environment = {"PYTHONPATH": str(tools)}
    if host_architecture() != "arm64":
        environment |= {
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
            "CMAKE_ARGS": "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "
            "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc",
        }
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(directory))
    _pip("wheel", *options, str(copy), environment=environment)
    (wheel,) = directory.glob("*.whl")
    if not wheel.name.endswith("aarch64.whl"):
        raise ArchiveError(f"{wheel.name}: not for arm64")
    return wheel


def _for_lab() -> list[str]:
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    return [*platforms, "--python-version", PYTHON, "--implementation", "cp", "--only-binary", ":all:"]


def _pip(*arguments: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode != 0:
        raise ArchiveError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()}")
