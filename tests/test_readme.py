"""The README's Python blocks are run, and its commands are what CI runs.

A block whose first line is `# continues` goes on in the namespace of the one before it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[tuple[int, str]]:
    """The line each fenced block begins at, and its code."""
    fence = rf"^```(?:{'|'.join(languages)})\n(.*?)^```$"
    return [
        (TEXT.count("\n", 0, match.start(1)) + 1, match[1])
        for match in re.finditer(fence, TEXT, re.MULTILINE | re.DOTALL)
    ]


def programs() -> list[list[tuple[int, str]]]:
    """The Python blocks, those that continue one another together."""
    found = blocks("python")
    starts = [index for index, (_, code) in enumerate(found) if not code.startswith("# continues")]
    return [found[start:end] for start, end in pairwise([*starts, len(found)])]


def test_blocks_are_found() -> None:
    """No Python block is missed for how its fence is written."""
    assert TEXT.startswith("# asgi-deferred\n")
    assert len(blocks("python")) == len(re.findall(r"^\s*[`~]{3,}\s*py", TEXT, re.MULTILINE))


@pytest.mark.parametrize("program", [pytest.param(program, id=f"line {program[0][0]}") for program in programs()])
def test_python_blocks_run(program: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows runs, and what it asserts holds."""
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    for line, code in program:
        numbered = "\n" * (line - 1) + code
        exec(compile(numbered, str(README), "exec", dont_inherit=True), vars(module))


def test_commands_parse() -> None:
    """What the README says to type is valid shell."""
    commands = "".join(code for _, code in blocks("sh", "bash", "shell"))
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True)


def test_the_test_command_is_run_by_ci() -> None:
    """The README's command that passes the tests is one line, and CI runs what it reads there."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    read = re.findall(r"^test_command=.*$", ci, re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-c", f'{read[0]}; echo "$test_command"'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    commands = [line for _, code in blocks("sh", "bash", "shell") for line in code.splitlines() if "-m pytest" in line]
    assert (len(read), shown.stdout.splitlines()) == (1, commands)
    assert len(commands) == 1
