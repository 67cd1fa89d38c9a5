"""Devices that are processes of their own, and what QEMU and viommud are told of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vm.guest import Shape

Mode = Literal["strict", "shared"]


@dataclass(frozen=True)
class Confined:
    """A vfio-user endpoint: where the guest sees it, and the server behind it."""

    address: str
    """On bus 0: "00:02.0"."""
    server: Path
    """The socket of the device's process."""
    listen: Path
    """The socket that viommud makes for QEMU."""
    mode: Mode = "strict"
    more: str = ""
    """Further keys of the table, each with a comma in front."""

    @property
    def table(self) -> str:
        """The keys for [[endpoint]] in viommud's configuration."""
        sockets = f'listen = "{self.listen}", server = "{self.server}"'
        return f'vfio-user = {{ {sockets}, mode = "{self.mode}"{self.more} }}\n'


def client(address: str, socket: Path) -> list[str]:
    """QEMU's options for a vfio-user device: its place on bus 0, and the socket where it is served."""
    path = {"type": "unix", "path": str(socket)}
    return ["-device", json.dumps({"driver": "vfio-user-pci", "addr": address[3:], "socket": path})]


def config(shape: Shape, endpoints: Iterable[Confined], extra: str) -> str:
    """A configuration of viommud for a guest with such endpoints, all of which the shape lists.

    :param extra: as for Shape.config.
    """
    text = shape.config(extra)
    for endpoint in endpoints:
        name = f'id = "{endpoint.address}"\n'
        assert name in text, f"{endpoint.address} is not listed"
        text = text.replace(name, name + endpoint.table)
    return text
