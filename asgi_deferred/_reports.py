"""Events for observers, and lines for the log. Every report leaves through this module.

1. A report is made outside the account's lock and in the context of the task. It never raises, whatever an observer
   does, or a handler, filter or formatter of the log.
2. Each final state makes one event. If it is a state that the user did not want, it also makes one line in the log.
   The other states are logged at DEBUG. A skipped task is logged at INFO once for each line of code that adds it, with
   advice on what to write instead.
3. A line names the task, the line of code that added it, and the request. It has one line, a limited length, and no
   argument of the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from logging import DEBUG, ERROR, INFO, WARNING, getLogger
from traceback import print_exc
from typing import Any

from ._outcome import explain_rule
from ._states import TaskState
from ._tasks import DeferredTask, DeferredTasks, TaskEvent

logger = getLogger("asgi_deferred")

LONGEST = 200  # characters of a name or a request in the log

RUNNING, SUCCEEDED, FAILED = TaskState.RUNNING, TaskState.SUCCEEDED, TaskState.FAILED


def report(task: DeferredTask, state: TaskState, observers: Sequence[Callable[[TaskEvent], object]]) -> None:
    """Report that a task has entered a state, in its context."""
    if state is not RUNNING and logger.isEnabledFor(DEBUG if state is SUCCEEDED else _level(task, state)):
        _log(task, state)
    if observers:
        event = TaskEvent._now(task, task._list, state)
        for observer in observers:
            try:
                observer(event)
            except BaseException as exc:
                write(
                    ERROR, "Observer %r failed on %s", observer, describe(task), error=exc, extra=_fields(task, state)
                )


def is_quiet(observers: Sequence[Callable[[TaskEvent], object]]) -> bool:
    """Whether neither an observer nor the log wants to know about a task that succeeds."""
    return not observers and not logger.isEnabledFor(DEBUG)


def log_abandoned(seconds: float, tasks: Iterable[DeferredTask]) -> None:
    names = Counter(_short(task.name) for task in tasks)
    left = ", ".join(f"{name} ({count})" for name, count in names.items())
    write(ERROR, "drain_timeout=%s s is over; abandoning deferred tasks: %s", seconds, left)


def warn_mounted(tasks: DeferredTasks) -> None:
    """Warn once about a middleware that the server's lifespan does not reach."""
    if _is_first(tasks, "mounted"):
        write(
            WARNING,
            "The tasks of request %s run inside its call, and a server may drop them when it shuts down: this "
            "DeferredMiddleware wraps a mounted application or a route, which no lifespan reaches. Wrap the outermost "
            "application instead, or enter the runner, `async with runner:`, in the outermost one's lifespan. "
            "(said once)",
            _short(tasks._request),
        )


def write(
    level: int, message: str, *args: Any, error: BaseException | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write to the log. An error of a handler, filter or formatter goes to stderr instead."""
    try:
        logger.log(level, message, *args, exc_info=error, extra=extra)
    except BaseException:
        try:
            print_exc()
        except BaseException:  # stderr does not work either
            return


def _fields(task: DeferredTask, state: TaskState) -> dict[str, Any]:
    """Return the fields of a log record, for programs that read the log."""
    event = TaskEvent._now(task, task._list, state)
    return {
        "task_name": _short(task.name)[1:-1],
        "task_state": state.name,
        "task_added_at": task.added_at,
        "task_request": _short(task.request)[1:-1],
        "task_queued": event.queued,
        "task_duration": event.duration,
    }


def describe(task: DeferredTask) -> str:
    request = f", request {_short(task.request)}" if task.request else ""
    return f"deferred task {_short(task.name)}, added at {task.added_at}{request}"


def _log(task: DeferredTask, state: TaskState) -> None:
    error, text = task.error, describe(task)
    say = partial(write, error=error, extra=_fields(task, state))
    if state is FAILED:
        say(ERROR, "Failed: %s%s", text, _hint(task))
    elif state is TaskState.TIMED_OUT:
        still = "" if task._async else "; it is a sync function, so its thread still runs"
        if task._enqueues:
            still = "; whether its engine has it is unknown"
        say(ERROR, "Timed out after %s s: %s%s", task.timeout, text, still)
    elif state is TaskState.ABANDONED:
        still = "; it still runs" if task._started and error is None else ""
        say(ERROR, "Abandoned at shutdown: %s%s", text, still)
    elif error is not None:
        say(ERROR, "Cancelled, and not by the runner: %s", text)
    elif state is not TaskState.SKIPPED:
        say(DEBUG, "%s: %s", state.value.capitalize(), text)
    else:
        why, tasks = f"{text}: {task._why[:LONGEST]}", task._list
        if _is_first(tasks, task.added_at):
            rule = explain_rule(task.when, tasks.outcome)
            say(INFO, "Skipped: %s; %s (said once for this line; DEBUG has every task)", why, rule)
        else:
            say(DEBUG, "Skipped: %s", why)


def _level(task: DeferredTask, state: TaskState) -> int:
    """Return the highest level at which `_log` may log a task that has not succeeded."""
    if state is TaskState.SKIPPED:
        return INFO
    return DEBUG if state is TaskState.CANCELLED and task.error is None else ERROR


def _is_first(tasks: DeferredTasks, what: str) -> bool:
    """Whether this is the first time that the runner says something. Only one of several threads gets True."""
    mark = object()
    return tasks._host.told.setdefault(what, mark) is mark


def _hint(task: DeferredTask) -> str:
    """Explain a likely mistake: one of our options was passed as a keyword argument of the function."""
    if isinstance(task.error, TypeError):
        for option in ("when", "timeout", "key", "name", "durable"):
            if option in task.kwargs and f"unexpected keyword argument '{option}'" in str(task.error):
                return f" (an option is given as options({option}=...).add_task(...))"
    return ""


def _short(text: str) -> str:
    text = ascii(text[: LONGEST + 1])
    return text if len(text) <= LONGEST + 2 else f"{text[:LONGEST]}...'"
