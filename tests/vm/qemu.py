"""A QEMU process: its control channel, what it says, and its end."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from vm.assets import Emulator
from vm.qmp import Qmp, QmpError

PATIENCE = 120.0
"""Seconds for anything that takes one; only something broken meets it."""


class QemuError(Exception):
    """QEMU did not do what it should; the message has what it said."""


def wait_for_socket(path: Path, seconds: float = PATIENCE) -> None:
    """Wait until a back-end has made its socket, since QEMU does not.

    :raises QemuError: it has not in time.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise QemuError(f"the back-end did not make its socket {path} within {seconds:g} s")
        time.sleep(0.005)


class Qemu:
    """A running QEMU.  It ends with the `with` block, and with the thread that started it."""

    def __init__(
        self,
        emulator: Emulator,
        arguments: Sequence[str],
        directory: Path,
        *,
        sockets: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start it.

        :param arguments: besides what this class brings: no display, no default devices, a control channel.
        :param directory: for the log and nothing else.
        :param sockets: names of chardevs; each is connected to this process: see :meth:`channel`.
        :param pass_fds: descriptors that QEMU inherits under the same numbers.
        """
        self.log = directory / "qemu.log"
        self._stack = ExitStack()
        with ExitStack() as theirs, self._stack:
            self._channels: dict[str, socket.socket] = {}
            inherited = list(pass_fds)
            options: list[str] = []
            for name in ("qmp", *sockets):
                # A pair and not a path: no path is too long, and nobody waits for it to appear.
                ours, other = socket.socketpair()
                self._channels[name] = self._stack.enter_context(ours)
                theirs.enter_context(other)
                inherited.append(other.fileno())
                options += ["-chardev", f"socket,id={name},fd={other.fileno()}"]
            self.command = (
                # Linux ends QEMU when this process cannot.
                *("setpriv", "--pdeathsig", "KILL"),
                *emulator.command,
                *("-display", "none", "-nodefaults", "-no-user-config"),
                *options,
                *("-qmp", "chardev:qmp"),
                *arguments,
            )
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **emulator.environment},
                    pass_fds=inherited,
                )
            self._stack.callback(self._kill)
            theirs.close()
            try:
                self.qmp = Qmp(self._channels["qmp"], PATIENCE)
            except QmpError as error:
                raise self.error(f"QEMU did not start: {error}") from error
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU at once and close every channel."""
        self._stack.close()

    def _kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def channel(self, name: str) -> socket.socket:
        """This process's end of a chardev; it is closed with QEMU."""
        return self._channels[name]

    def wait(self) -> int:
        """Wait for QEMU to end by itself; its exit status.

        :raises QemuError: it does not.
        """
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise self.error(f"QEMU did not end within {PATIENCE:g} s") from None

    def quit(self) -> int:
        """Ask QEMU to end; its exit status."""
        with suppress(QmpError):
            self.qmp.command("quit")
        return self.wait()

    def error(self, text: str) -> QemuError:
        """An error with what QEMU said."""
        status = self.process.poll()
        ended = "" if status is None else f"; QEMU ended with status {status}"
        said = self.log.read_text(errors="replace").strip()
        return QemuError(f"{text}{ended}" + (f"\n--- QEMU\n{said}" if said else ""))
