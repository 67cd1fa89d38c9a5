"""Where log lines go: a descriptor that may block, or systemd's journal.

Nobody has to read a log, and a reader that stops must not stop the program: a line that cannot be written at once is
dropped and counted, and the next one that can be says how many were.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Callable, MutableMapping
from typing import Any

JOURNAL_SOCKET = "/run/systemd/journal/socket"
PIPE_ATOMIC = select.PIPE_BUF
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


class DescriptorSink:
    """Lines to a descriptor, without ever waiting for who reads it."""

    def __init__(self, fd: int, lost_line: Callable[[int], str]) -> None:
        """Lines go to fd, which stays the caller's; lost_line(count) is a line that tells of lost ones."""
        self._lost_line = lost_line
        self._rest = b""
        self._untold = 0
        self.dropped = 0
        """Lines lost so far."""
        self._sock: socket.socket | None = None
        self._fd = fd
        self._own = False
        self._poll: select.poll | None = None
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._sock = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            # A description of our own: O_NONBLOCK on the one we got would surprise those we share it with.
            try:
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
                self._own = True
            except OSError:  # not ours to open: ask before each write, which leaves only a race with other writers
                self._poll = select.poll()
                self._poll.register(fd, select.POLLOUT)

    def close(self) -> None:
        """Let go of what was opened here."""
        if self._sock is not None:
            self._sock.close()
        elif self._own:
            os.close(self._fd)

    def write(self, line: str) -> None:
        """One line, with its end."""
        if not (self._flush() and self._tell_lost() and self._begin(line.encode("utf-8", "replace"))):
            self.dropped += 1
            self._untold += 1

    def _tell_lost(self) -> bool:
        """Tell of lost lines, if there are any; False when nothing more can be written now."""
        told = self._untold
        if not told:
            return True
        if not self._begin(self._lost_line(told).encode()):
            return False
        self._untold -= told
        return not self._rest

    def _flush(self) -> bool:
        """Finish a line that was begun; False when that is not possible yet."""
        return not self._rest or (self._begin(self._rest) and not self._rest)

    def _begin(self, data: bytes) -> bool:
        """Write, and keep what does not fit; False when nothing was written."""
        total = len(data)
        try:
            while data:
                data = data[self._write(data) :]
        except BlockingIOError:
            if len(data) == total:
                return False
        except OSError:  # nobody is there any more, or the disk is full
            self._rest = b""
            return False
        self._rest = data
        return True

    def _write(self, data: bytes) -> int:
        if self._sock is not None:
            return self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if self._poll is not None:
            if not self._poll.poll(0):
                raise BlockingIOError
            data = data[:PIPE_ATOMIC]
        return os.write(self._fd, data)


class JournalSink:
    """Entries to systemd's journal with their fields, by its native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.dropped = 0
        """Entries lost so far."""

    def write(self, entry: bytes) -> None:
        """One entry, as journal_entry() makes it."""
        try:
            self._sock.sendto(entry, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._path)
        except OSError:
            self.dropped += 1


def is_journal(fd: int, journal_stream: str) -> bool:
    """Does a descriptor lead to the journal, as JOURNAL_STREAM (systemd.exec(5)) says?"""
    device, _, inode = journal_stream.partition(":")
    with contextlib.suppress(OSError, ValueError):
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    return False


def journal_entry(line: MutableMapping[str, Any], render: Callable[[Any], str]) -> bytes:
    """An event as a journal entry: MESSAGE to read, and every field by its name.

    :param render: a value that is no string as a string.
    """
    level = line.pop("level", "info")
    event = str(line.pop("event", ""))
    fields = {name: value if isinstance(value, str) else render(value) for name, value in line.items()}
    message = " ".join([event, *(f"{name}={value}" for name, value in fields.items() if name != "exception")])
    out = bytearray()
    for name, value in [
        ("MESSAGE", message),
        ("PRIORITY", str(_PRIORITIES.get(level, 6))),
        ("SYSLOG_IDENTIFIER", "viommud"),
        ("VIOMMUD_EVENT", event),
        *((f"VIOMMUD_{name.upper().replace('-', '_')}", value) for name, value in fields.items()),
    ]:
        data = value.encode("utf-8", "replace")
        if b"\n" in data:
            out += name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
        else:
            out += name.encode() + b"=" + data + b"\n"
    return bytes(out)
