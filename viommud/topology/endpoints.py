"""Devices for endpoints, as the command line names them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from viommud.endpoint_id import parse_endpoints
from viommud.errors import UsageError
from viommud.topology.qemu_args import Device, VfioPci, VfioUser

_HOST = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]")


def parse_device(text: str) -> Device:
    """A device from "00:02.0=vfio-pci:0000:65:00.0" or "00:03.0=vfio-user:/run/nvme.sock".

    :raises argparse.ArgumentTypeError: it is neither.
    """
    written, _, what = text.partition("=")
    kind, _, where = what.partition(":")
    try:
        first, last = parse_endpoints(written, "the endpoint")
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if first == last and kind == "vfio-pci" and _HOST.fullmatch(where):
        return VfioPci(first, where)
    if first == last and kind == "vfio-user" and where:
        return VfioUser(first, Path(where))
    raise argparse.ArgumentTypeError(
        f"{text!r} is not ENDPOINT=vfio-pci:0000:65:00.0 (an address of the host) or ENDPOINT=vfio-user:SOCKET"
    )
