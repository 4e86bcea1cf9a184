"""The middleware: when tasks run, what a request's end means for them, and that nobody else notices."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import pytest

from asgi_deferred import (
    DeferredMiddleware,
    DeferredTasks,
    MiddlewareMissing,
    Outcome,
    Runner,
    RunnerClosed,
    current_tasks,
    defer,
    tasks_from,
)

from .support import (
    OK,
    Log,
    assert_conserved,
    ends,
    http_scope,
    lifespan,
    no_more_messages,
    request,
    responder,
    response,
    states,
    task_list,
)

pytestmark = pytest.mark.anyio


async def test_runs_after_the_response_and_the_call() -> None:
    """G1, G6: with a lifespan a task starts after the final message and the app's end, and the call does not wait."""
    log, go = Log(), anyio.Event()

    async def task() -> None:
        log.append("task")
        await go.wait()
        log.append("task done")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        defer(task)
        for message in OK:
            await send(message)
        await anyio.lowlevel.checkpoint()
        log.append("teardown")

    app = DeferredMiddleware(app, runner := Runner(observers=[log]))
    async with runner:
        await request(app, log)
        await anyio.wait_all_tasks_blocked()
        log.append("go")
        go.set()
        await runner.wait_idle()
    name = "test_runs_after_the_response_and_the_call.<locals>.task"
    assert log == [
        "http.response.start",
        "http.response.body",
        "teardown",
        "returned",
        f"{name} RUNNING",
        "task",
        "go",
        "task done",
        f"{name} SUCCEEDED",
    ]
    assert_conserved(runner)


async def test_runs_in_the_call_without_a_lifespan() -> None:
    """G9: without a lifespan the call itself runs the list, after the app has returned."""
    log = Log()
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "task")), runner := Runner())
    for _ in range(2):
        await request(app, log)
    assert log == ["http.response.start", "http.response.body", "task", "returned"] * 2
    assert_conserved(runner)


def test_nothing_is_bound_to_an_event_loop(anyio_backend: Any) -> None:
    """G9: one application serves calls on one event loop after the other."""
    log = Log()
    app = DeferredMiddleware(
        responder(lambda tasks: tasks.add_task(log.note, "async"), lambda tasks: tasks.add_task(log.note_sync, "sync"))
    )

    async def main() -> None:
        await request(app, log)
        async with lifespan(app):
            await request(app, log)
            await app.runner.wait_idle()

    for _ in range(2):
        anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])
    sent = ["http.response.start", "http.response.body"]
    assert log == [*sent, "async", "sync", "returned", *sent, "returned", "async", "sync"] * 2
    assert_conserved(app.runner)


@pytest.mark.parametrize("grace", ["enough", "too short"])
async def test_survives_the_calls_cancellation(grace: str) -> None:
    """G9: tasks in a cancelled call go on for up to `drain_timeout`, then they are ABANDONED; the call ends cancelled."""
    log, started, go = Log(), anyio.Event(), anyio.Event()

    async def task() -> None:
        started.set()
        await go.wait()

    runner = Runner(drain_timeout=30 if grace == "enough" else 0.01)
    app = DeferredMiddleware(responder(lambda tasks: tasks.options(name="task").add_task(task)), runner)
    async with anyio.create_task_group() as group:
        with anyio.CancelScope() as scope:

            async def finish() -> None:
                await started.wait()
                scope.cancel()
                if grace == "enough":
                    await anyio.wait_all_tasks_blocked()
                    log.append("go")
                    go.set()

            group.start_soon(finish)
            await request(app, log)
    sent = ["http.response.start", "http.response.body"]
    assert log == [*sent, "go"] if grace == "enough" else sent
    assert scope.cancelled_caught
    assert runner.statistics().succeeded == (grace == "enough")
    assert runner.statistics().abandoned == (grace != "enough")


async def test_a_call_cancelled_before_its_end_still_runs_its_tasks() -> None:
    """G9: a call that was cancelled before it could respond runs what its outcome lets through, with the same grace."""
    log = Log()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(when="failure").add_task(log.note, "cleanup")
        await anyio.sleep_forever()

    wrapped = DeferredMiddleware(app)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(request, wrapped, log)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
    assert log == ["cleanup"]
    assert_conserved(wrapped.runner)


