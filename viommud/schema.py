"""Check plain data against msgspec structs, with errors that a person can act on.

msgspec decides what is right; this module looks first, so that an error names the key as it stands in the file, the
value that was found and what is allowed, and so that integers may be written the way people write addresses and
sizes: 4096, "0x1000", "4K".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from viommud.errors import UsageError

T = TypeVar("T")
U64_MAX = (1 << 64) - 1
_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGT]?)")


class Wrong(UsageError):  # noqa: N818 - the name is read in sentences
    """A value that is not allowed: key, value, and what is."""

    def __init__(self, key: str, value: object, must: str) -> None:
        super().__init__(f"{key} = {_shown(value)}: must be {must}")


def convert(data: Mapping[str, Any], kind: type[T]) -> T:
    """Data as from tomllib, as a struct.

    :raises UsageError: in one line: key, value, and what is allowed.
    """
    checked = _check(inspect.type_info(kind), data, "")
    try:
        return msgspec.convert(checked, kind)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from error


def _check(kind: inspect.Type, value: Any, key: str) -> Any:
    """The value with numbers made integers; raises what convert() raises."""
    match kind:
        case inspect.Metadata():
            return _check(kind.type, value, key)
        case inspect.UnionType():
            return _check_union(kind, value, key)
        case inspect.StructType():
            return _check_struct(kind, value, key)
        case inspect.VarTupleType():
            if not isinstance(value, list):
                raise Wrong(key, value, "a list")
            return [_check(kind.item_type, item, f"{key}[{index}]") for index, item in enumerate(value)]
        case inspect.IntType():
            return _check_integer(kind, value, key)
        case inspect.BoolType() if not isinstance(value, bool):
            raise Wrong(key, value, "true or false")
        case inspect.LiteralType() if value not in kind.values:
            raise Wrong(key, value, "one of " + ", ".join(_shown(allowed) for allowed in kind.values))
        case inspect.StrType() if not isinstance(value, str):
            raise Wrong(key, value, "a string")
    return value


def _check_union(kind: inspect.UnionType, value: Any, key: str) -> Any:
    # TOML has no null: None in a union means that the key may be left out.
    members = [member for member in kind.types if not isinstance(member, inspect.NoneType)]
    if isinstance(value, str):
        for member in members:
            if isinstance(member, inspect.StrType):
                return value
    for member in members[:-1]:
        try:
            return _check(member, value, key)
        except Wrong:
            continue
    return _check(members[-1], value, key)


def _check_struct(kind: inspect.StructType, value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Wrong(key, value, "a table")
    fields = {field.encode_name: field for field in kind.fields}
    checked = {}
    for name, item in value.items():
        where = f"{key}.{name}" if key else name
        if name not in fields:
            raise UsageError(f"{where}: unknown key{_nearest(name, list(fields))}")
        checked[name] = _check(fields[name].type, item, where)
    for name, field in fields.items():
        if field.required and name not in value:
            raise UsageError(f"{key}: the key {name} is missing")
    return checked


def _check_integer(kind: inspect.IntType, value: Any, key: str) -> int:
    low, high = kind.ge if kind.ge is not None else 0, kind.le if kind.le is not None else U64_MAX
    number = value
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value)):
        number = int(match[1], 0 if match[1][:2].lower() == "0x" else 10) * _SUFFIXES[match[2]]
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise Wrong(key, value, f'an integer from {_bound(low)} to {_bound(high)} (or "0x...", or with K, M, G, T)')
    return number


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f", did you mean {close[0]}?" if close else ""
    return f"{meant} (known here: {', '.join(known)})"


def _bound(number: int) -> str:
    for bits in (64, 32):
        if number == (1 << bits) - 1:
            return f"2^{bits}-1"
    return str(number)


def _shown(value: object) -> str:
    """As it would be written in TOML, cut to a length that keeps one line readable."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = '"' + value.encode("unicode_escape").decode().replace('"', '\\"') + '"'
    else:
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
