"""What a callable and its code reveal without a call."""

from __future__ import annotations

from functools import partial
from inspect import CO_COROUTINE, iscoroutinefunction
from types import CodeType, FunctionType, MethodType
from typing import Any


def unwrap_partial(func: Any) -> Any:
    while isinstance(func, partial):
        func = func.func
    return func


def name_of(func: Any) -> str:
    """Return the qualified name of a callable, of the function in a `partial`, or of the callable's type."""
    inner = func.__func__ if type(func) is MethodType else func
    if type(inner) is FunctionType:
        return inner.__qualname__
    func = unwrap_partial(func)
    try:
        name = getattr(func, "__qualname__", None)
    except Exception:  # a proxy may raise or return anything, and a report must not fail for that
        name = None
    return name if name and isinstance(name, str) else type(func).__qualname__


def is_async(func: Any) -> bool:
    """Whether calling `func` returns a coroutine, as far as this shows without a call."""
    inner = func.__func__ if type(func) is MethodType else func
    if type(inner) is FunctionType:
        if inner.__code__.co_flags & CO_COROUTINE:
            return True
        if not inner.__dict__:  # so nobody has marked it as a coroutine function
            return False
    func = unwrap_partial(func)
    return iscoroutinefunction(func) or iscoroutinefunction(getattr(type(func), "__call__", None))  # noqa: B004


def line_of(code: CodeType, lasti: int) -> int:
    """Return the line of an instruction, a frame's `f_lasti`; the first line if the code has no such instruction."""
    lines = (line for start, end, line in code.co_lines() if start <= lasti < end)
    return next(lines, None) or code.co_firstlineno
