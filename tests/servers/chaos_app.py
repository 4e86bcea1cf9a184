"""The application of the chaos program: a request says in its query what is to go wrong with it."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import unquote

import anyio

from asgi_deferred import DeferredMiddleware, DeferredTask, DeferredTasks, Runner, RunnerClosed, TaskEvent, tasks_from

_transcript = os.open(os.environ["TRANSCRIPT"], os.O_WRONLY | os.O_APPEND)


def note(*words: object) -> None:
    os.write(_transcript, " ".join(map(str, (*words, "\n"))).encode())


def observe(event: TaskEvent) -> None:
    note("event", event.task.name, event.state.name)


runner = Runner(drain_timeout=0.7, max_pending=100, max_threads=3, max_concurrency=20, observers=[observe])


async def ok(*_: Any) -> None:
    await anyio.sleep(0.005)


def sync(*_: Any) -> None:
    time.sleep(0.002)


def sync_slow(*_: Any) -> None:
    time.sleep(0.1)


async def fail(*_: Any) -> None:
    raise SystemExit("chaos")


async def never(*_: Any) -> None:
    await anyio.sleep_forever()


async def nest(tasks: DeferredTasks, name: str) -> None:
    add(tasks, f"{name}+", "sync")


def flood(tasks: DeferredTasks, name: str) -> None:
    for number in range(20):
        add(tasks, f"{name}+{number}", "ok")


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ok": (ok, {}),
    "sync": (sync, {}),
    "sync-times-out": (sync_slow, {"timeout": 0.02}),
    "times-out": (never, {"timeout": 0.02}),
    "fail": (fail, {}),
    "never": (never, {}),
    "nest": (nest, {}),
    "flood": (flood, {}),
    "replaced": (ok, {"key": "same"}),
    "cancelled": (ok, {}),
}


def add(tasks: DeferredTasks, name: str, kind: str, when: Any = "always") -> None:
    func, options = KINDS[kind]
    try:
        task = tasks.options(name=name, when=when, **options).add_task(func, tasks, name)
    except RunnerClosed:
        note("refused", name)
        return
    note("accepted", name)
    if kind == "cancelled":
        task.cancel()


async def until_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(does: str, receive: Any, send: Any) -> None:
    if does == "hang":
        await until_disconnect(receive)
        return
    if does == "raise":
        raise ValueError("chaos")
    await send({"type": "http.response.start", "status": 500 if does == "500" else 200, "headers": []})
    body: partial[dict[str, Any]] = partial(dict, type="http.response.body", body=b"chaos")
    for _ in range(20 if does == "stream" else 0):
        await send(body(more_body=True))
        await anyio.sleep(0.002)
    if does == "raise-midway":
        await send(body(more_body=True))
        raise ValueError("chaos")
    await send(body())
    if does == "teardown":
        await anyio.sleep(0.05)
    if does == "raise-late":
        raise ValueError("chaos")


async def request(scope: Any, receive: Any, send: Any) -> None:
    plan = json.loads(unquote(scope["query_string"].decode()))
    tasks = tasks_from(scope)
    for task in plan["tasks"]:
        add(tasks, *task)
    try:
        await respond(plan["does"], receive, send)
    finally:
        note("over", plan["id"])


async def chaos(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await request(scope, receive, send)
        return
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    statistics = runner.statistics()
    for _ in range(30):  # a thread may be about to take the last step of the last task, which has ended
        gc.collect()
        alive = [thing.name for thing in gc.get_objects() if isinstance(thing, DeferredTask)]
        if not alive:
            break
        await anyio.sleep(0.01)
    note("end", json.dumps([statistics._asdict(), alive]))
    await send({"type": "lifespan.shutdown.complete"})


app = DeferredMiddleware(chaos, runner)
