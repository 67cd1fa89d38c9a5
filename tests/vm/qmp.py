"""QEMU's machine protocol over a connected socket: one command at a time, events kept until somebody asks."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class QmpError(Exception):
    """QEMU refused a command, or is gone."""


class Qmp:
    """A control connection; close() it."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        """Greet.

        :param seconds: patience for every answer.
        """
        self._socket = connection
        self._seconds = seconds
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self._receive(time.monotonic() + seconds)
        self.command("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def command(self, name: str, **arguments: Any) -> Any:
        """What a command returns; underscores in arguments' names are hyphens.

        :raises QmpError: with QEMU's words.
        """
        request = {"execute": name, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        deadline = time.monotonic() + self._seconds
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{name}: QEMU is gone: {error}") from error
        while True:
            message = self._receive(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{name}: {message['error']['desc']}")
            self._events.append(message)

    def event(self, name: str) -> dict[str, Any]:
        """Data of the next event of a name, whether it has come already or not."""
        deadline = time.monotonic() + self._seconds
        while True:
            for position, message in enumerate(self._events):
                if message["event"] == name:
                    data: dict[str, Any] = self._events.pop(position).get("data", {})
                    return data
            self._events.append(self._receive(deadline))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise QmpError(f"QEMU is silent for {self._seconds:g} s") from None
            except ConnectionResetError:
                data = b""
            if not data:
                raise QmpError("QEMU hung up")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message
