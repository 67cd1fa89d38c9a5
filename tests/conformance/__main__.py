"""scripts/conformance: run the tests of the rules, print the table, keep docs/conformance.md current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from conformance import registry, results, table

DOCUMENT = registry.ROOT / "docs/conformance.md"


def main(arguments: list[str]) -> int:
    """Returns 0 when every MUST and SHOULD has a test and no test fails."""
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=__doc__, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="print rules and tests without running anything")
    parser.add_argument(
        "--write", action="store_true", help=f"after a run that passed, write {DOCUMENT.relative_to(registry.ROOT)}"
    )
    parser.add_argument("options", nargs="*", metavar="OPTION", help="for pytest, after --")
    parsed = parser.parse_args(arguments)
    try:
        rules, tests = registry.load_rules(), registry.marked_tests()
        registry.check(rules, tests)
    except registry.RegistryError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    marked = {test for group in tests.values() for test in group}
    outcome = {} if parsed.list else results.run(marked, parsed.options)
    rows = table.rows(rules, tests, outcome)
    print(table.plain(rows))
    if parsed.list:
        return 0
    unmarked = sorted(set(outcome) - marked)
    for test in unmarked:
        print(f"conformance: {test.file}: {test.name} names rules in a way that cannot be read", file=sys.stderr)
    good = all(row.good for row in rows) and not unmarked
    if not good:
        return 1
    if parsed.write:
        write(DOCUMENT, table.markdown(rows))
    return 0


def write(path: Path, text: str) -> None:
    """Write a document, making its directory if need be."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
