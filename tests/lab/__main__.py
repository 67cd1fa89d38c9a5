"""Build the lab and use it: see scripts/lab."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from vm.archive import ArchiveError

from lab import kernel, machine, prepared, site, userland
from lab.machine import Shape
from lab.site import ROOT


def _test(words: list[str], shape: Shape) -> int:
    """Run pytest in the lab; what the tests leave is in build/lab/out."""
    out = ROOT / "build/lab/out"
    shutil.rmtree(out, ignore_errors=True)
    prepared.prepare(out)
    # The project cannot be written to there.
    options = ["-p", "no:cacheprovider", "--basetemp=/out/tests", "-c", "/project/pyproject.toml", "--color=yes"]
    # A machine in a machine in a machine: what is ample elsewhere may be short here.
    options += ["--timeout=1800", "-o", "faulthandler_timeout=900"]
    command = ["python3", "-m", "pytest", *options, *(words or ["/project/tests/host"])]
    return machine.run(command, shape, out)


def _bench(target: Path | None, shape: Shape) -> int:
    out = ROOT / "build/lab/bench"
    shutil.rmtree(out, ignore_errors=True)
    prepared.prepare(out)
    prepared.build_bench(out)
    status = machine.run(["python3", "-m", "host.bench", "/out/figures.json"], shape, out)
    if status == 0:
        figures = (out / "figures.json").read_text()
        print(figures, end="")
        if target is not None:
            target.write_text(figures)
    return status


def main() -> int:
    """Do what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/lab", description="An arm64 host with KVM and an SMMUv3 in a box.")
    parser.add_argument("--cpus", type=int, default=2, help="of the lab (default: %(default)s)")
    what = parser.add_subparsers(metavar="COMMAND", dest="what")
    what.add_parser("build", help="build what is not in the cache (the default)")
    what.add_parser("shell", help="a prompt in the lab")
    what.add_parser("run", help="run a command in the lab; its exit status is this one's")
    what.add_parser("test", help="run the tests of tests/host in the lab; what follows is for pytest")
    bencher = what.add_parser("bench", help="measure stage 2 in the lab (scripts/bench stage2)")
    bencher.add_argument("--json", metavar="FILE", type=Path, help="write the figures here as well")
    given = sys.argv[1:]
    # What follows these words is not for us, options included.
    end = next((at + 1 for at, word in enumerate(given) if word in ("run", "test")), len(given))
    arguments, words = parser.parse_args(given[:end]), given[end:]
    shape = Shape(cpus=arguments.cpus)
    try:
        if arguments.what == "shell":
            return machine.shell(shape)
        if arguments.what == "run":
            return machine.run(words, shape)
        if arguments.what == "bench":
            return _bench(arguments.json, shape)
        if arguments.what == "test":
            return _test(words, shape)
        for part in (kernel.image(), userland.root(), site.site()):
            print(part)
    except ArchiveError as error:
        print(f"lab: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
