"""viommuctl's command line: what --help, the man page and the completions are made from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from viommud import __version__

EXIT_USAGE = 2
REQUESTS = ("attach", "detach", "map", "unmap", "probe")
STATUSES = ("ok", "ioerr", "unsupp", "deverr", "inval", "range", "noent", "fault", "nomem", "unanswered")
LEVELS = ("debug", "info", "warning", "error")
_UNITS = {"us": 1, "ms": 1_000, "s": 1_000_000}


class Parser(argparse.ArgumentParser):
    """Errors as one line: the usage text would bury it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")


def address(text: str) -> str:
    """An address as the daemon wants it."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address: a number below 2^64, as 0x1000")
    return f"{value:#x}"


def number(text: str) -> int:
    """A number from 1 on."""
    try:
        value = int(text, 0)
    except ValueError:
        value = 0
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return value


def identifier(text: str) -> int:
    """The ID of a domain."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not the ID of a domain: a number below 2^32")
    return value


def endpoint(text: str) -> int:
    """The ID of an endpoint, from its number or its PCI address."""
    from viommud.endpoint_id import parse_endpoints
    from viommud.errors import UsageError

    try:
        first, last = (
            parse_endpoints(int(text, 0), "endpoint")
            if text[:1].isdigit() and ":" not in text
            else (parse_endpoints(text, "endpoint"))
        )
    except (UsageError, ValueError):
        first, last = 0, 1
    if first != last or not 0 <= first < 1 << 32:
        raise argparse.ArgumentTypeError(f'{text!r} is not an endpoint: a PCI function as "00:02.0", or a number')
    return first


def delay(text: str) -> int:
    """A time in microseconds."""
    for unit in ("us", "ms", "s"):
        if text.endswith(unit):
            try:
                value = round(float(text.removesuffix(unit)) * _UNITS[unit])
            except ValueError:
                break
            if 1 <= value <= 600_000_000:
                return value
            break
    raise argparse.ArgumentTypeError(f"{text!r} is not a time from 1us to 600s, as 500us, 20ms or 1.5s")


def _completes_files(argument: argparse.Action) -> None:
    """For shtab: the argument is a file."""
    setattr(argument, "complete", {"bash": "_shtab_compgen_files", "zsh": "_files"})  # noqa: B010 - not of Action


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(
        prog="viommuctl",
        description="Look at a running viommud, and steer it.",
        epilog="Exit status: 0; 1 when the daemon says no; 2 for a mistake in the options, or when no daemon is there.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    socket = which.add_argument("--socket", "-s", metavar="PATH", type=Path, help="a control socket of the daemon")
    _completes_files(socket)
    which.add_argument(
        "--vm",
        metavar="NAME",
        help="the sockets /run/viommud/NAME.monitor and NAME.steer (default: those of the only VM there)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: one object, or one to a line")
    parser.add_argument("--version", action="version", version=f"viommuctl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, steers: bool = False) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        made.set_defaults(steers=steers)
        return made

    _add_looking(command)
    _add_steering(command)
    return parser


def _add_looking(command: object) -> None:
    assert callable(command)
    command("status", "what the daemon serves, since when, and what it has done")
    command("endpoints", "the endpoints that the guest has named, and their domains")
    command("domains", "the domains that exist")
    shown = command("map", "the mappings of a domain, drawn: holes are folded, reserved regions hatched")
    shown.add_argument("domain", metavar="DOMAIN", type=identifier, help="ID of the domain")
    shown.add_argument("--list", action="store_true", help="every mapping on a line of its own, undrawn")
    svg = shown.add_argument("--svg", metavar="FILE", type=Path, help="draw into this file instead, for a bug report")
    _completes_files(svg)
    looked = command("translate", "where an access of an endpoint goes")
    looked.add_argument("endpoint", metavar="ENDPOINT", type=endpoint, help='PCI function as "00:02.0", or a number')
    looked.add_argument("address", metavar="ADDRESS", type=address, help="address that the endpoint uses (IOVA)")
    looked.add_argument(
        "--access", choices=("none", "read", "write"), default="none", help="check that it may (default: %(default)s)"
    )
    command("limits", "what a guest can make the daemon keep, and how much of it is used")
    for name, text in (
        ("faults", "the last faults that were reported to the guest"),
        ("refused", "the last requests that were refused: a guest's driver ignores most of it"),
    ):
        events = command(name, text)
        events.add_argument("--follow", "-f", action="store_true", help="and those to come, until interrupted")
    command("watch", "everything that happens from now on, until interrupted")
    top = command("top", "what happens, second by second; q ends it")
    top.add_argument("--interval", metavar="SECONDS", type=float, default=1.0, help="between two looks (default: 1)")
    top.add_argument("--once", action="store_true", help="one look, since the daemon started, and exit")


def _add_steering(command: object) -> None:
    assert callable(command)
    injected = command("inject", "report a fault to the guest, or treat its next requests badly", steers=True)
    kinds = injected.add_subparsers(dest="kind", required=True, metavar="KIND")
    fault = kinds.add_parser("fault", help="report a fault, as if a device had been caught", allow_abbrev=False)
    fault.add_argument("endpoint", metavar="ENDPOINT", type=endpoint, help='PCI function as "00:02.0", or a number')
    fault.add_argument("--reason", choices=("unknown", "domain", "mapping"), default="mapping", help="default: mapping")
    fault.add_argument("--access", choices=("none", "read", "write"), default="none", help="what it tried")
    fault.add_argument("--address", metavar="ADDRESS", type=address, help="where; left out, the address is unknown")
    for name, text in (
        ("delay", "carry requests out, and answer them late"),
        ("status", "answer requests with this status, without carrying them out"),
        ("drop", "carry requests out, and never answer them"),
        ("hang", "stop the worker for good when a request comes"),
    ):
        rule = kinds.add_parser(name, help=text, allow_abbrev=False)
        if name == "delay":
            rule.add_argument("delay", metavar="TIME", type=delay, help="500us, 20ms or 1.5s; at most 600s")
        if name == "status":
            rule.add_argument("status", metavar="STATUS", choices=STATUSES, help=", ".join(STATUSES))
        rule.add_argument("--count", metavar="N", type=number, default=1, help="the next so many (default: 1)")
        rule.add_argument("--request", choices=REQUESTS, help="of this type only")
        rule.add_argument("--endpoint", metavar="ENDPOINT", type=endpoint, help="that name this endpoint only")
        rule.add_argument("--domain", metavar="DOMAIN", type=identifier, help="that name this domain only")
    kinds.add_parser("list", help="what is armed", allow_abbrev=False)
    kinds.add_parser("clear", help="disarm everything, and answer what is held back", allow_abbrev=False)
    level = command("log-level", "set the least important level that the daemon logs", steers=True)
    level.add_argument("level", choices=LEVELS, help="the level")
    limits = command("set-limits", "set limits for the guest of now; what exists stays", steers=True)
    for name in ("endpoints", "domains", "mappings", "mappings-per-domain"):
        limits.add_argument(f"--{name}", metavar="N", type=number, help=f"most {name.replace('-', ' ')}")
    command("pause", "serve no request until resumed; a Linux guest spins meanwhile", steers=True)
    command("resume", "serve requests again", steers=True)
    recorded = command("record", "record every request into a file, until interrupted or the VM goes", steers=True)
    file = recorded.add_argument("file", metavar="FILE", type=Path, help="the file; `viommud replay` plays it")
    _completes_files(file)
