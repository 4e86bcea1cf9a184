"""CONTRIBUTING.md names what the tests and the examples read from the environment, and only commands that work."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROWS = set(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", TEXT, re.MULTILINE))
READ = re.compile(r"""\benviron(?:\.get\("(\w+)"(?:, "?(.*?)"?\))?|\["(\w+)"\]|\.setdefault\("(\w+)")""")


def variables(*folders: str) -> set[tuple[str, str]]:
    """The variables that the code reads, and their defaults as CONTRIBUTING.md writes them."""
    return {
        (name or required, f"`{default}`" if default else "none")
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        for name, default, required, _ in READ.findall(file.read_text(encoding="utf-8"))
    }
