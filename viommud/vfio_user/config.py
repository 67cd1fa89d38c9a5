"""[endpoint.vfio-user] of the configuration: an endpoint whose device is another process."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Mode = Literal["strict", "shared"]


class VfioUserSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """[endpoint.vfio-user]: where the device's client and server are."""

    listen: str
    """Path of the socket that is made for the client (QEMU: -device vfio-user-pci)."""
    server: str
    """Path of the socket where the device's server listens."""
    mode: Mode = "strict"
    """strict: the server gets no memory, its DMA goes through viommud.  shared: it gets the files of guest memory."""
    timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=600_000)] = 1000
    """How long the server may take to give up a mapping; then it is cut off."""
    reply_timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=600_000)] = 4000
    """How long it may take to answer a register access; then it is cut off.  0: for ever.  QEMU waits 5000 ms."""
    spin_us: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """How long the relay polls idle sockets after a message before it sleeps."""
