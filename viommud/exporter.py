"""Metrics for who wants them: on a UNIX socket over HTTP, and as a file for node_exporter."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import trio
from structlog.typing import FilteringBoundLogger

from viommud.control.subject import Subject
from viommud.log import RateLimiter
from viommud.metrics import render
from viommud.peer import accept, peer_credentials

CONNECTIONS_MAX = 8
REQUEST_MAX = 8 << 10
"""Bytes of a request's head."""
SECONDS = 10.0
"""For one connection, from its beginning to its end."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Exporter:
    """Answers every HTTP request on a socket with the metrics, whatever it asks for."""

    subject: Subject
    log: FilteringBoundLogger
    seconds: float = SECONDS
    _limiter: RateLimiter = field(default_factory=RateLimiter)
    _connections: int = 0

    async def run(self, listener: trio.socket.SocketType) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                sock = await accept(listener, lambda reason: self._limited("cannot-accept", reason=reason))
                if self._connections >= CONNECTIONS_MAX:
                    self._limited("metrics-connection-refused", **peer_credentials(sock))
                    sock.close()
                    continue
                self._connections += 1
                nursery.start_soon(self._answer, sock)

    def _limited(self, event: str, **fields: object) -> None:
        extra = self._limiter.admit(event)
        if extra is not None:
            self.log.warning(event, **fields, **extra)

    async def _answer(self, sock: trio.socket.SocketType) -> None:
        try:
            with sock, trio.move_on_after(self.seconds):
                request = b""
                while b"\r\n\r\n" not in request and b"\n\n" not in request:
                    data = await sock.recv(REQUEST_MAX)
                    request += data
                    if not data or len(request) > REQUEST_MAX:
                        return
                body = render(self.subject).encode()
                head = f"HTTP/1.0 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
                answer = memoryview(head.encode() + body)
                while answer:
                    answer = answer[await sock.send(answer) :]
        except OSError:
            pass  # the client has gone
        finally:
            self._connections -= 1


async def write_textfile(subject: Subject, path: Path, seconds: float, log: FilteringBoundLogger) -> None:
    """Write the metrics to a file, again and again; a reader sees the old ones or the new ones, never a part."""
    limiter = RateLimiter()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        while True:
            text = render(subject)
            try:
                await trio.to_thread.run_sync(_replace, temporary, path, text)
            except OSError as error:
                extra = limiter.admit("textfile")
                if extra is not None:
                    log.warning("metrics-textfile-failed", path=str(path), reason=error.strerror, **extra)
            await trio.sleep(seconds)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path, text: str) -> None:
    temporary.write_text(text, "utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)
