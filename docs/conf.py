"""Settings of Sphinx: `sphinx-build -W docs docs/_build`."""

from __future__ import annotations

import re
from importlib.metadata import version as installed
from typing import Any

project = "asgi-deferred"
author = "the asgi-deferred authors"
copyright = "the asgi-deferred authors"  # noqa: A001
version = release = installed("asgi-deferred")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "asgi-deferred"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "source_repository": "https://github.com/asgi-deferred/asgi-deferred/",
    "source_branch": "main",
    "source_directory": "docs/",
}


def from_markdown(app: Any, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Turn the Markdown of a docstring, which editors show, into what autodoc reads: code in fences and backticks."""
    text = "\n".join(lines)
    text = re.sub(r"(?m)^( *)```python\n", r"\1.. code-block:: python\n\n", text)
    blocks = re.split(r"(?s)( *\.\. code-block:: python\n.*?\n *```)", text)
    for index, block in enumerate(blocks):
        if index % 2:
            first, *code, _ = block.split("\n")
            blocks[index] = "\n".join([first, *(f"    {line}" for line in code)])
        else:
            blocks[index] = re.sub(r"`([^`]+)`", r"``\1``", block)
    lines[:] = "".join(blocks).split("\n")


def without_directions(app: Any, page: str, text: list[str]) -> None:
    """Leave out what says to the tests how a block goes on."""
    text[0] = re.sub(r"(?m)^# continues\n", "", text[0])


def setup(app: Any) -> None:
    app.connect("source-read", without_directions)
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before napoleon
