"""A varlink client: one connection, one call after another."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from viommud.errors import UsageError, ViommudError

SECONDS = 30.0
"""To wait for an answer that is due."""
MONITOR = "org.viommud.Monitor"
STEER = "org.viommud.Steer"
DIRECTORY = Path("/run/viommud")


class CallFailed(ViommudError):  # noqa: N818 - the name is read in sentences
    """The daemon answered with an error."""

    def __init__(self, error: str, parameters: dict[str, Any]) -> None:
        self.error = error
        self.parameters = parameters
        super().__init__(_sentence(error.rpartition(".")[2], parameters), hint=parameters.get("hint"))


def _sentence(name: str, parameters: dict[str, Any]) -> str:
    match name:
        case "NoSuchDomain":
            return f"there is no domain {parameters.get('domain')}"
        case "NoSuchEndpoint":
            return f"there is no endpoint {parameters.get('endpoint')}"
        case "WorkerStuck":
            return "the worker of the daemon has made no progress for a second"
        case "NotNow":
            return "one virtual machine has gone, and the next one is not there yet"
        case "InjectionNotAllowed":
            return "injection is not allowed"
        case "TooManyInjections":
            return f"{parameters.get('max')} injections are armed, and no more can be"
        case "RecordingAlready":
            return "somebody records already"
        case "InterfaceNotFound":
            return "this socket is for looking only; steering needs the steering socket"
        case "InvalidParameter":
            return f"the daemon does not accept {parameters.get('parameter')}"
        case _:
            return f"the daemon answered {name} {json.dumps(parameters)}"


class Client:
    """A connection to a control socket."""

    def __init__(self, path: Path, *, seconds: float = SECONDS) -> None:
        """:raises UsageError: nobody is there."""
        self._seconds = seconds
        self._buffer = b""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(seconds)
        try:
            self._sock.connect(os.fspath(path))
        except OSError as error:
            self._sock.close()
            hint = "is viommud running with this socket?"
            raise UsageError(f"{path}: {error.strerror or error}", hint=hint) from error

    def close(self) -> None:
        """Close it; a stream ends with it."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One call and its answer; parameters that are None are left out.

        :raises CallFailed: the daemon answered with an error.
        :raises ViommudError: it did not answer.
        """
        self._send(method, parameters, more=False)
        answer: dict[str, Any] = self._receive()["parameters"]
        return answer

    def stream(self, method: str, **parameters: object) -> Iterator[dict[str, Any]]:
        """A call that is answered again and again, for as long as it takes.

        :raises CallFailed, ViommudError: as for call().
        """
        self._send(method, parameters, more=True)
        self._sock.settimeout(None)
        while True:
            reply = self._receive()
            yield reply["parameters"]
            if not reply.get("continues"):
                self._sock.settimeout(self._seconds)
                return

    def _send(self, method: str, parameters: dict[str, object], *, more: bool) -> None:
        given = {name: value for name, value in parameters.items() if value is not None}
        call: dict[str, object] = {"method": method, "parameters": given}
        if more:
            call["more"] = True
        try:
            self._sock.sendall(json.dumps(call).encode() + b"\0")
        except OSError as error:
            raise ViommudError(f"the daemon is gone: {error.strerror}") from error

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError:
                raise ViommudError(f"the daemon has not answered for {self._seconds:g} seconds") from None
            except OSError as error:
                raise ViommudError(f"the daemon is gone: {error.strerror}") from error
            if not data:
                raise ViommudError("the daemon closed the connection")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        if "error" in reply:
            raise CallFailed(reply["error"], reply.get("parameters", {}))
        return reply


def find_socket(given: Path | None, vm: str | None, *, steering: bool) -> Path:
    """The socket that is meant: one that is named, that of a VM, or that of the only one there is.

    :raises UsageError: it is not clear.
    """
    if given is not None:
        return given
    suffix = ".steer" if steering else ".monitor"
    if vm is not None:
        return DIRECTORY / f"{vm}{suffix}"
    found = sorted(DIRECTORY.glob(f"*{suffix}"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.name.removesuffix(suffix) for path in found)
    raise UsageError(
        f"which VM? --vm NAME, or --socket PATH ({DIRECTORY} has {names or 'none'})",
    )


def pages(client: Client, method: str, key: str, **parameters: object) -> Iterator[dict[str, Any]]:
    """Everything of a listing, fetched page by page."""
    start: object = None
    while True:
        reply = client.call(method, **{"from": start}, **parameters)
        yield from reply[key]
        start = reply.get("next")
        if start is None:
            return
