"""The README's table of guarantees names tests that hold them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = re.findall(r"^\| (G\d+) \|.*\| (`.+`) \|$", (TESTS.parent / "README.md").read_text(), re.MULTILINE)


def test_each_guarantee_has_its_row() -> None:
    """The README lists G1 to G12, each once and in order."""
    assert [guarantee for guarantee, _ in ROWS] == [f"G{number}" for number in range(1, 13)]


@pytest.mark.parametrize(("guarantee", "held_by"), ROWS)
def test_the_named_modules_hold_it(guarantee: str, held_by: str) -> None:
    """Each module that a row names has a test that states the row's guarantee in its docstring."""
    for name in re.findall(r"`(.+?)`", held_by):
        text = (TESTS / f"{name}.py").read_text()
        assert re.search(rf'"""(G\d+, )*{guarantee}(, G\d+)*: ', text), name
