"""Endpoint IDs as people write and read them: PCI addresses.

An ID is segment << 16 | bus << 8 | device << 3 | function, as device trees (iommu-map), ACPI (VIOT) and Linux number
the functions below a virtio-iommu; a front-end without PCI may number as it likes.
"""

from __future__ import annotations

import re

from viommud.schema import Wrong

MAX_ENDPOINT = (1 << 32) - 1
_PCI = re.compile(r"(?:([0-9a-fA-F]{1,4}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")
_ALLOWED = 'a PCI function as "00:02.0" or "0000:00:02.0", a number, or a range of two as "01:00.0-01:1f.7"'


def parse_endpoints(written: str | int, key: str) -> tuple[int, int]:
    """First and last ID of what a configuration names at a key.

    :raises Wrong: it is no ID and no range.
    """
    if isinstance(written, int):
        return written, written
    first, dash, last = written.partition("-")
    bounds = [_parse_one(first), _parse_one(last if dash else first)]
    if bounds[0] is None or bounds[1] is None:
        raise Wrong(key, written, _ALLOWED)
    if bounds[0] > bounds[1]:
        raise Wrong(key, written, "a range whose first endpoint is not behind its last")
    return bounds[0], bounds[1]


def _parse_one(text: str) -> int | None:
    text = text.strip()
    if match := _PCI.fullmatch(text):
        segment, bus, device, function = (int(part or "0", 16) for part in match.groups())
        return None if device > 0x1F else segment << 16 | bus << 8 | device << 3 | function
    if re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]+", text):
        number = int(text, 0) if text[:2].lower() == "0x" else int(text)
        return number if number <= MAX_ENDPOINT else None
    return None


def show(endpoint: int) -> str:
    """As lspci writes it: the segment only where it is not 0."""
    address = f"{endpoint >> 8 & 0xFF:02x}:{endpoint >> 3 & 0x1F:02x}.{endpoint & 7}"
    return address if endpoint >> 16 == 0 else f"{endpoint >> 16:04x}:{address}"
