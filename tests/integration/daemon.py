"""viommud as a user runs it: a process, its socket, its log, its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from frontend.client import Client
from frontend.guest import Guest
from frontend.ring import wait_until

COMMAND = [sys.executable, "-m", "viommud"]
EXIT_SECONDS = 30.0
"""For a process that will never exit; where a second is the rule, a test says so."""

LogLine = dict[str, Any]


class Daemon:
    """A running viommud that listens on a socket in a directory of the test."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        config: str | None = None,
        environ: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        own_socket: bool = True,
    ) -> None:
        self.socket_path = directory / "vhost.sock"
        self._log_path = directory / "log"
        command = [*COMMAND, "--log-format", "json", *options]
        if own_socket:
            command += ["--socket-path", str(self.socket_path)]
        if config is not None:
            path = directory / "vm.toml"
            path.write_text(config)
            command += ["--config", str(path)]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **(environ or {})},
                pass_fds=pass_fds,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def connect(self) -> Client:
        """A front-end's connection, as soon as the socket is there."""
        wait_until(lambda: self.socket_path.exists() or self.process.poll() is not None, "a socket")
        assert self.process.poll() is None, self.log_text
        return Client.connect(str(self.socket_path))

    def guest(self, **options: Any) -> Guest:
        """A guest behind such a connection."""
        return Guest(self.connect(), **options)

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for it to end by itself; its exit status."""
        return self.process.wait(EXIT_SECONDS)

    @property
    def log_text(self) -> str:
        """Everything it wrote to standard error."""
        return self._log_path.read_text()

    def log(self, event: str | None = None) -> list[LogLine]:
        """What it logged, or the lines of one event."""
        # The last line may be half written.
        lines = [json.loads(line) for line in self.log_text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in lines if event in (None, line["event"])]

    def logged(self, event: str, matching: Callable[[LogLine], bool] = lambda _: True) -> LogLine:
        """Wait for a line of an event."""
        found: list[LogLine] = []

        def look() -> bool:
            found.extend(line for line in self.log(event) if matching(line))
            return bool(found)

        wait_until(look, f"a line {event!r} in the log")
        return found[0]

    def open_descriptors(self) -> list[str]:
        """What its open descriptors refer to, in order."""
        directory = f"/proc/{self.process.pid}/fd"
        found = []
        for name in os.listdir(directory):
            try:
                found.append(os.readlink(f"{directory}/{name}"))
            except FileNotFoundError:
                continue
        # Numbers of sockets differ from connection to connection.
        return sorted(entry.split(":[")[0] for entry in found)

    def guest_mappings(self) -> list[str]:
        """Lines of its memory map that are a guest's memory."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        return [line for line in maps.splitlines() if "memfd:" in line]

    def status(self, key: str) -> int:
        """A number of /proc/PID/status; sizes in KiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0])
        raise KeyError(key)
