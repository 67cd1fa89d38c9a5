"""Linux guests behind viommud."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from integration.daemon import Daemon
from vm import backend, guest
from vm.guest import Guest, Shape

Boot = Callable[..., tuple[Guest, Daemon]]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Boots a guest behind a daemon: boot(shape, extra="[limits]...") ; both end with the test."""
    with ExitStack() as stack:

        def start(shape: Shape | None = None, extra: str = "") -> tuple[Guest, Daemon]:
            shape = shape or Shape()
            daemon = stack.enter_context(backend.start(tmp_path, config=shape.config(extra)))
            return stack.enter_context(guest.start(tmp_path, shape, daemon.socket_path)), daemon

        yield start