async def test_context_of_the_adding_line() -> None:
    """G5: each task sees the context of the line that added it, also when added from a child task or a worker thread."""
    from contextvars import ContextVar

    var: ContextVar[str] = ContextVar("var", default="unset")
    seen = Log()

    async def note() -> None:
        seen.append(var.get())
        await anyio.lowlevel.checkpoint()
        var.set("the task's own")

    def note_sync() -> None:
        seen.append(var.get())

    def in_thread() -> None:
        var.set("thread")
        defer(note_sync)

    async def in_child() -> None:
        var.set("child")
        defer(note)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        var.set("first")
        defer(note)
        defer(note_sync)
        var.set("second")
        defer(note)
        defer(note_sync)
        await anyio.to_thread.run_sync(in_thread)
        async with anyio.create_task_group() as group:
            group.start_soon(in_child)
        defer(note_sync)
        for message in OK:
            await send(message)

    await request(DeferredMiddleware(app), Log())
    assert seen == ["first", "first", "second", "second", "thread", "child", "second"]


async def test_a_foreign_thread_adds() -> None:
    """G11: `add_task` from a thread that knows nothing of the event loop is accepted and run, before and after the end."""
    log = Log()
    lists: list[DeferredTasks] = []

    def add(entry: str) -> None:
        thread = threading.Thread(target=lists[0].add_task, args=(log.note, entry))
        thread.start()
        thread.join()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        lists.append(tasks_from(scope))
        add("early")
        for message in OK:
            await send(message)

    wrapped = DeferredMiddleware(app)
    async with wrapped.runner:
        await request(wrapped, log)
        await wrapped.runner.wait_idle()
        add("late")
        await wrapped.runner.wait_idle()
    with pytest.raises(RunnerClosed, match="its request is over, and its runner is closed"):
        lists[0].add_task(log.note, "too late")
    assert log == ["http.response.start", "http.response.body", "returned", "early", "late"]
    assert_conserved(wrapped.runner)


async def test_a_waiting_task_does_not_hold_its_request() -> None:
    """G6: what a request held is gone while its task waits."""

    class Held(dict[str, Any]):
        pass

    refs: list[weakref.ref[Held]] = []
    go = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        local, start = Held(), Held(OK[0])
        refs.extend([weakref.ref(local), weakref.ref(start), weakref.ref(scope["held"])])
        defer(go.wait)
        await send(start)
        await send(OK[1])

    wrapped = DeferredMiddleware(app)
    async with wrapped.runner:
        scope = http_scope(held=Held())

        async def send(message: Any, held: Held = scope["held"]) -> None: ...

        refs.append(weakref.ref(send))  # type: ignore[arg-type]
        await wrapped(scope, no_more_messages, send)
        await anyio.wait_all_tasks_blocked()
        assert wrapped.runner.running == ["Event.wait"]
        del scope, send
        gc.collect()
        assert [ref() for ref in refs] == [None] * 4
        go.set()


async def test_transparent() -> None:
    """G10: messages and exceptions pass through unchanged, the scope is copied, and the call returns None."""
    scope = http_scope()
    before = dict(scope)
    received = {"type": "http.request", "body": b"x"}
    sent: list[Any] = []
    error = ValueError("from the app")

    async def app(inner: Any, receive: Any, send: Any) -> int:
        assert inner is not scope
        assert {**inner, "asgi_deferred": None} == {**before, "asgi_deferred": None}
        assert await receive() is received
        for message in OK:
            assert await send(message) == "sent"
        if fail:
            raise error
        return 42

    async def receive() -> Any:
        return received

    async def send(message: Any) -> Any:
        sent.append(message)
        return "sent"

    wrapped: Any = DeferredMiddleware(app)  # type: ignore[arg-type]
    fail = False
    assert await wrapped(scope, receive, send) is None
    fail = True
    with pytest.raises(ValueError, match="from the app") as caught:
        await wrapped(scope, receive, send)
    assert caught.value is error
    assert [message is original for message, original in zip(sent, OK * 2, strict=True)] == [True] * 4
    assert scope == before


async def test_unknown_scope_types_pass_through() -> None:
    """G10: a scope of a type that we do not know goes to the app untouched."""
    seen: list[Any] = []

    async def app(*args: Any) -> None:
        seen.extend(args)

    scope = {"type": "mqtt"}
    await DeferredMiddleware(app)(scope, "receive", "send")
    assert seen == [scope, "receive", "send"]
    assert seen[0] is scope


