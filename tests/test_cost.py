"""What a request without tasks costs, counted and not timed: a guard against a call or an allocation too many."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from asgi_deferred import DeferredMiddleware, Runner, tasks_from
from tests.support import http_scope, no_more_messages

PYTHON_CALLS = [
    "DeferredMiddleware.__call__",
    "DeferredTasks.__init__",
    "DeferredMiddleware.__call__.<locals>.note_and_send",  # the start of the response
    "DeferredMiddleware.__call__.<locals>.note_and_send",  # its body
]
C_CALLS = {"_get_running_loop": 1, "copy": 1, "set": 1, "reset": 1}
OBJECTS = 11  # the call, the list, the copy of the scope, the context, the closure and its cells


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def sent(message: Any) -> None:
    pass


def run(wrapped: Any) -> None:
    """Step a call by hand: it waits for nothing."""
    with pytest.raises(StopIteration):
        wrapped(http_scope(), no_more_messages, sent).send(None)


def test_calls_without_tasks() -> None:
    """Section "Speed": a request without tasks makes four Python calls, four C calls, and takes no lock."""
    python: list[str] = []
    c: Counter[str] = Counter()
    ours = DeferredMiddleware.__call__.__code__.co_filename.removesuffix("_middleware.py")

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if not frame.f_code.co_filename.startswith(ours):
            return
        if event == "call":
            python.append(frame.f_code.co_qualname)
        elif event == "c_call":
            c[arg.__name__] += 1

    async def main() -> None:
        wrapped = DeferredMiddleware(app, Runner())
        run(wrapped)
        sys.setprofile(profile)
        try:
            run(wrapped)
        finally:
            sys.setprofile(None)

    asyncio.run(main())
    assert python == PYTHON_CALLS
    assert c == C_CALLS


def new_objects() -> int:  # pragma: no cover - runs in a process of its own
    """Return how many objects that the garbage collector tracks a request without tasks makes."""

    def tracked(wrapped: Any) -> int:
        """Count what is new while the call is under way."""
        scope = http_scope()
        seen: list[int] = []

        async def counting(message: Any) -> None:
            seen.append(len(gc.get_objects()))

        before = len(gc.get_objects())
        with pytest.raises(StopIteration):
            wrapped(scope, no_more_messages, counting).send(None)
        return seen[0] - before

    gc.disable()
    sys.settrace(None)  # a tracer makes objects of its own
    wrapped = DeferredMiddleware(app, Runner())
    for each in (app, wrapped):
        tracked(each)
    return tracked(wrapped) - tracked(app)


def test_allocations_without_tasks() -> None:
    """Section "Speed": a request without tasks makes few objects that the garbage collector tracks."""
    program = "from tests import test_cost; print(test_cost.new_objects())"  # without threads of other tests
    counted = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0 < int(counted) <= OBJECTS


def test_a_list_has_no_dict_of_its_own() -> None:
    """G6: a list whose first task comes after many requests without any takes no more memory than the first one did."""
    lists: list[Any] = []

    async def deferring(scope: Any, receive: Any, send: Any) -> None:
        lists.append(tasks_from(scope))
        lists[0].add_task(print)
        await app(scope, receive, send)

    async def main() -> None:
        runner = Runner()
        async with runner:
            for each in [app] * 100 + [deferring]:
                await DeferredMiddleware(each, runner)(http_scope(), no_more_messages, sent)

    asyncio.run(main())
    assert not [each for each in gc.get_referents(lists[0]) if isinstance(each, dict) and "_count" in each]
