"""Recordings of a guest's requests: a file that tells how the device was set up, then what was asked of it.

A recording begins with MAGIC and a line of JSON; then come entries as the engine makes them (struct viommu_recorded of
csrc/viommu.h, little endian), in the order in which the requests were served.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

import msgspec

from viommud import __version__
from viommud.device_setup import DeviceSetup, EndpointRange
from viommud.errors import UsageError
from viommud.instruments import RECORDED_BYTES, RecordedKind
from viommud.settings import Feature, Personality, Reserved, ReservedKind, Settings

MAGIC = b"viommud recording 1\n"
HEADER_MAX = 1 << 20
_ENTRY = struct.Struct("<QQIHBB72s")
assert _ENTRY.size == RECORDED_BYTES
CHUNK = 4096
"""Entries read from a file at once."""


class Range(msgspec.Struct, frozen=True):
    """Endpoints and what they reserve."""

    first: int
    last: int
    reserved: tuple[tuple[int, int, int], ...]
    """First and last address, and kind."""

    def regions(self) -> tuple[Reserved, ...]:
        """As the engine wants them."""
        return tuple(Reserved(first, last, ReservedKind(kind)) for first, last, kind in self.reserved)


class Header(msgspec.Struct, frozen=True):
    """How the device was set up."""

    version: str
    complete: bool
    """It begins before the guest's first request."""
    settings: dict[str, int]
    """Of class Settings, by name."""
    endpoints: tuple[Range, ...]

    def made_settings(self) -> Settings:
        """The settings.

        :raises UsageError: another version of viommud had others.
        """
        kinds = {"features": Feature, "personality": Personality, "bypass": bool}
        try:
            return Settings(**{name: kinds.get(name, int)(value) for name, value in self.settings.items()})
        except (TypeError, ValueError) as error:
            raise UsageError(f"a recording of viommud {self.version}, which had other settings: {error}") from error


def header_of(setup: DeviceSetup, *, complete: bool) -> str:
    """A header, as it stands in the file."""
    ranges = tuple(_range(entry) for entry in setup.endpoints)
    settings = {field.name: int(getattr(setup.settings, field.name)) for field in fields(Settings)}
    return msgspec.json.encode(Header(__version__, complete, settings, ranges)).decode()


def _range(entry: EndpointRange) -> Range:
    regions = tuple((region.first, region.last, int(region.kind)) for region in entry.reserved)
    return Range(entry.first, entry.last, regions)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; `kind` is a request type or a RecordedKind."""

    time_ns: int
    lost: int
    writable: int
    kind: int
    status: int
    readable: bytes

    @property
    def is_request(self) -> bool:
        """And not another change of the device."""
        return self.kind < min(RecordedKind)


def unpack(data: bytes) -> Iterator[Entry]:
    """Entries from their bytes, which must be whole."""
    for time_ns, lost, writable, readable, kind, status, content in _ENTRY.iter_unpack(data):
        yield Entry(time_ns, lost, writable, kind, status, content[:readable])


def read_header(file: IO[bytes], path: Path) -> Header:
    """The header of a recording; leaves the file at the first entry.

    :raises UsageError: it is none.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise UsageError(f"{path}: not a recording of viommud")
    line = file.readline(HEADER_MAX)
    try:
        return msgspec.json.decode(line, type=Header)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path}: the header of the recording is broken: {error}") from error


def read_chunks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Whole entries, many at once.

    :raises UsageError: the file ends within an entry.
    """
    while data := file.read(CHUNK * RECORDED_BYTES):
        if len(data) % RECORDED_BYTES:
            raise UsageError(f"{path}: ends within an entry; the recording was cut off")
        yield data
