"""One daemon for each file: an attack that hurts it shows in the attacks that follow as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conformance.backend import Backend
from frontend.guest import Guest

from hostile.victim import Victim


@pytest.fixture(scope="module")
def shared_victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """A daemon for all tests of a file."""
    with Victim(tmp_path_factory.mktemp("victim")) as started:
        yield started


@pytest.fixture
def victim(shared_victim: Victim) -> Iterator[Victim]:
    """The daemon, checked before and after the test."""
    with shared_victim.attacked():
        yield shared_victim


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A back-end in this process, for what only its inside can do."""
    with Backend() as started:
        yield started


@pytest.fixture
def guest(backend: Backend) -> Iterator[Guest]:
    """A started guest on that back-end."""
    with backend.guest(features=backend.features()) as started:
        yield started
