"""Run functions after the response has gone out, for any ASGI application."""

from ._drains import draining
from ._engines import EngineTask
from ._exceptions import BacklogFull, DeferredError, EnqueueFailed, MiddlewareMissing, RunnerClosed, TaskTimedOut
from ._middleware import DeferredMiddleware
from ._outcome import Outcome, When
from ._runner import Runner
from ._settings import Around, ASGIApp, Observer
from ._states import Statistics, TaskState
from ._tasks import DeferredTask, DeferredTasks, TaskAdder, TaskEvent, current_tasks, defer, tasks_from

__all__ = [
    "ASGIApp",
    "Around",
    "BacklogFull",
    "DeferredError",
    "DeferredMiddleware",
    "DeferredTask",
    "DeferredTasks",
    "EngineTask",
    "EnqueueFailed",
    "MiddlewareMissing",
    "Observer",
    "Outcome",
    "Runner",
    "RunnerClosed",
    "Statistics",
    "TaskAdder",
    "TaskEvent",
    "TaskState",
    "TaskTimedOut",
    "When",
    "current_tasks",
    "defer",
    "draining",
    "tasks_from",
]
