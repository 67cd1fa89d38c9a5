"""What the tests of the rules share: back-ends that end with their test, and a guest on each kind of ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from frontend.guest import Guest

from conformance.backend import CONFIG, Backend

MakeBackend = Callable[..., Backend]


@pytest.fixture
def make_backend() -> Iterator[MakeBackend]:
    """Makes back-ends of any configuration."""
    with ExitStack() as stack:
        yield lambda config=CONFIG: stack.enter_context(Backend(config))


@pytest.fixture
def backend(make_backend: MakeBackend) -> Backend:
    """The usual back-end."""
    return make_backend()


@pytest.fixture
def guest(backend: Backend) -> Iterator[Guest]:
    """A started guest with a split ring on the usual back-end."""
    with backend.guest(features=backend.features()) as started:
        yield started


@pytest.fixture(params=["split", "packed", "in-order"])
def any_ring(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Guest]:
    """A started guest on every kind of ring in turn."""
    kind = request.param
    features = backend.features(packed=kind == "packed", in_order=kind == "in-order")
    with backend.guest(features=features) as started:
        yield started
