"""The commands `viommud topology ...` and `viommud qemu-args`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viommud import config_space
from viommud.config import Config
from viommud.config import load as load_config
from viommud.device_setup import plan
from viommud.errors import UsageError
from viommud.settings import Settings
from viommud.topology import builtin, check, cpio, dt, iort, option_rom, output, qemu_args, viot, viot_v5
from viommud.topology.check import Finding, Severity
from viommud.topology.endpoints import parse_device
from viommud.topology.errors import TopologyError
from viommud.topology.model import Ids, Topology
from viommud.topology.qmp import Qmp
from viommud.topology.running import look
from viommud.topology.section import BuiltinShape

EXIT_STATUS = {Severity.NOTE: 0, Severity.WARNING: 3, Severity.ERROR: 4}
"""Of `topology check`, by the worst finding; 2 is a mistake in the command line or in an input."""

_Parser = argparse.ArgumentParser
_Options = argparse._ActionsContainer


def add_commands(subparsers: Any) -> None:
    """Add the commands to what ArgumentParser.add_subparsers() returned; each sets `command` to what carries it out.

    `command` takes the parsed arguments and returns the exit status.
    """
    topology = subparsers.add_parser(
        "topology", help="describe the IOMMU and the endpoints behind it to a guest", allow_abbrev=False
    )
    kinds = topology.add_subparsers(required=True, metavar="KIND")
    _dt(_command(kinds, "dt", "add it to a device tree", _write_dt))
    table = _command(kinds, "viot", "as ACPI table VIOT", _write_viot)
    _acpi(table).add_argument(
        "--option-rom",
        action="store_true",
        help="write an option ROM that gives the table to the guest, for machines without -acpitable: virt with UEFI"
        " (romfile= of the IOMMU's device) and microvm (-option-rom)",
    )
    node = _command(kinds, "iort", "as ACPI table IORT, for drivers of 2017 and 2018", _write_iort)
    _acpi(node)
    node.add_argument(
        "--its", metavar="ID", type=_number, action="append", default=[], help="identifier of a GIC ITS of the platform"
    )
    _acpi(_command(kinds, "viot-v5", "as VIOT in its draft of 2019", _write_viot_v5))
    checker = _command(kinds, "check", "hold it against a description and a running QEMU", _check)
    checker.add_argument("--dt", metavar="FILE", type=Path, help="device tree that the guest is given")
    checker.add_argument("--viot", metavar="FILE", type=Path, help="VIOT that the guest is given, or its option ROM")
    checker.add_argument("--qmp", metavar="SOCKET", type=Path, help="UNIX socket of QEMU's machine protocol")
    _qemu_args(_command(subparsers, "qemu-args", "the QEMU command line that goes with the configuration", _print_args))


def _command(subparsers: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> _Parser:
    parser: _Parser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="viommud's configuration")
    parser.set_defaults(command=run)
    return parser


def _number(text: str) -> int:
    try:
        number = int(text, 0)
    except ValueError:
        number = -1
    if not 0 <= number <= 0xFFFF_FFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2^32-1")
    return number


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _mebibytes(text: str) -> int:
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "M")
    if not digits.isdecimal() or unit not in "MG" or not 0 < int(digits) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of memory as 512M or 4G")
    return int(digits) * (1024 if unit == "G" else 1)


@dataclass(frozen=True, slots=True)
class _Configured:
    """What a configuration says about the topology."""

    topology: Topology
    builtin: BuiltinShape | None
    settings: Settings


def _configured(config: Config) -> _Configured:
    """The topology that a configuration describes.

    :raises UsageError: it describes none, or an impossible one.
    """
    setup = plan(config)
    section = config.topology
    if section is None:
        raise TopologyError(
            "there is no [topology], which says where the IOMMU is",
            hint='at least machine = "virt" and iommu = "00:01.0"',
        )
    if not setup.named:
        raise TopologyError(
            "there is no [[endpoint]]: a topology lists the devices that viommud translates for, no others"
        )
    topology = Topology.build(section, [Ids(entry.first, entry.last) for entry in setup.endpoints])
    return _Configured(topology, section.builtin, setup.settings)


def _topology(arguments: argparse.Namespace) -> Topology:
    return load_config(arguments.config, _configured).topology


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TopologyError(f"{path}: cannot be read: {error.strerror}") from error


def _dt(parser: _Parser) -> None:
    parser.add_argument(
        "--base", metavar="FILE", type=Path, required=True, help="tree without an IOMMU, as -machine dumpdtb= writes it"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the whole tree, packed")
    parser.add_argument("--overlay", action="store_true", help="print the changes as an overlay in source form")


def _write_dt(arguments: argparse.Namespace) -> int:
    if arguments.overlay == (arguments.output is not None):
        raise UsageError("give either -o FILE for a whole tree or --overlay to see the changes")
    topology, base = _topology(arguments), _read(arguments.base)
    if arguments.overlay:
        print(dt.overlay(topology, base, str(arguments.base)), end="")
    else:
        output.write(arguments.output, dt.render(topology, base, str(arguments.base)))
    return 0


def _acpi(parser: _Parser) -> _Options:
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="file to write")
    form: _Options = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--initrd-override",
        action="store_true",
        help="write a cpio archive with the table, to go in front of a Linux guest's initial RAM disk",
    )
    return form


def _write_acpi(arguments: argparse.Namespace, table: bytes, name: str) -> int:
    output.write(arguments.output, cpio.table_override(name, table) if arguments.initrd_override else table)
    return 0


def _write_viot(arguments: argparse.Namespace) -> int:
    topology = _topology(arguments)
    table = viot.render(topology)
    if arguments.option_rom:
        output.write(arguments.output, option_rom.render(topology, table))
        return 0
    return _write_acpi(arguments, table, "viot.aml")


def _write_viot_v5(arguments: argparse.Namespace) -> int:
    return _write_acpi(arguments, viot_v5.render(_topology(arguments)), "viot.aml")


def _write_iort(arguments: argparse.Namespace) -> int:
    return _write_acpi(arguments, iort.render(_topology(arguments), arguments.its), "iort.aml")


def _check(arguments: argparse.Namespace) -> int:
    if arguments.dt is None and arguments.viot is None and arguments.qmp is None:
        raise UsageError("nothing to check against: give --dt, --viot or --qmp")
    topology = _topology(arguments)
    found: list[Finding] = []
    if arguments.dt is not None:
        found += check.check_description(topology, dt.read(_read(arguments.dt), str(arguments.dt)))
    if arguments.viot is not None:
        found += check.check_description(
            topology, viot.read(option_rom.table_in(_read(arguments.viot)), str(arguments.viot))
        )
    if arguments.qmp is not None:
        with Qmp(arguments.qmp) as qemu:
            found += check.check_running(topology, look(qemu))
    for finding in sorted(found, key=lambda finding: -finding.severity):
        print(finding)
    if not found:
        print("good: no difference found")
    return EXIT_STATUS[max((finding.severity for finding in found), default=Severity.NOTE)]


def _qemu_args(parser: _Parser) -> None:
    parser.add_argument("--socket-path", metavar="PATH", type=Path, required=True, help="viommud's vhost-user socket")
    parser.add_argument("--format", choices=tuple(_FORMATS), default="shell", help="(default: %(default)s)")
    parser.add_argument("--memory", metavar="SIZE", type=_mebibytes, default=1024, help="as 512M or 4G (default: 1G)")
    parser.add_argument("--cpus", metavar="N", type=_positive, default=1, help="(default: %(default)s)")
    parser.add_argument("--cpu", metavar="MODEL", help="QEMU's name of it (default: the host's, or an emulated one)")
    parser.add_argument("--accel", choices=("kvm", "tcg"), default="kvm", help="(default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--topology", metavar="FILE", type=Path, help="device tree or VIOT that `viommud topology` wrote")
    what.add_argument("--option-rom", metavar="FILE", type=Path, help="what `viommud topology viot --option-rom` wrote")
    what.add_argument(
        "--dump-dtb",
        metavar="FILE",
        type=Path,
        help="the line that makes QEMU write the base for `viommud topology dt`",
    )
    parser.add_argument(
        "--device",
        metavar="ENDPOINT=KIND:WHERE",
        type=parse_device,
        action="append",
        default=[],
        help="plug a device in: 00:02.0=vfio-pci:0000:65:00.0 or 00:03.0=vfio-user:/run/nvme.sock",
    )


_FORMATS: dict[str, Callable[[qemu_args.Line], str]] = {
    "shell": qemu_args.shell,
    "json": qemu_args.as_json,
    "libvirt": qemu_args.libvirt,
}


def _print_args(arguments: argparse.Namespace) -> int:
    configured = load_config(arguments.config, _configured)
    topology = configured.topology
    config_size = config_space.size(configured.settings)
    if configured.builtin is not None:
        config_size = builtin.OFFSET + len(builtin.render(configured.builtin, topology))
    guest = qemu_args.Guest(
        memory_mib=arguments.memory,
        cpus=arguments.cpus,
        accelerator=arguments.accel,
        socket=arguments.socket_path,
        config_size=config_size,
        topology_file=arguments.topology,
        option_rom=arguments.option_rom,
        devices=tuple(arguments.device),
        cpu=arguments.cpu,
    )
    if arguments.dump_dtb is not None:
        line = qemu_args.dump_line(topology, guest, arguments.dump_dtb)
    else:
        line = qemu_args.iommu_line(topology, guest)
    sys.stdout.write(_FORMATS[arguments.format](line))
    return 0
