"""Debian packages without installing them: an apt with a state of its own, no root needed.

Where the archive is, and how to reach it, is what the machine's own apt is configured for.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RELEASE = re.compile(r"bookworm|trixie|forky|sid|stable|oldstable|testing|unstable")


class ArchiveError(Exception):
    """Packages cannot be had; the message says what to do."""


def mirror() -> str:
    """URI of the Debian archive that this machine uses.

    :raises ArchiveError: apt is not configured for one.
    """
    listing = _output(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
    for line in listing.splitlines():
        uri, _, release = line.partition(" ")
        if _RELEASE.fullmatch(release):
            return uri
    raise ArchiveError("this machine's apt has no Debian archive: look at /etc/apt/sources.list and sources.list.d")


class Archive:
    """A release of Debian and its backports, for one architecture; a context manager around a temporary apt."""

    def __init__(self, directory: Path, release: str, architecture: str) -> None:
        """Nothing is fetched yet.

        :param directory: where to put the temporary files; some 100 MB.
        :param release: as "trixie".
        :param architecture: as Debian names it: "amd64", "arm64".
        """
        self.release = release
        self.architecture = architecture
        self._directory = directory
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._stack:
            temporary = tempfile.TemporaryDirectory(prefix="apt-", dir=self._directory)
            self._root = Path(self._stack.enter_context(temporary))
            self._configure()
            self._run("apt-get", "update")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _configure(self) -> None:
        root = self._root
        for name in ("state/lists/partial", "cache/archives/partial", "parts", "downloads"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        suites = (self.release,) if self.release == "sid" else (self.release, f"{self.release}-backports")
        where = mirror()
        sources = "".join(f"deb [signed-by={KEYRING}] {where} {suite} main\n" for suite in suites)
        (root / "sources.list").write_text(sources)
        # Proxies, certificates and the like; nothing else of the machine's configuration, which may run hooks.
        acquire = [line for line in _output(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::")]
        (root / "apt.conf").write_text(
            "\n".join(
                [
                    *acquire,
                    f'Dir::State "{root}/state";',
                    f'Dir::State::status "{root}/status";',
                    f'Dir::Cache "{root}/cache";',
                    f'Dir::Etc::sourcelist "{root}/sources.list";',
                    'Dir::Etc::sourceparts "/dev/null";',
                    f'Dir::Etc::parts "{root}/parts";',
                    'Dir::Etc::main "/dev/null";',
                    'Dir::Etc::preferences "/dev/null";',
                    'Dir::Etc::preferencesparts "/dev/null";',
                    f'APT::Architecture "{self.architecture}";',
                    f'APT::Architectures {{ "{self.architecture}"; }};',
                    'APT::Sandbox::User "";',
                    'APT::Install-Recommends "false";',
                    'Acquire::Languages "none";',
                    'Acquire::Retries "3";',
                    "",
                ]
            )
        )

    def _run(self, *command: str, backports: bool = False) -> str:
        program, *rest = command
        options = ["-o", f"APT::Default-Release={self.release}-backports"] if backports else []
        environment = {**os.environ, "APT_CONFIG": str(self._root / "apt.conf"), "LC_ALL": "C.UTF-8"}
        return _output([program, *options, *rest], cwd=self._root / "downloads", env=environment)

    def download_with_dependencies(self, packages: Sequence[str], *, backports: bool = False) -> list[Path]:
        """Packages and all they need, as on a machine where nothing is installed; recommended ones stay out."""
        self._run("apt-get", "install", "--download-only", "--yes", *packages, backports=backports)
        return sorted((self._root / "cache/archives").glob("*.deb"))

    def download(self, packages: Sequence[str], *, backports: bool = False) -> list[Path]:
        """Just these packages."""
        before = set((self._root / "downloads").iterdir())
        self._run("apt-get", "download", *packages, backports=backports)
        return sorted(set((self._root / "downloads").iterdir()) - before)

    def dependencies(self, package: str, *, backports: bool = False) -> list[str]:
        """A package and all it depends on, directly or not, by name."""
        only = ("--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances")
        listing = self._run("apt-cache", "depends", "--recurse", *only, package, backports=backports)
        return [line for line in listing.splitlines() if line and line[0] not in " <"]


def unpack(packages: Sequence[Path], target: Path) -> None:
    """Unpack packages over each other; no scripts of theirs run."""
    for package in packages:
        _output(["dpkg-deb", "--extract", str(package), str(target)])


def version(package: Path) -> str:
    """Version of a package file."""
    return _output(["dpkg-deb", "--field", str(package), "Version"]).strip()


def _output(command: Sequence[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ArchiveError(f"{command[0]} is missing: this needs a Debian system") from error
    if done.returncode != 0:
        raise ArchiveError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr).strip()}")
    return done.stdout
