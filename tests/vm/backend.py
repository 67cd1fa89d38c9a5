"""viommud behind a guest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frontend.ring import wait_until
from integration.daemon import Daemon

from vm.qemu import QemuError


@contextmanager
def start(directory: Path, *options: str, config: str | None = None) -> Iterator[Daemon]:
    """Start the daemon and wait for its socket; it ends with the block.

    :param options: on its command line.
    :param config: text of its configuration: see vm.guest.Shape.config.
    :raises QemuError: it ends, or anything of QEMU and the guest fails; with the daemon's log.
    """
    with Daemon(directory, *options, config=config) as daemon:
        try:
            wait_until(lambda: daemon.socket_path.exists() or daemon.process.poll() is not None, "viommud's socket")
            if daemon.process.poll() is not None:
                raise QemuError(f"viommud ended with status {daemon.process.returncode} before it had a socket")
            yield daemon
        except QemuError as error:
            raise QemuError(f"{error}\n--- viommud\n{daemon.log_text}") from error
