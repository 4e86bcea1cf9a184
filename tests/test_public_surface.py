"""The surface as a list, what each name says of itself, and which module may import which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from enum import Enum
from importlib import import_module, metadata
from inspect import isclass, isfunction, ismodule, signature
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import pytest

import asgi_deferred

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(asgi_deferred.__file__).parent
ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEIGHBOURS = [module.name for module in iter_modules([str(PACKAGE)]) if not module.name.startswith("_")]
PUBLIC_MODULES = ["asgi_deferred", *(f"asgi_deferred.{name}" for name in NEIGHBOURS)]
PUBLIC_NAMES = [(module, name) for module in PUBLIC_MODULES for name in import_module(module).__all__]

# The house, from the ground up: a module imports from those before it.
CORE = [
    "_exceptions",
    "_functions",
    "_outcome",
    "_engines",
    "_states",
    "_account",
    "_loops",
    "_threads",
    "_tasks",
    "_settings",
    "_reports",
    "_calls",
    "_scheduler",
    "_drains",
    "_waiting",
    "_durable",
    "_runner",
    "_lifespan",
    "_middleware",
]
HOUSE = [
    *CORE,
    "testing",
    "engines",
    "opentelemetry",
    "monitor",
    "dbos",
    "_starlette",
    "_uploads",
    "starlette",
    "fastapi",
    "_django",
    "_django_tasks",
    "django",
]
# What a neighbour's import may load of the below.
LOADS = {
    "asgi_deferred.dbos": {"dbos", "sqlalchemy"},
    "asgi_deferred.django": {"asgiref", "django", "sqlparse"},
    "asgi_deferred.fastapi": {"fastapi", "pydantic", "starlette"},
    "asgi_deferred.opentelemetry": {"opentelemetry"},
    "asgi_deferred.starlette": {"starlette"},
}
FRAMEWORKS = {
    "asgiref",
    "celery",
    "dbos",
    "django",
    "dramatiq",
    "fastapi",
    "httpx",
    "huey",
    "litestar",
    "procrastinate",
    "pydantic",
    "pytest",
    "quart",
    "redis",
    "sqlalchemy",
    "sqlparse",
    "starlette",
    "streaq",
    "taskiq",
    "trio",
    "uvicorn",
    "uvloop",
}


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_all_is_sorted_and_complete(module: str) -> None:
    """Each public module has a docstring, and a sorted `__all__` of all that it defines, or as the package shows."""
    namespace = vars(import_module(module))
    public = {name: value for name, value in namespace.items() if not name.startswith("_") and not ismodule(value)}
    if module != "asgi_deferred":
        public = {name: value for name, value in public.items() if getattr(value, "__module__", None) == module}
    assert namespace["__doc__"]
    assert namespace["__all__"] == sorted(set(namespace["__all__"]))
    assert public.keys() <= set(namespace["__all__"])


def aliases() -> Iterator[tuple[str, str]]:
    """The package's type aliases, which are objects of `typing`, each with the docstring below it."""
    for module in HOUSE:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
        for alias, below in pairwise(tree.body):
            match alias, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    yield name, text


ALIASES = dict(aliases())


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """The public methods and attributes of a class of ours."""
    if isclass(value) and not issubclass(value, Enum):
        yield from ((name, member) for name, member in vars(value).items() if not name.startswith("_"))


@pytest.mark.parametrize(("module", "name"), PUBLIC_NAMES)
def test_every_name_is_ours_and_documented(module: str, name: str) -> None:
    """Each public name has a docstring, which also names each attribute and parameter that has none of its own."""
    value = getattr(import_module(module), name)
    value = value.__origin__ if get_origin(value) is Annotated else value
    text = ALIASES.get(name) or value.__doc__ or ""
    assert name in ALIASES or value.__module__.partition(".")[0] == "asgi_deferred"
    assert text
    undocumented = [
        member_name
        for member_name, member in members(value)
        if not getattr(member, "__doc__", None) and (isfunction(member) or not re.search(rf"\b{member_name}\b", text))
    ]
    assert undocumented == []


@pytest.mark.parametrize("function", [asgi_deferred.Runner, asgi_deferred.DeferredTasks.options])
def test_every_option_is_documented(function: Any) -> None:
    """Each option of the runner and of `options()` has an entry in the docstring."""
    parameters = set(signature(function).parameters) - {"self"}
    assert parameters == set(re.findall(r"^ +(\w+): ", function.__doc__, re.MULTILINE)) & parameters


