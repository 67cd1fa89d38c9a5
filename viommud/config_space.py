"""Configuration space of the device (virtio 1.3 section 5.13.4), as each age of driver reads it."""

from __future__ import annotations

import struct

from viommud.settings import Personality, Settings

BYPASS_OFFSET = 36
_FINAL = struct.Struct("<QQQIIIB3x")
_EARLY = struct.Struct("<QQQB3xI")


def size(settings: Settings, topology: bytes = b"") -> int:
    """Bytes of configuration space."""
    if topology:
        return BYPASS_OFFSET + len(topology)
    return _FINAL.size if settings.personality is Personality.V1_X else _EARLY.size


def render(settings: Settings, bypass: bool, topology: bytes = b"") -> bytes:
    """The whole space; a built-in topology stands where `bypass` is otherwise.

    Final layout, 40 bytes: page_size_mask, input_range, domain_range, probe_size, bypass.  Before version 0.10, 32
    bytes: one byte domain_bits in place of the range, and probe_size behind it.
    """
    ranges = (settings.page_size_mask, settings.input_first, settings.input_last)
    if settings.personality is Personality.V1_X:
        whole = _FINAL.pack(*ranges, settings.domain_first, settings.domain_last, settings.probe_size, bypass)
        return whole[:BYPASS_OFFSET] + topology if topology else whole
    # A driver may use IDs below 2**domain_bits: never more than the range allows.
    return _EARLY.pack(*ranges, (settings.domain_last + 1).bit_length() - 1, settings.probe_size)
