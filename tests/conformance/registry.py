"""The rules, and which tests show that they hold: read from files, nothing is run.

A test names its rules: in Python `@pytest.mark.rule("R-MAP-4")` before the function, in C a comment
`/* rule: R-MAP-4 */` before the function.  Parameters of a test are not told apart.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = Path(__file__).with_name("rules.toml")
LEVELS = ("MUST", "SHOULD", "MAY", "text", "own")
BINDING = ("MUST", "SHOULD")
"""Levels without which the device does not conform."""

_C_COMMENT = re.compile(r"/\*\s*rule:\s*([^*]*?)\s*\*/")
_C_FUNCTION = re.compile(r"^(?:static\s+)?(?:int|void)\s+(test_\w+)\s*\(", re.MULTILINE)


class RegistryError(Exception):
    """A file of the registry, or a mark, is wrong; the message is one line."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule."""

    id: str
    level: str
    section: str
    summary: str


@dataclass(frozen=True, slots=True, order=True)
class Proof:
    """A test function, by file and name."""

    file: str
    """Relative to the root of the repository."""
    name: str

    @property
    def is_c(self) -> bool:
        """Is it run by ctest?"""
        return self.file.endswith(".c")


def load_rules(path: Path = RULES) -> dict[str, Rule]:
    """Every rule, in the order of the file.

    :raises RegistryError: an entry is not level, section and summary.
    """
    rules = {}
    for identifier, entry in tomllib.loads(path.read_text())["rules"].items():
        match entry:
            case [str(level), str(section), str(summary)] if level in LEVELS:
                rules[identifier] = Rule(identifier, level, section, summary)
            case _:
                raise RegistryError(f"{path.name}: {identifier}: must be level, section and summary")
    return rules


def marked_tests(root: Path = ROOT) -> dict[str, list[Proof]]:
    """Tests by rule, as the files say."""
    found: dict[str, set[Proof]] = {}
    for test, rule in [*_in_python(root), *_in_c(root)]:
        found.setdefault(rule, set()).add(test)
    return {rule: sorted(tests) for rule, tests in found.items()}


def check(rules: dict[str, Rule], tests: dict[str, list[Proof]]) -> None:
    """Every mark names a rule that exists.

    :raises RegistryError: one does not.
    """
    for identifier, marked in tests.items():
        if identifier not in rules:
            raise RegistryError(f"{marked[0].file}: {marked[0].name}: there is no rule {identifier}")


def _in_python(root: Path) -> Iterator[tuple[Proof, str]]:
    for path in sorted((root / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.rule" not in text:
            continue
        file = str(path.relative_to(root))
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
                for rule in _rules_of(node, file):
                    yield Proof(file, node.name), rule


def _rules_of(node: ast.FunctionDef | ast.AsyncFunctionDef, file: str) -> Iterator[str]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.rule":
            for argument in decorator.args:
                if not isinstance(argument, ast.Constant) or not isinstance(argument.value, str):
                    raise RegistryError(f"{file}: {node.name}: a rule must be written out")
                yield argument.value


def _in_c(root: Path) -> Iterator[tuple[Proof, str]]:
    for path in sorted((root / "csrc/tests").glob("test_*.c")):
        text = path.read_text()
        for comment in _C_COMMENT.finditer(text):
            function = _C_FUNCTION.search(text, comment.end())
            if function is None:
                continue
            # Classes of hostile input (H7) are marked in the same way and are no rules.
            for rule in re.findall(r"R-[\w-]+", comment[1]):
                yield Proof(str(path.relative_to(root)), function[1]), rule
