"""QEMU's machine protocol, as much of it as is needed here (QEMU docs/interop/qmp-spec.rst).

`QmpLines` is the protocol without a socket: bytes in, messages out.  `watch_resets` is what the daemon does with it: a
vhost-user back-end cannot tell a reset of the machine from one of the device, and QEMU's RESET event can.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio
from structlog.typing import FilteringBoundLogger

from viommud.log import RateLimiter

MAX_LINE = 16 << 20
"""Bytes; an answer of QEMU about everything it has is far shorter."""
RETRY_SECONDS = 0.5
"""Between two attempts to reach QEMU, which makes its socket at a time of its own."""
ANSWER_SECONDS = 10.0

Message = dict[str, Any]


class QmpError(Exception):
    """The other end does not speak QMP; the message is the end of a sentence about it."""


class QmpLines:
    """Messages are JSON objects, one on each line."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def receive(self, data: bytes) -> Iterator[Message]:
        """Take over bytes; gives the messages that are complete with them.

        :raises QmpError: a line is no JSON object, or does not end.
        """
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            try:
                message = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise QmpError("the answer is not JSON") from error
            if not isinstance(message, dict):
                raise QmpError("the answer is no object")
            yield message
        if len(self._pending) > MAX_LINE:
            raise QmpError("the answer does not end")

    @staticmethod
    def command(name: str, arguments: Message | None = None) -> bytes:
        """A command as bytes."""
        return json.dumps({"execute": name} | ({"arguments": arguments} if arguments else {})).encode() + b"\n"


async def watch_resets(path: Path, on_reset: Callable[[], None], log: FilteringBoundLogger) -> None:
    """Call on_reset at every reset of the machine, for ever; a QEMU that is not there yet, or no more, is awaited.

    :param path: of a QMP socket that QEMU serves for this purpose alone; it talks to one client at a time.
    """
    limiter = RateLimiter()

    def tell(level: str, event: str, **fields: object) -> None:
        extra = limiter.admit(event)
        if extra is not None:
            getattr(log, level)(event, path=str(path), **fields, **extra)

    while True:
        try:
            async with await trio.open_unix_socket(path) as stream:
                await _listen(stream, on_reset, lambda: tell("info", "qmp-connected"))
            tell("info", "qmp-disconnected")
        except QmpError as error:
            tell("warning", "qmp-failed", reason=str(error))
        except (OSError, trio.BrokenResourceError) as error:
            reason = getattr(error, "strerror", None) or "the connection broke"
            tell("debug", "qmp-unreachable", reason=reason)
        await trio.sleep(RETRY_SECONDS)


async def _listen(stream: trio.SocketStream, on_reset: Callable[[], None], on_ready: Callable[[], None]) -> None:
    """Leave negotiation mode, then wait for events until QEMU goes."""
    lines = QmpLines()
    ready = False
    with trio.CancelScope(deadline=trio.current_time() + ANSWER_SECONDS) as negotiation:
        while data := await stream.receive_some(1 << 16):
            for message in lines.receive(data):
                if "QMP" in message:
                    await stream.send_all(lines.command("qmp_capabilities"))
                elif "return" in message and not ready:
                    ready = True
                    negotiation.deadline = float("inf")
                    on_ready()
                elif "error" in message:
                    raise QmpError(f"QEMU refuses qmp_capabilities: {str(message['error'])[:200]}")
                elif message.get("event") == "RESET":
                    on_reset()
                elif not ready and "event" not in message:
                    raise QmpError("whoever answers there does not speak QMP")
    if negotiation.cancelled_caught:
        raise QmpError(f"nothing that speaks QMP answers within {ANSWER_SECONDS:g} s")
