"""What guests are made of, fetched once into a cache: QEMU, Debian's kernels, busybox.

The cache is ${XDG_CACHE_HOME:-~/.cache}/viommud, or $VIOMMUD_CACHE.  An entry is made beside its place and renamed, so
that it is whole or absent; a lock keeps two runs from fetching the same.  To fetch anew, delete the entry.

    python -m vm.assets [NAME ...]      fetch; names are those of KERNELS, and "qemu"
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from vm import archive
from vm.archive import Archive, ArchiveError

Architecture = Literal["arm64", "amd64"]
"""Of a guest, by Debian's name."""

QEMU_RELEASE = "trixie"
QEMU_DEVICE = "vhost-user-test-device-pci"
QEMU_NEEDED = "10.2"
"""The first version with that device."""
_BINARIES: Mapping[Architecture, str] = MappingProxyType(
    {"arm64": "qemu-system-aarch64", "amd64": "qemu-system-x86_64"}
)
_HOSTS = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class KernelSource:
    """Where a kernel comes from."""

    architecture: Architecture
    release: str
    package: str
    """A metapackage, whose dependencies name the current kernel."""
    backports: bool = False


KERNELS: Mapping[str, KernelSource] = MappingProxyType(
    {
        "arm64": KernelSource("arm64", "trixie", "linux-image-cloud-arm64"),
        "arm64-6.1": KernelSource("arm64", "bookworm", "linux-image-cloud-arm64"),
        "arm64-backports": KernelSource("arm64", "trixie", "linux-image-cloud-arm64", backports=True),
        "arm64-16k": KernelSource("arm64", "trixie", "linux-image-arm64-16k"),
        "amd64": KernelSource("amd64", "trixie", "linux-image-cloud-amd64"),
        "amd64-6.1": KernelSource("amd64", "bookworm", "linux-image-cloud-amd64"),
        "amd64-backports": KernelSource("amd64", "trixie", "linux-image-cloud-amd64", backports=True),
    }
)
_UNWANTED_MODULES = (
    *("sound", "drivers/gpu", "drivers/infiniband", "drivers/isdn", "drivers/media", "drivers/net", "drivers/staging"),
    *(
        "drivers/bluetooth",
        "drivers/iio",
        "drivers/scsi",
        "drivers/usb",
        "net/bluetooth",
        "net/mac80211",
        "net/wireless",
    ),
)
"""Directories of a kernel's modules."""


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache."""

    architecture: Architecture
    release: str
    """As uname -r says."""
    image: Path
    modules: Path
    """Directory with modules.builtin and kernel/."""


@dataclass(frozen=True)
class Emulator:
    """A QEMU system emulator that can be run."""

    command: tuple[str, ...]
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of the caller's own."""


def host_architecture() -> str:
    """Debian's name of this machine's architecture.

    :raises ArchiveError: neither x86-64 nor arm64.
    """
    try:
        return _HOSTS[platform.machine()]
    except KeyError:
        raise ArchiveError(f"{platform.machine()}: guests run on x86-64 and arm64 machines") from None


