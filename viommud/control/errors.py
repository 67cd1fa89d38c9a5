"""Errors that a call can have."""

from __future__ import annotations

SERVICE = "org.varlink.service"
MONITOR = "org.viommud.Monitor"
STEER = "org.viommud.Steer"


class CallError(Exception):
    """A call is answered with an error."""

    def __init__(self, error: str, **parameters: object) -> None:
        super().__init__(error)
        self.error = error
        self.parameters = parameters


def invalid_parameter(name: str) -> CallError:
    """org.varlink.service.InvalidParameter."""
    return CallError(f"{SERVICE}.InvalidParameter", parameter=name)
