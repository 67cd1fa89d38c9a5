"""The one error of this package."""

from __future__ import annotations

from viommud.errors import UsageError


class TopologyError(UsageError):
    """A topology that cannot be, or an input that does not fit it: one sentence with what, where, what is allowed."""
