"""[control] and [metrics] of the configuration: where a running daemon can be looked at and steered."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Path = Annotated[str, msgspec.Meta(min_length=1)]
_Group = Annotated[str, msgspec.Meta(min_length=1)]
_Mode = Annotated[str, msgspec.Meta(pattern="^0?[0-7]{3}$")]


class ControlSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[control]: varlink sockets.  Neither is there unless its path is given or systemd passes it."""

    path: _Path | None = None
    """The socket to look: org.viommud.Monitor."""
    group: _Group | None = None
    mode: _Mode = "600"
    steer_path: _Path | None = None
    """The socket to steer: org.viommud.Steer as well."""
    steer_group: _Group | None = None
    steer_mode: _Mode = "600"
    allow_injection: bool = False
    """May faults and misbehaviour be injected?"""


class MetricsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[metrics]: for Prometheus."""

    path: _Path | None = None
    """A socket that answers every HTTP request with them."""
    group: _Group | None = None
    mode: _Mode = "600"
    textfile: _Path | None = None
    """A file for node_exporter's textfile collector, replaced as a whole each time."""
    textfile_seconds: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 15
