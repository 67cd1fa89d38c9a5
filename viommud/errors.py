"""The base of every error that viommud reports to a person."""

from __future__ import annotations


class ViommudError(Exception):
    """An error with a sentence for the log and, where one is known, a hint at the remedy."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def sentence(self) -> str:
        """Message and hint in one line."""
        return f"{self} ({self.hint})" if self.hint else str(self)


class UsageError(ViommudError):
    """A mistake in the command line, in the configuration, or in what they refer to."""
