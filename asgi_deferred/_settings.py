"""A runner's configuration, checked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from inspect import isasyncgenfunction, isgeneratorfunction
from typing import Any, Literal, Protocol, TypeAlias

from ._functions import is_async, unwrap_partial
from ._outcome import When, check_when
from ._tasks import DeferredTask, TaskEvent, check_count, check_positive

Observer: TypeAlias = Callable[[TaskEvent], object]
"""A function that is called when a task starts and when it ends: `Runner(observers=[...])`."""
Around: TypeAlias = Callable[[DeferredTask], AbstractContextManager[object] | AbstractAsyncContextManager[object]]
"""A function that returns a context manager to enter around a task's call: `Runner(around=[...])`."""


class ASGIApp(Protocol):
    """Any ASGI 3 application. Its framework may use other types for the three arguments."""

    def __call__(self, scope: Any, receive: Any, send: Any, /) -> Awaitable[None]: ...


@dataclass(kw_only=True, eq=False, repr=False, slots=True)  # CPython reads a slot faster than a field with a default
class Settings:
    """The arguments of `Runner`, which documents them."""

    max_concurrency: int = 1000
    max_threads: int = 40
    max_pending: int = 10_000
    overflow: Literal["wait", "reject"] = "wait"
    concurrent: bool = False
    when: When = "success"
    timeout: float | None = None
    enqueue_timeout: float = 5.0
    drain_timeout: float = 20.0
    observers: Sequence[Observer] = ()
    around: Sequence[Around] = ()
    unavailable: ASGIApp | None = None

    def __post_init__(self) -> None:
        check_count("max_concurrency", self.max_concurrency)
        check_count("max_threads", self.max_threads)
        check_count("max_pending", self.max_pending)
        check_positive("enqueue_timeout", self.enqueue_timeout)
        check_positive("drain_timeout", self.drain_timeout)
        if self.timeout is not None:
            check_positive("timeout", self.timeout)
        if self.overflow not in ("wait", "reject"):
            raise ValueError(f"overflow={self.overflow!r} is unknown: use 'wait' or 'reject'")
        check_when(self.when)
        self.observers, self.around = tuple(self.observers), tuple(self.around)
        for observer in self.observers:
            _check_observer(observer)
        for around in self.around:
            _check_around(around)
        if self.unavailable is not None and not callable(self.unavailable):
            raise TypeError(
                f"unavailable={self.unavailable!r} is not an ASGI application: use one, such as a Starlette response"
            )


def _check_observer(observer: object) -> None:
    if not callable(observer):
        raise TypeError(f"observers has {observer!r}, which cannot be called: use functions (TaskEvent) -> None")
    if is_async(observer):
        raise TypeError(
            f"observers has {observer!r}, which is async and would not be awaited: use a plain function "
            "(TaskEvent) -> None. It can defer() slow work."
        )


def _check_around(around: object) -> None:
    if not callable(around):
        raise TypeError(f"around has {around!r}, which cannot be called: use (DeferredTask) -> context manager")
    inner = unwrap_partial(around)
    if is_async(inner) or isgeneratorfunction(inner) or isasyncgenfunction(inner):
        raise TypeError(
            f"around has {around!r}, which returns no context manager: decorate a generator function with "
            "@contextlib.contextmanager, an async one with @contextlib.asynccontextmanager."
        )
