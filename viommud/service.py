"""What systemd gives a service and wants to hear from it: sockets in, state out (sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

LISTEN_FDS_START = 3
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Name and number of every descriptor that was passed to this process, with close-on-exec set.

    The variables are removed, so that no child takes the descriptors for its own.  Without a name in
    LISTEN_FDNAMES the name is "unknown", as systemd has it.
    """
    pid, count, names = (environ.pop(variable, "") for variable in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    numbers = range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))
    given = names.split(":") if names else []
    for number in numbers:
        os.set_inheritable(number, False)
    return [(given[index] if index < len(given) else "unknown", number) for index, number in enumerate(numbers)]


def notify(*lines: str, environ: MutableMapping[str, str] = os.environ) -> bool:
    """Tell the service manager, e.g. "READY=1"; False when nobody listens.

    A manager that has gone away is no reason for a daemon to stop.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, address)
        except OSError:
            return False
    return True
