"""The barrier: a response is held back until its durable tasks are stored.

1. The barrier holds the start of a response. It also holds the final message, for tasks that were added in between.
2. It applies `when` to the expected outcome: this status, complete, no error. A task that this rule does not let
   through waits for the real end of its request, like any other task.
3. After the first refusal, nothing more is stored. If the response has not started, the client gets the runner's
   `unavailable` or a plain 503, with the headers that let a browser read it. If it has started, the final message is
   withheld. Either way, `send` raises EnqueueFailed for this message and all later ones. The request is neither
   complete nor a success, so its other tasks are skipped unless they ask for failures.
4. From the first durable task on, messages pass one at a time, so that none overtakes a message that is held back.
"""

from __future__ import annotations

from functools import partial
from logging import ERROR
from typing import Any, cast

from anyio import Event, Lock

from ._exceptions import EnqueueFailed
from ._loops import loop_of
from ._outcome import Outcome, is_final, lets_through
from ._reports import write
from ._scheduler import Scheduler
from ._states import TaskState
from ._tasks import KEY, DeferredTask, DeferredTasks, name_request
from ._waiting import outlast

_BODY = b"Service Unavailable: the work could not be queued. Try again."


async def _plain_503(send: Any) -> None:
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(_BODY)).encode()),
        (b"retry-after", b"5"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})


async def _answer(tasks: DeferredTasks, receive: Any, send: Any, refused: Any) -> bool:
    """Answer instead of a response that could not start; return whether the client got a complete answer."""
    kept = [(name, value) for name, value in refused.get("headers", ()) if _lets_read(name.lower())]
    whole = False

    async def send_answer(message: Any) -> None:
        nonlocal whole
        if "status" in message:
            headers = list(message.get("headers", ()))
            own = {name.lower() for name, _ in headers}
            headers += [header for header in kept if header[0].lower() not in own]
            message = tasks._start = {**message, "headers": headers}
        whole = whole or is_final(tasks._start, message)
        await send(message)

    app = cast("Scheduler", tasks._host).settings.unavailable
    if app is not None:
        try:
            await app({**tasks._scope, KEY: tasks}, receive, send_answer)
        except Exception as exc:
            write(ERROR, "The application unavailable=%r failed", app, error=exc)
    if not tasks._start:
        await _plain_503(send_answer)
    return whole


def _lets_read(name: bytes) -> bool:
    """Whether a header controls who may read a response, rather than describing its body."""
    return name == b"vary" or name.startswith(b"access-control-")


async def hold(tasks: DeferredTasks, receive: Any, send: Any, message: Any) -> None:
    """Send a message of a response that has durable tasks. Its start and its end wait until those are stored."""
    if tasks._barrier is None:
        tasks._barrier = Lock()
    async with tasks._barrier:
        starts = "status" in message
        ends = not starts and is_final(tasks._start, message)
        if (starts or ends) and tasks._error is None:
            tasks._request = name_request(tasks._scope)
            status = (message if starts else tasks._start).get("status")
            try:
                await store(tasks, Outcome("http", status, complete=True))
            except EnqueueFailed as exc:
                tasks._error = exc
                if starts:
                    exc.answered = await _answer(tasks, receive, send, message)
        if tasks._error is not None:
            raise tasks._error
        if starts:
            tasks._start = message
        elif ends:
            tasks._complete = True
        await send(message)


async def store(tasks: DeferredTasks, expected: Outcome) -> None:
    """Enqueue a response's durable tasks in order, up to the first refusal.

    If the request is cancelled, the enqueue still goes on to its end. Otherwise nobody would know whether the engine
    has the job.

    Raises:
        EnqueueFailed: An engine refused a task, or did not answer in time.
    """
    scheduler, loop = cast("Scheduler", tasks._host), loop_of(tasks._loop)
    asked: set[DeferredTask] = set()
    while waiting := [task for task in tasks if task.durable and task.state is TaskState.PENDING and task not in asked]:
        for task in waiting:
            asked.add(task)
            context = task._context
            if context is None or task.state is not TaskState.PENDING:
                continue
            try:
                wanted = context.copy().run(lets_through, task.when, expected)
            except BaseException as exc:
                scheduler.close_outside(task, TaskState.FAILED, exc)
            else:
                if not wanted:
                    continue
                done = Event()
                scheduler.enqueue(task, tasks._home, loop, partial(loop.call_soon, done.set))
                await outlast(done.wait)
            if task.error is not None:
                raise EnqueueFailed(
                    f"{task.name!a} was not enqueued ({task.state.name}), so the response was not sent: its engine "
                    "refused it or did not answer in time. Is the broker up?"
                ) from task.error
