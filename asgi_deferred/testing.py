"""Help for tests of applications that defer: look at the deferred tasks, or wait for them.

Both functions return context managers that apply to the whole process. They work with any client, event loop and
thread, with or without a lifespan. You can use them as pytest fixtures:

```python
@pytest.fixture
def deferred() -> Iterator[list[DeferredTask]]:
    with record() as tasks:
        yield tasks


@pytest.fixture(autouse=True)
def finish_deferred() -> Iterator[None]:
    with inline(raise_errors=True):
        yield
```
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

from . import _scheduler
from ._engines import recognise
from ._functions import is_async
from ._runner import Runner
from ._scheduler import Scheduler, check_durable
from ._states import TaskState
from ._tasks import DeferredTask, DeferredTasks

__all__ = ["inline", "record"]

_add, _report = Scheduler.add, Scheduler.report_end


@contextmanager
def record() -> Iterator[list[DeferredTask]]:
    """Collect tasks instead of running them. The block gets a list, which grows with each accepted task.

    The tasks never run, and `statistics()` does not count them. They stay PENDING, unless they are cancelled or
    replaced by `key`. Bad input raises the usual errors, but no limit applies. If blocks are nested, the innermost one
    collects.

    Example:
        ```python
        def test_signup_sends_a_welcome() -> None:
            with record() as tasks:
                TestClient(app).post("/signup", params={"email": "ada@example.org"})
            assert [(task.func, task.args) for task in tasks] == [(send_welcome, ("ada@example.org",))]
        ```
    """
    recorded: list[DeferredTask] = []
    nobody = Scheduler(Runner())
    lists: dict[DeferredTasks, DeferredTasks] = {}

    def add(_: Scheduler, task: DeferredTask) -> None:
        tasks = task._list
        if tasks not in lists:
            lists[tasks] = DeferredTasks(nobody, tasks._scope)
        task._list = lists[tasks]
        _add(nobody, task)
        recorded.append(task)

    with _kept_jobs_allowed(), patch.object(Scheduler, "add", add):
        yield recorded


@contextmanager
def inline(*, raise_errors: bool = False) -> Iterator[None]:
    """Make every request finish its tasks before its ASGI call returns, and so before a test client has the response.

    Tasks of engines run in this process too, without a broker: the function that the engine would call is called. If
    blocks are nested, the innermost one decides about `raise_errors`.

    Args:
        raise_errors: Raise the error of the request's first task that FAILED or TIMED_OUT, once all of its tasks have
            ended. It is raised out of the ASGI call, and test clients raise it in the test. If the application itself
            raised, that error is raised instead.

    Example:
        ```python
        def test_signup_writes_an_audit_line() -> None:
            with inline(raise_errors=True):
                TestClient(app).post("/signup", params={"email": "ada@example.org"})
            assert audit_lines() == ["ada@example.org signed up"]
        ```
    """
    errors: dict[DeferredTasks, BaseException | None] = {}

    outer = Scheduler.add

    def add(scheduler: Scheduler, task: DeferredTask) -> None:
        engine = recognise(task.func)
        if engine is not None:
            task._call = partial(engine.local(task.func))
            task._async = is_async(task._call)
            task.timeout = None
        tasks = task._list
        outer(scheduler, task)
        tasks._durable = False

    def report_end(scheduler: Scheduler, task: DeferredTask) -> None:
        if task.state in (TaskState.FAILED, TaskState.TIMED_OUT):
            errors.setdefault(task._list, task.error)
        _report(scheduler, task)

    async def end(runner: Runner, tasks: DeferredTasks) -> None:
        failed = tasks._error is not None
        await runner._run_here(tasks)
        error = errors.pop(tasks, None)
        if error is not None and raise_errors and not failed:
            raise error

    with (
        _kept_jobs_allowed(),
        patch.multiple(Scheduler, add=add, report_end=report_end),
        patch.object(Runner, "_end", end),
    ):
        yield


def _kept_jobs_allowed() -> Any:
    """Allow durable tasks of engines that keep their jobs in this process."""
    return patch.object(_scheduler, "check_durable", partial(check_durable, kept=True))
