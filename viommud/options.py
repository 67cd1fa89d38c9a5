"""What the command line said, once it has been checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said."""

    socket_path: Path | None
    fd: int | None
    socket_group: str | None
    socket_mode: int | None
    config: Path | None
    check_config: bool
    keep_listening: bool
    log_level: str
    log_format: str
    pass_fd: tuple[tuple[str, int], ...] = ()
    """Descriptors by name."""
    control_path: Path | None = None
    steer_path: Path | None = None
    metrics_path: Path | None = None
