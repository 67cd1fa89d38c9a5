"""Ask a running QEMU a few questions over its machine protocol (QEMU docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import socket
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from viommud.qmp import Message, QmpError, QmpLines
from viommud.topology.errors import TopologyError

_SECONDS = 10.0


class Qmp:
    """A connection; a context manager."""

    def __init__(self, path: Path) -> None:
        """Connect and leave negotiation mode.

        :raises TopologyError: nobody answers there, or not as QEMU does.
        """
        self._path = path
        self._lines = QmpLines()
        self._received: deque[Message] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_SECONDS)
            try:
                self._socket.connect(str(path))
            except OSError as error:
                raise TopologyError(f"{path}: no QMP server answers: {error.strerror or error}") from error
            if "QMP" not in self._receive():
                raise TopologyError(f"{path}: whoever answers there does not speak QMP")
            self.ask("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> Any:
        """What the command returns.

        :raises TopologyError: QEMU refuses it or does not answer.
        """
        try:
            self._socket.sendall(self._lines.command(command, arguments))
        except OSError as error:
            raise TopologyError(f"{self._path}: QMP: {error.strerror or error}") from error
        while True:
            answer = self._receive()
            if "error" in answer:
                raise TopologyError(f"{self._path}: QEMU refuses {command}: {answer['error']}")
            if "return" in answer:
                return answer["return"]
            # Anything else is an event.

    def _receive(self) -> Message:
        while not self._received:
            try:
                more = self._socket.recv(1 << 16)
            except OSError as error:
                raise TopologyError(f"{self._path}: QMP: {error.strerror or error}") from error
            if not more:
                raise TopologyError(f"{self._path}: QMP: the answer ends in the middle")
            try:
                self._received += self._lines.receive(more)
            except QmpError as error:
                raise TopologyError(f"{self._path}: QMP: {error}") from error
        return self._received.popleft()
