"""The command line: one parser, one frozen result, and the sentence a user gets for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from viommud.errors import UsageError, ViommudError
from viommud.options import Options

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "console", "json", "journal")

EXIT_USAGE = 2
"""A mistake of the user: an option, the configuration, or what they refer to."""


COMMANDS = ("topology", "qemu-args", "run", "check", "replay")
"""What the first word of the command line may be in place of the daemon's options."""


class _Parser(argparse.ArgumentParser):
    """Errors as one line: the usage text would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")


def _descriptor(text: str) -> int:
    if not text.isdecimal() or int(text) > 0x7FFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a file descriptor")
    return int(text)


def _named_descriptor(text: str) -> tuple[str, int]:
    name, equals, number = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=N")
    return name, _descriptor(number)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file mode: octal digits from 000 to 777")
    return mode


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="viommud",
        description="A virtual machine's IOMMU from outside the machine monitor: virtio-iommu over vhost-user.",
        epilog="Commands, each with a --help of its own: viommud topology, qemu-args, run, check, replay.",
        allow_abbrev=False,
    )
    socket = parser.add_argument_group("vhost-user socket (or passed by systemd in LISTEN_FDS)")
    where = socket.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", type=Path, help="create this UNIX socket and listen on it")
    where.add_argument(
        "--fd", metavar="N", type=_descriptor, help="use this inherited UNIX socket, listening or already connected"
    )
    socket.add_argument("--socket-group", metavar="GROUP", help="group of the socket that --socket-path creates")
    socket.add_argument(
        "--socket-mode", metavar="MODE", type=_mode, help="mode of the socket that --socket-path creates (default: 700)"
    )
    socket.add_argument(
        "--keep-listening",
        action="store_true",
        help="wait for the next front-end when one has gone (default: exit with status 0)",
    )
    _add_common(parser)
    parser.add_argument(
        "--check-config", action="store_true", help="say whether the file of --config is right, and exit"
    )
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print what this back-end is, in JSON, and exit"
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """What the daemon is told however it is started."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="configuration in TOML")
    parser.add_argument(
        "--pass-fd",
        metavar="NAME=N",
        type=_named_descriptor,
        action="append",
        default=[],
        help="an inherited descriptor that the configuration names (or in LISTEN_FDS); more than once",
    )
    parser.add_argument(
        "--control-path", metavar="PATH", type=Path, help="create this UNIX socket for viommuctl to look (varlink)"
    )
    parser.add_argument("--steer-path", metavar="PATH", type=Path, help="and this one for viommuctl to steer")
    parser.add_argument("--metrics-path", metavar="PATH", type=Path, help="and this one for Prometheus (HTTP)")
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="info", help="least important lines to log (default: %(default)s)"
    )
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="auto",
        help="auto: readable on a terminal, the journal's own under systemd, JSON otherwise (default: %(default)s)",
    )


def parse(arguments: Sequence[str]) -> Options:
    """The options, checked as far as they can be without looking at the machine.

    :raises UsageError: options that do not go together.
    :raises SystemExit: with status 2 after a line about a bad option; with 0 for --help.
    """
    parsed = build_parser().parse_args(arguments)
    if parsed.check_config and parsed.config is None:
        raise UsageError("--check-config checks the file that --config names, and --config is missing")
    if parsed.socket_path is None:
        for option in ("socket_group", "socket_mode"):
            if getattr(parsed, option) is not None:
                name = "--" + option.replace("_", "-")
                raise UsageError(f"{name} is for the socket that --socket-path creates, and --socket-path is missing")
    return _options(parsed)


def _options(parsed: argparse.Namespace) -> Options:
    parsed.pass_fd = tuple(parsed.pass_fd)
    return Options(**{name: getattr(parsed, name) for name in Options.__slots__})


_RUN: dict[str, Any] = {
    "description": "Start QEMU with devices of the host, and be its IOMMU.",
    "epilog": "The exit status is QEMU's.",
    "allow_abbrev": False,
}


def add_commands(subparsers: Any) -> None:
    """Everything that the first word may be in place of the daemon's options."""
    _add_plain_commands(subparsers)
    _add_run_options(subparsers.add_parser("run", help="start QEMU, and be its IOMMU", **_RUN))


def _add_plain_commands(subparsers: Any) -> None:
    from viommud import replay
    from viommud.host import check
    from viommud.topology import commands

    commands.add_commands(subparsers)
    check.add_command(subparsers)
    replay.add_command(subparsers)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("qemu", metavar="QEMU ...", nargs="+", help="after --: QEMU's command line without the devices")


def _run_command(arguments: Sequence[str]) -> int:
    """Carry out a command, which is no start of the daemon."""
    parser = _Parser(prog="viommud", allow_abbrev=False)
    _add_plain_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    parsed = parser.parse_args(arguments)
    status: int = parsed.command(parsed)
    return status


def _run_qemu(arguments: Sequence[str]) -> int:
    """viommud run [options] -- QEMU ..."""
    from viommud import config
    from viommud.host import run as host_run

    parser = _Parser(prog="viommud run", **_RUN)
    _add_run_options(parser)
    parsed = parser.parse_args(arguments)
    if parsed.config is None:
        raise UsageError("viommud run: --config FILE is missing: it says where in the guest the devices are")
    command = parsed.qemu
    for name, unused in (("socket_path", None), ("fd", None), ("socket_group", None), ("socket_mode", None)):
        setattr(parsed, name, unused)
    parsed.check_config = parsed.keep_listening = False
    setup, topology = config.load(parsed.config, host_run.planned)
    return host_run.run(_options(parsed), setup, topology, command)


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says; returns the exit status."""
    try:
        if arguments and arguments[0] == "run":
            return _run_qemu(arguments[1:])
        if arguments and arguments[0] in COMMANDS:
            return _run_command(arguments)
        options = parse(arguments)
        # Not earlier: a mistake in the options and --help are answered without them.
        from viommud import config
        from viommud.device_setup import DeviceSetup, plan

        setup: DeviceSetup = plan(config.Config()) if options.config is None else config.load(options.config, plan)
        if options.check_config:
            print(f"{options.config}: good, {setup.summary}")
            return 0
        from viommud.daemon import run_daemon

        return run_daemon(options, setup)
    except ViommudError as error:
        print(f"viommud: error: {error.sentence}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UsageError) else 1