async def test_nested_middleware_passes_through() -> None:
    """A second middleware finds the list of the first, which runs it once; a scope replayed later gets a new list."""
    log, lists, scopes = Log(), [], []

    def note(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.add_task(log.note, "task")

    inner = DeferredMiddleware(responder(note))

    async def between(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await inner(scope, receive, send)

    outer = DeferredMiddleware(between)
    async with lifespan(outer):
        await request(outer, log)
        await outer.runner.wait_idle()
        await request(inner, log, scopes[-1])
    assert log == [
        "http.response.start",
        "http.response.body",
        "returned",
        "task",
        "http.response.start",
        "http.response.body",
        "task",
        "returned",
    ]
    assert [each.runner.statistics().accepted for each in (outer, inner)] == [1, 1]


async def test_a_request_within_a_request() -> None:
    """An application that calls a wrapped one in its own context gets its own list back afterwards."""
    log = Log()
    inner = DeferredMiddleware(responder(lambda tasks: tasks.add_task(log.note, "inner")))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        outer_list = current_tasks()
        defer(log.note, "outer 1")
        await request(inner, log)
        assert current_tasks() is outer_list
        defer(log.note, "outer 2")
        for message in OK:
            await send(message)

    await request(DeferredMiddleware(app), log)
    sent = ["http.response.start", "http.response.body"]
    assert log == [*sent, "inner", "returned", *sent, "outer 1", "outer 2", "returned"]


async def test_missing() -> None:
    """Without the middleware `defer` and `tasks_from` say how to install it."""
    with pytest.raises(MiddlewareMissing, match=r"Wrap it: app = DeferredMiddleware\(app\)"):
        defer(print)
    with pytest.raises(MiddlewareMissing, match="This http scope has no task list"):
        tasks_from(http_scope())
    with pytest.raises(TypeError, match=r"takes an ASGI scope or an object with a \.scope, not 'int'"):
        tasks_from(1)
    with pytest.raises(MiddlewareMissing, match="This SimpleNamespace has no task list: it came by WSGI"):
        tasks_from(SimpleNamespace(environ={}))


def test_missing_says_nothing_of_django_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message about a missing list tells of Django where Django's WSGI is loaded, and nowhere else."""
    for loaded in (True, False):
        monkeypatch.delitem(sys.modules, "django.core.handlers.wsgi", raising=False)
        if loaded:
            monkeypatch.setitem(sys.modules, "django.core.handlers.wsgi", ModuleType("wsgi"))
        with pytest.raises(MiddlewareMissing) as raised:
            defer(print)
        assert ("In Django" in str(raised.value)) == loaded


def test_tasks_from_an_object_with_a_scope() -> None:
    """`tasks_from` finds the list of anything that has an ASGI scope as its attribute."""
    tasks = task_list()

    class Request:
        scope = http_scope(asgi_deferred=tasks)

    assert tasks_from(Request()) is tasks
    assert tasks_from(Request.scope) is tasks


def test_bad_arguments() -> None:
    """What is no application and what is no runner is refused where it is passed."""
    with pytest.raises(TypeError, match="wraps an ASGI application, not 'NoneType'"):
        DeferredMiddleware(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="runner=5 is not a Runner"):
        DeferredMiddleware(responder(), runner=5)  # type: ignore[arg-type]


async def outcome_of(app: Any, scope: dict[str, Any] | None = None, send: Any = None) -> Outcome | None:
    outcomes: list[Outcome | None] = []
    lists: list[DeferredTasks] = []

    async def outer(scope: Any, receive: Any, send_: Any) -> None:
        lists.append(tasks_from(scope))
        lists[0].options(when="always").add_task(lambda: outcomes.append(lists[0].outcome))
        assert lists[0].outcome is None
        await app(scope, receive, send_)

    async def receive() -> Any:
        return {"type": "websocket.disconnect", "code": 1001}

    try:
        await DeferredMiddleware(outer)(scope or http_scope(), receive, send or Log().send)
    except OSError:
        pass
    assert ends(outcomes[0]) == ends(lists[0].outcome)
    return outcomes[0]


async def test_outcomes_of_http() -> None:
    """A list's outcome is unknown until the request has ended; then its task can see status, completeness and error."""
    error = OSError("x")

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        await send(OK[0])
        raise error

    async def twice(scope: Any, receive: Any, send: Any) -> None:
        for message in OK + response(500):
            await send(message)

    async def gone(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise error

    assert await outcome_of(responder(messages=response(418))) == Outcome("http", 418, complete=True)
    assert await outcome_of(responder(messages=[])) == Outcome("http")
    assert await outcome_of(fail) == Outcome("http", 200, error=error)
    assert await outcome_of(twice) == Outcome("http", 200, complete=True)
    assert await outcome_of(responder(), send=gone) == Outcome("http", 200, complete=True, error=error)


async def test_outcomes_of_websockets() -> None:
    """A websocket is complete after its close, its denial, the client's disconnect or the app's return."""
    scope = {"type": "websocket", "path": "/ws"}
    denial: list[dict[str, Any]] = [
        {"type": "websocket.http.response.start", "status": 403},
        {"type": "websocket.http.response.body", "body": b""},
    ]
    error = OSError("x")

    async def disconnected(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        assert (await receive())["type"] == "websocket.disconnect"

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise error

    async def fail_after_disconnect(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise error

    assert await outcome_of(responder(messages=[{"type": "websocket.close"}]), scope) == Outcome(
        "websocket", complete=True
    )
    assert await outcome_of(responder(messages=denial), scope) == Outcome("websocket", 403, complete=True)
    assert await outcome_of(disconnected, scope) == Outcome("websocket", complete=True)
    assert await outcome_of(responder(messages=[]), scope) == Outcome("websocket", complete=True)
    assert await outcome_of(fail, scope) == Outcome("websocket", error=error)
    assert await outcome_of(fail_after_disconnect, scope) == Outcome("websocket", complete=True, error=error)


async def test_outcome_without_tasks() -> None:
    """The outcome of a request that deferred nothing is known to whoever kept its list."""
    lists: list[DeferredTasks] = []
    await request(DeferredMiddleware(responder(lists.append, messages=response(404))), Log())
    assert lists[0].outcome == Outcome("http", 404, complete=True)


@pytest.mark.parametrize("cut", ["while the final message goes out", "after it"])
async def test_cancelled_by_the_server_while_the_final_message_goes_out(cut: str) -> None:
    """G1: a cancellation is the outcome's error even if `send` brought it with the final message: no commit followed."""
    lists: list[DeferredTasks] = []
    log = Log()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        lists.append(tasks_from(scope))
        defer(log.note, "task")
        for message in OK:
            await send(message)
        await anyio.lowlevel.checkpoint()

    with anyio.CancelScope() as scope:

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                scope.cancel()
                if cut != "after it":
                    await anyio.lowlevel.checkpoint()

        await DeferredMiddleware(app)(http_scope(), no_more_messages, send)
    outcome = lists[0].outcome
    assert outcome is not None
    assert outcome.complete
    assert scope.cancelled_caught
    assert not outcome.success
    assert (log, states(lists[0])) == ([], ["Log.note SKIPPED"])


async def test_a_drain_waits_for_a_request_past_its_response() -> None:
    """G8: a shutdown that comes right after the final message waits for the call to return, and then for its tasks."""
    log, go = Log(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/before":
            defer(log.note, "task")
        for message in OK:
            await send(message)
        if scope["path"] == "/after":
            defer(log.note, "task")
        await go.wait()
        log.append("teardown")

    for path in ("/before", "/after"):
        log.clear()
        go = anyio.Event()
        wrapped = DeferredMiddleware(app)
        async with anyio.create_task_group() as group:
            async with wrapped.runner:
                group.start_soon(request, wrapped, log, http_scope(path))
                await anyio.wait_all_tasks_blocked()

                async def let_go() -> None:
                    await anyio.wait_all_tasks_blocked()
                    go.set()

                group.start_soon(let_go)
            log.append("drained")
        assert log == ["http.response.start", "http.response.body", "teardown", "returned", "task", "drained"]
        assert_conserved(wrapped.runner)


async def test_a_websockets_tasks_run_after_it() -> None:
    """G1: tasks of a websocket run after its connection has ended; a drain waits for one that is ending."""
    log, go = Log(), anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        defer(log.note, "task")
        await send({"type": "websocket.accept"})
        assert (await receive())["type"] == "websocket.disconnect"
        await go.wait()

    async def receive() -> Any:
        return {"type": "websocket.disconnect", "code": 1001}

    wrapped = DeferredMiddleware(app)
    async with anyio.create_task_group() as group:
        async with wrapped.runner:
            group.start_soon(wrapped, {"type": "websocket", "path": "/"}, receive, log.send)
            await anyio.wait_all_tasks_blocked()
            log.append("shutdown")
            go.set()
    assert log == ["websocket.accept", "shutdown", "task"]
    assert_conserved(wrapped.runner)


async def test_a_lifespan_on_another_event_loop(anyio_backend: Any) -> None:
    """G9: a request on another event loop than the lifespan's runs its tasks itself, and holds up no drain."""
    log = Log()
    wrapped = DeferredMiddleware(
        responder(lambda tasks: tasks.add_task(log.note, f"task {threading.get_ident() == main}"))
    )
    main = threading.get_ident()

    def elsewhere() -> None:
        anyio.run(request, wrapped, log, backend=anyio_backend[0])

    async with wrapped.runner:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
    assert log == ["http.response.start", "http.response.body", "task False", "returned"]
    assert_conserved(wrapped.runner)
