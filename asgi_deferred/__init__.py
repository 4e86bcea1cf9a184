"""Run functions after the response has gone out, for any ASGI application."""

from ._drains import draining
from ._exceptions import BacklogFull, DeferredError, EnqueueFailed, MiddlewareMissing, RunnerClosed, TaskTimedOut
from ._middleware import DeferredMiddleware
from ._outcome import Outcome
from ._runner import Runner
from ._states import Statistics, TaskState
from ._tasks import DeferredTask, DeferredTasks, TaskEvent, current_tasks, defer, tasks_from

__all__ = [
    "BacklogFull",
    "DeferredError",
    "DeferredMiddleware",
    "DeferredTask",
    "DeferredTasks",
    "EnqueueFailed",
    "MiddlewareMissing",
    "Outcome",
    "Runner",
    "RunnerClosed",
    "Statistics",
    "TaskEvent",
    "TaskState",
    "TaskTimedOut",
    "current_tasks",
    "defer",
    "draining",
    "tasks_from",
]