def cache() -> Path:
    """The cache's directory."""
    own = os.environ.get("VIOMMUD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "viommud"


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(f"guests: {text}", file=sys.stderr, flush=True)


@contextmanager
def _lock(name: str) -> Iterator[None]:
    directory = cache() / "locks"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run fetches {name}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _entry(place: Path, make: Callable[[Path], None]) -> Path:
    """A directory of the cache, made by filling a temporary one when it is not there."""
    if not place.exists():
        with _lock(place.name):
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
                try:
                    make(temporary)
                    temporary.chmod(0o755)
                    temporary.rename(place)
                except BaseException:
                    shutil.rmtree(temporary, ignore_errors=True)
                    raise
    return place


def kernel(name: str = "arm64") -> Kernel:
    """A kernel of KERNELS, fetched when it is not there."""
    source = KERNELS[name]

    def make(directory: Path) -> None:
        say(f"fetching the kernel {source.package} of {source.release}{'-backports' * source.backports}")
        with Archive(cache(), source.release, source.architecture) as debian:
            needed = debian.dependencies(source.package, backports=source.backports)
            wanted = [name for name in needed if re.match(r"linux-(image|base|binary|modules)-\d", name)]
            archive.unpack(debian.download(wanted, backports=source.backports), directory)
        _prune(directory)
        say(f"have the kernel {_kernel_in(directory, source.architecture).release}")

    return _kernel_in(_entry(cache() / "kernels" / name, make), source.architecture)


def _prune(directory: Path) -> None:
    """Remove what no test guest has a use for: three quarters of a kernel for all machines."""
    shutil.rmtree(directory / "usr/share", ignore_errors=True)
    for modules in (*directory.glob("lib/modules/*/kernel"), *directory.glob("usr/lib/modules/*/kernel")):
        for unwanted in _UNWANTED_MODULES:
            shutil.rmtree(modules / unwanted, ignore_errors=True)


def _kernel_in(directory: Path, architecture: Architecture) -> Kernel:
    # Since 7.2 Debian has the kernel beside its modules.
    images = [*directory.glob("boot/vmlinuz-*"), *directory.glob("usr/lib/modules/*/vmlinuz")]
    if len(images) != 1:
        raise ArchiveError(f"{directory}: {len(images)} kernels, and one was expected; delete the directory to retry")
    name = images[0].name
    release = images[0].parent.name if name == "vmlinuz" else name.removeprefix("vmlinuz-")
    for parent in ("usr/lib/modules", "lib/modules"):
        modules = directory / parent / release
        if modules.is_dir():
            return Kernel(architecture, release, images[0], modules)
    raise ArchiveError(f"{directory}: no modules of {release}; delete the directory to retry")


def busybox(architecture: Architecture = "arm64") -> Path:
    """A static busybox for guests."""

    def make(directory: Path) -> None:
        say(f"fetching busybox for {architecture}")
        with Archive(cache(), QEMU_RELEASE, architecture) as debian:
            archive.unpack(debian.download(["busybox-static"]), directory)
        shutil.rmtree(directory / "usr/share", ignore_errors=True)

    place = _entry(cache() / f"busybox-{architecture}", make)
    return next(path for path in (place / "usr/bin/busybox", place / "bin/busybox") if path.exists())


def firmware() -> Path:
    """UEFI for guests of arm64, for QEMU's -bios."""

    def make(directory: Path) -> None:
        say("fetching UEFI for arm64")
        with Archive(cache(), QEMU_RELEASE, "arm64") as debian, tempfile.TemporaryDirectory(dir=cache()) as unpacked:
            archive.unpack(debian.download(["qemu-efi-aarch64"]), Path(unpacked))
            # The package has it in many forms, each filled up to 64 MiB.
            shutil.copy(Path(unpacked) / "usr/share/qemu-efi-aarch64/QEMU_EFI.fd", directory)

    return _entry(cache() / "uefi-arm64", make) / "QEMU_EFI.fd"


def emulator(architecture: Architecture = "arm64") -> Emulator:
    """A QEMU that has the generic vhost-user device: from PATH, or from the cache, fetched when it is not there."""
    found = _emulator_of_path(architecture)
    return found or _emulator_of_cache(_entry(cache() / "qemu", _fetch_qemu), architecture)


def _emulator_of_path(architecture: Architecture) -> Emulator | None:
    path = shutil.which(_BINARIES[architecture])
    if path is None:
        return None
    devices = subprocess.run([path, "-machine", "none", "-device", "help"], capture_output=True, text=True)
    if devices.returncode != 0 or f'"{QEMU_DEVICE}"' not in devices.stdout:
        say(f"{path} lacks the device {QEMU_DEVICE}: QEMU {QEMU_NEEDED} is needed")
        return None
    return Emulator((path,), _version((path,), {}))


def _fetch_qemu(directory: Path) -> None:
    architecture = host_architecture()
    say(f"fetching QEMU from {QEMU_RELEASE}-backports for {architecture}: about 50 MB")
    with Archive(cache(), QEMU_RELEASE, architecture) as debian:
        packages = debian.download_with_dependencies(["qemu-system-arm", "qemu-system-x86"], backports=True)
        say(f"unpacking {len(packages)} packages")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda part: archive.unpack(part, directory), (packages[::2], packages[1::2])))
    for unwanted in ("usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(directory / unwanted, ignore_errors=True)
    say(f"have QEMU {_emulator_of_cache(directory, 'arm64').version}")


def _emulator_of_cache(root: Path, architecture: Architecture) -> Emulator:
    """QEMU in a root of its own, with that root's dynamic linker and libraries: the machine's may be older."""
    triplet = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[host_architecture()]
    libraries = root / "usr/lib" / triplet
    (linker,) = libraries.glob("ld-linux-*.so.*")
    name = _BINARIES[architecture]
    command = (
        *(str(linker), "--library-path", str(libraries), "--argv0", name, str(root / "usr/bin" / name)),
        *("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")),
    )
    environment = {"QEMU_MODULE_DIR": str(libraries / "qemu")}
    return Emulator(command, _version(command, environment), environment)


def _version(command: Sequence[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run([*command, "-version"], capture_output=True, text=True, env={**os.environ, **environment})
    match = re.match(r"QEMU emulator version (\S+)", done.stdout)
    if done.returncode != 0 or match is None:
        raise ArchiveError(f"{' '.join(command)} cannot be run:\n{(done.stdout + done.stderr).strip()}")
    return match[1]


def fetch(names: Sequence[str]) -> None:
    """Fetch several things at once, side by side.

    :raises ArchiveError: one of them cannot be had, or has no such name.
    """
    jobs: list[Callable[[], object]] = []
    for name in names:
        if name == "qemu":
            jobs += [lambda: (emulator("arm64"), emulator("amd64"))]
        elif name in KERNELS:
            architecture = KERNELS[name].architecture
            jobs += [lambda name=name: kernel(name), lambda architecture=architecture: busybox(architecture)]  # type: ignore[misc]
        else:
            raise ArchiveError(f"unknown name {name!r}: qemu, {', '.join(KERNELS)}")
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


if __name__ == "__main__":
    try:
        fetch(sys.argv[1:] or ["qemu", "arm64"])
    except ArchiveError as error:
        sys.exit(f"guests: error: {error}")
