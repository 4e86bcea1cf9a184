"""The pages for those who carry on say what is so: variables, modules, versions, and what was changed."""

from __future__ import annotations

import re
from pathlib import Path

from .test_public_surface import HOUSE, PYPROJECT

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXT = (DOCS / "contributing.md").read_text(encoding="utf-8")
PROJECT = PYPROJECT["project"]
SERVICES = "tests/engines/services.py"


def rows(section: str) -> dict[str, str]:
    """The variables of one of the two tables, and their defaults."""
    names: list[str] = ["tests", "examples"]
    tables = dict(zip(names, TEXT.split("\nThe examples read"), strict=True))
    found = re.findall(r"^\| `([A-Z_]+)` \| (.+?) \| .+ \|$", tables[section], re.MULTILINE)
    return {name: default.strip("`") for name, default in found}


def read_by(*files: Path) -> dict[str, str]:
    """The variables that the files read, and the default of each, if any of the files has one."""
    variable = re.compile(r'os\.environ(?:\.get\("(\w+)"(?:, "(.*?)")?|\["(\w+)"\])')
    found = [match for file in files for match in variable.findall(file.read_text(encoding="utf-8"))]
    return {optional or required: default for optional, default, required in sorted(found)}


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


def test_the_house_is_shown() -> None:
    """The page on the architecture lists each module in the order of imports, and names no other; so does its picture."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    picture = (DOCS / "images" / "architecture.svg").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == HOUSE
    assert set(re.findall(r"`(_\w+)`", page)) <= {*HOUSE}
    assert sorted(re.findall(r'class="module".*>(\w+)<', picture)) == sorted(HOUSE)


def test_the_named_tests_and_files_are_there() -> None:
    """Each file that these pages name by its path is there."""
    named = {
        path
        for page in ("contributing.md", "architecture.md", "versions.md")
        for path in re.findall(r"`((?:tests|asgi_deferred)/[\w/]+\.py)`", (DOCS / page).read_text(encoding="utf-8"))
        if "NAME" not in path
    }
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []


def test_the_tested_versions_are_named() -> None:
    """The page on support names the lowest versions and the Pythons that the package asks for."""
    page = (DOCS / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w[\w ]*) \| ([\d., ]*\d)", page, re.MULTILINE)
    named = {name.lower().replace(" ", "-"): versions for name, versions in rows}
    pythons = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)]
    asked = [*PROJECT["dependencies"], *(line for lines in PROJECT["optional-dependencies"].values() for line in lines)]
    lowest = dict(line.split(">=") for line in asked)
    del lowest["asgiref"]  # a part of Django's
    assert named == lowest | {"cpython": ", ".join(pythons)}


def test_the_changelog_is_one() -> None:
    """The changelog begins with what is unreleased, and the release below that is the project's version."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])
    assert [heading.partition("]")[0][1:] for heading in headings[1:2]] in ([], [PROJECT["version"]])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {*re.findall(r"^### (.+)$", changelog, re.MULTILINE)} <= kinds
