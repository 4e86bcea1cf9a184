"""The Python blocks of the README and of the documentation are run, and the README's commands are what CI runs.

A block whose first line is `# continues` goes on in the namespace of the one before it on its page. One whose first line
names a file, such as `# app.py`, is that module. Tests and a `conftest.py` can import the modules before them.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("sh", "bash", "shell")
CONTINUES = re.compile(r"# (continues|test_\w+\.py|conftest\.py)\n")
FILE = re.compile(r"# (\w+)\.py\n")


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The line each fenced block of a page begins at, and its code."""
    text = page.read_text(encoding="utf-8")
    fence = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return [
        (text.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(fence, text, re.MULTILINE | re.DOTALL)
    ]


def programs(page: Path) -> list[list[tuple[int, str]]]:
    """A page's Python blocks, those that continue one another together."""
    found = blocks(page, "python")
    starts = [index for index, (_, code) in enumerate(found) if not CONTINUES.match(code)]
    return [found[start:end] for start, end in pairwise([*starts, len(found)])]


def shown(part: str, language: str = "python") -> str:
    """The one block of all pages that has this part."""
    (code,) = (code for page in PAGES for _, code in blocks(page, language) if part in code)
    return code


@pytest.fixture
def logs_stay() -> Iterator[None]:
    """What a block does to the log ends with it; Litestar sets the root logger to DEBUG."""
    loggers = [logging.getLogger(), logging.getLogger("asgi_deferred")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_are_found(page: Path) -> None:
    """No Python block is missed for how its fence is written."""
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page, "python")) == len(re.findall(r"^\s*[`~]{3,}\s*(?:\{.*\})?\s*py", text, re.MULTILINE))


@pytest.mark.usefixtures("logs_stay")
@pytest.mark.parametrize(
    ("page", "program"),
    [
        pytest.param(page, program, id=f"{name(page)} line {program[0][0]}")
        for page in PAGES
        for program in programs(page)
    ],
)
def test_python_blocks_run(page: Path, program: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page shows runs, and what it asserts holds."""
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for line, code in program:
        if file := FILE.match(code):
            module = ModuleType(file[1])
            monkeypatch.setitem(sys.modules, file[1], module)
        numbered = "\n" * (line - 1) + code
        exec(compile(numbered, str(page), "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    """What a page says to type is valid shell."""
    commands = "".join(code for _, code in blocks(page, *SHELL))
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)


def test_the_test_command_is_run_by_ci() -> None:
    """The README's command that passes the tests is one line, and CI runs what it reads there."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    read = re.findall(r"^test_command=.*$", ci, re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-c", f'{read[0]}; echo "$test_command"'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    commands = [line for _, code in blocks(README, *SHELL) for line in code.splitlines() if "-m pytest" in line]
    assert (len(read), shown.stdout.splitlines()) == (1, commands)
    assert len(commands) == 1