def test_exceptions_are_one_family() -> None:
    """Each exception of a caller's is a DeferredError and no other's base, and says when it is raised."""
    names = [name for module, name in PUBLIC_NAMES if module == "asgi_deferred" and name != "DeferredError"]
    values = [getattr(asgi_deferred, name) for name in names]
    exceptions = [value for value in values if isclass(value) and issubclass(value, BaseException)]
    assert asgi_deferred.DeferredError.__bases__ == (Exception,)
    assert asgi_deferred.TaskTimedOut.__bases__ == (TimeoutError,)  # a task's error, which nobody catches
    exceptions.remove(asgi_deferred.TaskTimedOut)
    assert {value.__bases__ for value in exceptions} == {(asgi_deferred.DeferredError,)}
    assert [value for value in exceptions if not (value.__doc__ or "").startswith("Raised ")] == []


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_importing_loads_no_framework(module: str) -> None:
    """The package loads no framework or engine, and a neighbour's module none but its own."""
    program = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    top_level = {name.partition(".")[0] for name in loaded.split()}
    assert "asgi_deferred" in top_level
    assert top_level & FRAMEWORKS - LOADS.get(module, set()) == set()


def nodes(module: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))


def imports(module: str) -> set[str]:
    """The modules that a module of the package imports, also for type checkers; the package's with a leading dot."""
    found: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level and not node.module:
            found.update(f".{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(("." if node.level else "") + (node.module or "").partition(".")[0])
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(module: str) -> tuple[set[str], set[str]]:
    """The private names that a module defines, and those that it uses as attributes."""
    defined: set[str] = set()
    used: set[str] = set()
    for node in nodes(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            defined |= set(ast.literal_eval(node.value))
    return {*filter(is_private, defined)}, {*filter(is_private, used)}


def test_the_core_is_listed() -> None:
    """Each module of the core has its place in the order of imports."""
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == {*HOUSE}


@pytest.mark.parametrize("module", CORE)
def test_imports_run_one_way(module: str) -> None:
    """A module of the core imports those before it, the standard library and anyio, and nothing else."""
    before = {f".{name}" for name in CORE[: CORE.index(module)]}
    assert imports(module) <= before | sys.stdlib_module_names | {"anyio"}


@pytest.mark.parametrize("module", HOUSE)
def test_nothing_reaches_upwards(module: str) -> None:
    """A module imports none of those after it, and uses no private attribute that only one of those defines."""
    position = HOUSE.index(module) + 1
    assert imports(module) & {f".{name}" for name in HOUSE[position:]} == set()
    defined: set[str] = set().union(*(private_names(each)[0] for each in HOUSE[:position]))
    later: set[str] = set().union(*(private_names(each)[0] for each in HOUSE[position:]))
    assert private_names(module)[1] & (later - defined) == set()


def test_the_package_is_typed() -> None:
    """Type checkers are told to read the package's own annotations."""
    assert (PACKAGE / "py.typed").read_bytes() == b""


NOT_DJANGO = [(module, name) for module, name in PUBLIC_NAMES if module != "asgi_deferred.django"]


@pytest.mark.parametrize(("module", "name"), NOT_DJANGO)  # Django's own `Task` is generic for type checkers alone
def test_annotations_resolve_at_run_time(module: str, name: str) -> None:
    """Frameworks and users can ask a public name, and what they call of it, for type hints."""
    value = getattr(import_module(module), name)
    asked = [value, value.__call__, getattr(value, "__init__", None), *(member for _, member in members(value))]
    for each in asked:
        if isclass(each) or isfunction(each):
            get_type_hints(each)


def test_metadata() -> None:
    """The installed version is the project's, and only anyio comes with it."""
    assert metadata.version("asgi-deferred") == PYPROJECT["project"]["version"]
    required = [line for line in metadata.requires("asgi-deferred") or [] if "extra ==" not in line]
    assert [re.split(r"[^\w-]", line)[0] for line in required] == ["anyio"]
    assert metadata.metadata("asgi-deferred")["License-Expression"] == "MIT"


def test_the_lowest_versions_of_the_extras_are_tested() -> None:
    """What an extra asks for is in the group of the tests too, word for word."""

    def flat(group: str) -> Iterator[str]:
        for entry in PYPROJECT["dependency-groups"][group]:
            yield from [entry] if isinstance(entry, str) else flat(entry["include-group"])

    asked = {line for extra in PYPROJECT["project"]["optional-dependencies"].values() for line in extra}
    assert asked <= {*flat("tests")}
