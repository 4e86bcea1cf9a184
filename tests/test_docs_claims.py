"""What the README and the pages claim of tests: those that hold a guarantee, and those that they show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_docs import FILE, PAGES, README, ROOT, blocks, name

TESTS = Path(__file__).parent
SHOWN = {"tutorial": 2, "how-to/testing": 3}
GUARANTEES = (ROOT / "docs" / "explanation" / "guarantees.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (G\d+) \|.*\| (`.+`) \|$", GUARANTEES, re.MULTILINE)
SOURCE = re.compile(
    r"https://(?:github\.com|raw\.githubusercontent\.com)/asgi-deferred/asgi-deferred/(?:(?:blob|tree)/)?main/([^)\s#]+)"
)
BUILT = re.compile(r"https://asgi-deferred\.readthedocs\.io/en/latest/([^)\s#]+)\.html")


def test_each_guarantee_has_its_row() -> None:
    """The page of guarantees lists G1 to G13, each once and in order."""
    assert [guarantee for guarantee, _ in ROWS] == [f"G{number}" for number in range(1, 14)]


@pytest.mark.parametrize(("guarantee", "held_by"), ROWS)
def test_the_named_modules_hold_it(guarantee: str, held_by: str) -> None:
    """Each module that a row names has a test that states the row's guarantee in its docstring."""
    for module in re.findall(r"`(.+?)`", held_by):
        text = (TESTS / f"{module}.py").read_text()
        assert re.search(rf'"""(G\d+, )*{guarantee}(, G\d+)*: ', text), module


@pytest.mark.parametrize(("page", "tests"), SHOWN.items())
def test_the_shown_tests_pass(tmp_path: Path, page: str, tests: int) -> None:
    """The files that a page shows, an application, its tests and their fixtures, pass as they stand."""
    for _, code in blocks(ROOT / "docs" / f"{page}.md", "python"):
        if file := FILE.match(code):
            (tmp_path / f"{file[1]}.py").write_text(code)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # it starts three times as fast
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1][:8]) == (0, f"{tests} passed"), run.stdout


def test_the_readme_is_short_and_works_where_packages_are_listed() -> None:
    """The README is read in two minutes, and each of its links is a whole address, as a package's page has no folders."""
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 8 * 1024
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_ourselves_lead_somewhere(page: Path) -> None:
    """Each link to the repository or to the documentation names a file that is there."""
    text = page.read_text(encoding="utf-8")
    files = [*SOURCE.findall(text), *(f"docs/{name}.md" for name in BUILT.findall(text))]
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_each_example_is_listed() -> None:
    """The page of examples names each program, and each folder of programs."""
    examples = {path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py" or path.is_dir()}
    listed = re.findall(r"/examples/([^/)]+)\)", (ROOT / "docs" / "examples.md").read_text(encoding="utf-8"))
    assert examples - {"__init__.py", "__pycache__"} - set(listed) == set()
