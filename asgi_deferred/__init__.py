"""Run functions after the response has gone out, for any ASGI application."""

from ._completion import Outcome
from ._exceptions import BacklogFull, DeferredError, EnqueueFailed, MiddlewareMissing, RunnerClosed
from ._middleware import DeferredMiddleware
from ._runner import Runner, Statistics
from ._tasks import DeferredTask, DeferredTasks, TaskEvent, TaskState, current_tasks, defer, tasks_from

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
    "current_tasks",
    "defer",
    "tasks_from",
]
