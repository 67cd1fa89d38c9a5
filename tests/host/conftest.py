"""Only the lab has what these tests need."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Elsewhere, say where they run."""
    if not os.path.exists("/dev/iommu"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs the lab: scripts/test host"))
