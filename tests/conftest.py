"""What holds for every test: no descriptor stays open, and no async test waits for ever."""

from __future__ import annotations

import functools
import gc
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import trio

ASYNC_TEST_SECONDS = 60
"""Far more than any async test takes; only a test that hangs meets it."""


def open_descriptors() -> dict[int, str]:
    """Every open descriptor of this process and what it refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leak() -> Iterator[None]:
    """Fail a test that leaves more descriptors open than it found."""
    before = open_descriptors()
    yield
    if _added(before):
        gc.collect()  # a reference cycle may hold an object that closes its descriptor
    leaked = _added(before)
    assert not leaked, f"descriptors left open: {leaked}"


def _added(before: dict[int, str]) -> dict[int, str]:
    return {fd: what for fd, what in open_descriptors().items() if before.get(fd) != what}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every async test a deadline."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = _with_deadline(item.obj)


def _with_deadline(test: Any) -> Any:
    @functools.wraps(test)
    async def bounded(*args: Any, **kwargs: Any) -> None:
        with trio.fail_after(ASYNC_TEST_SECONDS):
            await test(*args, **kwargs)

    return bounded
