"""The pages of reference have every public name, every message, every option and every state."""

from __future__ import annotations

import ast
import re
from ast import literal_eval
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest

from asgi_deferred import Runner, TaskState

from .test_public_surface import PACKAGE, PUBLIC_NAMES

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
LOG = ("write", "say")
ERRORS = re.compile(r"[A-Z]\w*|_missing|type")


def page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text(encoding="utf-8")


def template(node: ast.expr) -> str:
    """The first sentence of a text, with `…` for what is filled in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)  # type: ignore[misc]
    return re.split(r"(?<=\.) ", re.sub(r"(%[a-z]|…)+", "…", text))[0].replace("`", "")


def messages() -> Iterator[tuple[str, str]]:
    """Every text of the package that is given to the log or to an error, and the file it is in."""
    for file in sorted(PACKAGE.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2].partition("(")[0]
                texts = node.args[1:2] if name in LOG else node.args[:1] if ERRORS.fullmatch(name) else []
                found = [template(text) for text in texts if isinstance(text, ast.Constant | ast.JoinedStr)]
                yield from ((file.name, text) for text in found if " " in text)


MESSAGES = list(messages())


def test_messages_are_found() -> None:
    """The search for messages finds those of the log, of errors and of Django's checks."""
    found = [text for _, text in MESSAGES]
    assert {"Failed: …", "Got …, which cannot be called.", "DATABASES[…] has CONN_MAX_AGE."} <= set(found)
    assert len(found) > 50


@pytest.mark.parametrize(("file", "message"), MESSAGES)
def test_each_message_is_listed(file: str, message: str) -> None:
    """Whoever searches the page of messages for a line of the log or an error's text finds it."""
    assert f"| `{message}` |" in page("messages").replace("`async def`", "async def"), file


def test_no_listed_message_is_gone() -> None:
    """The page lists no message that the package does not have."""
    listed = re.findall(r"^\| `([^`]*…[^`]*)` \|", page("messages"), re.MULTILINE)
    assert set(listed) - {text for _, text in MESSAGES} == set()


@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_each_public_name_is_in_the_reference(module: str, name: str) -> None:
    """The page of the API has an entry for each public name."""
    entry = rf"^\.\. (?:auto)?\w+:: (?:{module}\.)?{name}(?:\(.*\))?$"
    section = page("api").partition(f"`{module}`\n")[2].partition("\n## ")[0]
    assert re.search(entry, section, re.MULTILINE)


def test_options_have_their_rows() -> None:
    """The page of options has a row for each argument of `Runner`, with its default."""
    section = page("options").partition("## Options of a runner\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?(.+?)`? \|", section, re.MULTILINE)
    defaults = {name: literal_eval(text.replace("10 000", "10000")) for name, text in rows}
    assert defaults == {name: option.default for name, option in signature(Runner).parameters.items()}


def test_states_have_their_rows() -> None:
    """The page of states has a row for each state, in their order."""
    assert re.findall(r"^\| ([A-Z_]+) \|", page("states"), re.MULTILINE) == [state.name for state in TaskState]
