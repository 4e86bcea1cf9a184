"""CONTRIBUTING.md names what the tests and the examples read from the environment."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SERVICES = "tests/engines/services.py"


def rows(section: str) -> dict[str, str]:
    """The variables of one of the two tables, and their defaults."""
    names: list[str] = ["tests", "examples"]
    tables = dict(zip(names, TEXT.split("\nThe examples read"), strict=True))
    found = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| .+ \|$", tables[section], re.MULTILINE)
    return {name: default.strip("`") for name, default in found}


def read_by(*files: Path) -> dict[str, str]:
    """The variables that the files read, and the defaults that are not empty texts."""
    variable = re.compile(r'os\.environ(?:\.get\("(\w+)"(?:, "(.*?)")?|\["(\w+)"\])')
    found = [match for file in files for match in variable.findall(file.read_text(encoding="utf-8"))]
    return {optional or required: default for optional, default, required in found}


def test_services_of_the_tests() -> None:
    """Each service's variable is there with its default, and no other module of tests or benchmarks has one of its own."""
    services = read_by(ROOT / SERVICES)
    assert services.pop("CI") == ""
    assert rows("tests") == services
    files = {file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")}
    others = read_by(*files - {ROOT / SERVICES})
    assert [name for name, default in others.items() if "://" in default] == []


def test_variables_of_the_examples() -> None:
    """Each variable that an example reads is there, with its default."""
    examples = read_by(*(ROOT / "examples").rglob("*.py"))
    listed = rows("examples")
    assert listed.keys() == examples.keys()
    assert {name: default for name, default in examples.items() if default} == {
        name: listed[name] for name, default in examples.items() if default
    }
