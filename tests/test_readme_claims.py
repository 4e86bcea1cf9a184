"""The README's table of guarantees names tests that hold them, and the tests it shows pass."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (G\d+) \|.*\| (`.+`) \|$", README, re.MULTILINE)


def test_each_guarantee_has_its_row() -> None:
    """The README lists G1 to G12, each once and in order."""
    assert [guarantee for guarantee, _ in ROWS] == [f"G{number}" for number in range(1, 13)]


@pytest.mark.parametrize(("guarantee", "held_by"), ROWS)
def test_the_named_modules_hold_it(guarantee: str, held_by: str) -> None:
    """Each module that a row names has a test that states the row's guarantee in its docstring."""
    for name in re.findall(r"`(.+?)`", held_by):
        text = (TESTS / f"{name}.py").read_text()
        assert re.search(rf'"""(G\d+, )*{guarantee}(, G\d+)*: ', text), name


def test_the_shown_tests_pass(tmp_path: Path) -> None:
    """The tests and fixtures of the section on testing pass as they stand."""
    section = README.partition("\n## Testing\n")[2].partition("\n## ")[0]
    file = tmp_path / "test_shown.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)))
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.splitlines()[-1][:8]) == (0, "3 passed"), run.stdout
