"""The barrier before a response, and engines' tasks at shutdown, with an engine that the test holds in its hand."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from asgi_deferred import (
    DeferredError,
    DeferredMiddleware,
    DeferredTasks,
    EnqueueFailed,
    Outcome,
    Runner,
    current_tasks,
    tasks_from,
)
from tests.support import OK, Log, assert_conserved, http_scope, no_more_messages, request, responder, response, states

pytestmark = pytest.mark.anyio

START, BODY = OK


class Refused(Exception): ...


class Engine:
    """Takes jobs and notes them, or does as told."""

    def __init__(self, log: list[str], does: Callable[[], Any] = lambda: None) -> None:
        self.log = log
        self.does = does

    async def __defer_enqueue__(self, job: str) -> Any:
        await anyio.lowlevel.checkpoint()
        if job == "bad":
            await self.does()
        self.log.append(f"stored {job}")


class BlockingEngine(Engine):
    def __defer_enqueue__(self, job: str) -> Any:
        if job == "bad":
            self.does()
        self.log.append(f"stored {job}")


class TwoStepEngine(Engine):
    """Its client's call is sync and returns what is to be awaited."""

    def __defer_enqueue__(self, job: str) -> Any:
        return super().__defer_enqueue__(job)


async def refuse() -> None:
    raise Refused


def refuse_sync() -> None:
    raise Refused


ENGINES = {"async": (Engine, refuse), "sync": (BlockingEngine, refuse_sync), "two-step": (TwoStepEngine, refuse)}


@pytest.fixture(params=list(ENGINES))
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return ENGINES[request.param]


class Wire(Log):
    """A server that writes down each message in short."""

    async def send(self, message: Any) -> None:
        kind = message["type"].removeprefix("http.response.")
        detail = message.get("status", message.get("body", b"").decode()[:19])
        self.append(f"{kind} {detail}".strip())


async def call(app: Any, log: Log, runner: Runner, *, with_lifespan: bool = True) -> None:
    """Make one request, and shut down."""
    if with_lifespan:
        async with runner:
            await request(DeferredMiddleware(app, runner), log)
            await runner.wait_idle()
    else:
        await request(DeferredMiddleware(app, runner), log)
    assert_conserved(runner)


REFUSED = ["start 503", "body Service Unavailable"]


@pytest.mark.parametrize("with_lifespan", [True, False])
async def test_stored_before_the_response_starts(kind: tuple[Any, Any], *, with_lifespan: bool) -> None:
    """G1: durable tasks are enqueued in order before the start; other tasks, engine's or not, after the response."""
    log = Wire()
    engine = kind[0](log)

    def add(tasks: DeferredTasks) -> None:
        tasks.add_task(log.note, "plain")
        tasks.options(durable=True).add_task(engine, "1")
        tasks.add_task(engine, "later")
        tasks.options(durable=True).add_task(engine, "2")

    await call(responder(add), log, Runner(), with_lifespan=with_lifespan)
    expected = ["stored 1", "stored 2", "start 200", "body hello", "plain", "stored later"]
    expected.insert(4 if with_lifespan else 6, "returned")
    assert log == expected


@pytest.mark.parametrize("with_lifespan", [True, False])
async def test_refusal_is_a_503(
    kind: tuple[Any, Any], caplog: pytest.LogCaptureFixture, *, with_lifespan: bool
) -> None:
    """G2, G11: a refusal gives the client 503 in place of the response, skips the rest, is logged and emits an event."""
    log = Wire()
    engine = kind[0](log, kind[1])
    lists: list[DeferredTasks] = []

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        durable = tasks.options(durable=True)
        tasks.options(name="plain").add_task(log.note, "plain")
        tasks.options(name="migrated", when="complete").add_task(log.note, "migrated")
        tasks.options(name="alarm", when="failure").add_task(log.note, "alarm")
        for job in ("1", "bad", "3"):
            durable.add_task(engine, job)

    await call(responder(add), log, Runner(observers=[log]), with_lifespan=with_lifespan)
    name = kind[0].__name__
    before = [f"{name} RUNNING", "stored 1", f"{name} SUCCEEDED", f"{name} RUNNING", f"{name} FAILED", *REFUSED]
    after = ["plain SKIPPED", "migrated SKIPPED", "alarm RUNNING", "alarm", "alarm SUCCEEDED", f"{name} SKIPPED"]
    assert log == [*before, *(["returned", *after] if with_lifespan else [*after, "returned"])]
    outcome = lists[0].outcome
    assert outcome is not None
    assert (outcome.status, outcome.complete, outcome.success) == (503, False, False)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith(f"Failed: deferred task '{name}', added at {__file__}")
    assert record.exc_info is not None
    assert record.exc_info[0] is Refused


async def test_answer_to_a_refusal_is_whole() -> None:
    """G10: the 503 is a complete response that says when to try again."""
    messages: list[Any] = []
    runner = Runner()
    app = DeferredMiddleware(
        responder(lambda tasks: tasks.options(durable=True).add_task(Engine([], refuse), "bad")), runner
    )

    async def send(message: Any) -> None:
        messages.append(message)

    await app(http_scope(), no_more_messages, send)
    assert messages == [
        {**messages[0], "type": "http.response.start", "status": 503},
        {"type": "http.response.body", "body": messages[1]["body"]},
    ]
    assert dict(messages[0]["headers"]) == {
        b"content-type": b"text/plain; charset=utf-8",
        b"content-length": b"%d" % len(messages[1]["body"]),
        b"retry-after": b"5",
    }


async def test_each_refusal_is_a_message_of_its_own() -> None:
    """G3: what a middleware outside of ours adds to one client's 503, such as a cookie, is in no other client's."""
    sizes: list[int] = []
    runner = Runner()
    app = DeferredMiddleware(
        responder(lambda tasks: tasks.options(durable=True).add_task(Engine([], refuse), "bad")), runner
    )

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"].append((b"set-cookie", b"session=somebody"))
            sizes.append(len(message["headers"]))

    for _ in range(3):
        await app(http_scope(), no_more_messages, send)
    assert sizes == [4, 4, 4]


REFUSE: Any = responder(
    lambda tasks: tasks.options(durable=True, name="job").add_task(Engine([], refuse), "bad"),
    messages=[
        {
            **START,
            "headers": [
                (b"Access-Control-Allow-Origin", b"https://shop.example"),
                (b"vary", b"Origin"),
                (b"etag", b"1"),
                (b"content-type", b"text/html"),
                (b"set-cookie", b"session=somebody"),
            ],
        },
        BODY,
    ],
)


async def exchange(app: Any) -> list[Any]:
    """Make a request; return what the server was sent: status and headers, then bodies, then what was raised."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append((message["status"], message["headers"]) if "status" in message else message["body"])

    try:
        await app(http_scope("/signup"), no_more_messages, send)
    except EnqueueFailed as exc:
        sent.append(type(exc))
    return sent


async def test_a_browser_can_read_the_503() -> None:
    """The 503 keeps those headers of the refused response that say who may read it, and none about its body."""
    (status, headers), body = await exchange(DeferredMiddleware(REFUSE))
    assert (status, body[:19]) == (503, b"Service Unavailable")
    assert [name for name, _ in headers[:3]] == [b"content-type", b"content-length", b"retry-after"]
    assert headers[3:] == [(b"Access-Control-Allow-Origin", b"https://shop.example"), (b"vary", b"Origin")]


async def test_an_answer_of_the_users() -> None:
    """`unavailable` answers instead, knows request, error and task, and gets the kept headers it has not set itself."""
    seen: list[Any] = []
    receives: list[Any] = []
    headers = [(b"Vary", b"Accept"), (b"retry-after", b"60")]

    async def unavailable(scope: Any, receive: Any, send: Any) -> None:
        tasks = tasks_from(scope)
        outcome = tasks.outcome
        assert outcome is not None
        assert isinstance(outcome.error, EnqueueFailed)
        assert current_tasks() is tasks
        receives.append(receive)
        seen.append((scope["path"], outcome.status, outcome.complete, type(outcome.error.__cause__), states(tasks)))
        await send({"type": "http.response.start", "status": 507, "headers": headers})
        await send({"type": "http.response.body", "body": b"come ", "more_body": True})
        await send({"type": "http.response.body", "body": b"back"})

    outcomes: list[Outcome | None] = []
    runner = Runner(unavailable=unavailable, observers=[lambda event: outcomes.append(event.outcome)])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(when="always").add_task(list)
        await REFUSE(scope, receive, send)

    for _ in range(2):
        (status, sent), *bodies = await exchange(DeferredMiddleware(app, runner))
        assert (status, bodies) == (507, [b"come ", b"back"])
        assert sent == [*headers, (b"Access-Control-Allow-Origin", b"https://shop.example")]
        sent.append((b"set-cookie", b"session=somebody"))
    assert seen == [("/signup", None, False, Refused, ["list PENDING", "job FAILED"])] * 2
    assert receives == [no_more_messages] * 2
    assert len(headers) == 2
    ends = [outcome and (outcome.status, outcome.complete, outcome.success) for outcome in outcomes]
    assert ends == [None, None, (507, False, False), (507, False, False)] * 2
    assert_conserved(runner)


@pytest.mark.parametrize("sends", [0, 1, 2, 3])
async def test_an_answer_that_fails(sends: int, caplog: pytest.LogCaptureFixture) -> None:
    """G3: an error in `unavailable` is logged; the plain 503 stands in, or the response that has started breaks off."""

    async def unavailable(scope: Any, receive: Any, send: Any) -> None:
        messages = [{"type": "http.response.start", "status": 507}, {**BODY, "more_body": True}, BODY]
        for message in messages[:sends]:
            await send(message)
        raise LookupError

    sent = await exchange(DeferredMiddleware(REFUSE, Runner(unavailable=unavailable)))
    started = (507, [(b"Access-Control-Allow-Origin", b"https://shop.example"), (b"vary", b"Origin")])
    bodies = [item for item in sent[1:] if item is not EnqueueFailed]
    if sends:
        assert sent == [started, *[b"hello"] * (sends - 1), *([EnqueueFailed] if sends < 3 else [])]
    else:
        assert (sent[0][0], bodies[0][:19]) == (503, b"Service Unavailable")
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [error.partition(":")[0] for error in errors] == [
        "Failed",
        f"The application unavailable={unavailable!r} failed",
    ]


async def test_an_answer_that_says_nothing() -> None:
    """An `unavailable` that sends nothing leaves it to the plain 503."""

    async def unavailable(scope: Any, receive: Any, send: Any) -> None: ...

    (status, headers), body = await exchange(DeferredMiddleware(REFUSE, Runner(unavailable=unavailable)))
    assert (status, len(headers), body[:19]) == (503, 5, b"Service Unavailable")


async def test_cancellation_in_an_answer() -> None:
    """G10: a call that is cancelled while `unavailable` answers is cancelled, and no 503 goes out after it."""
    runner = Runner(unavailable=lambda *_: anyio.sleep_forever())
    with anyio.CancelScope() as scope:

        async def app(*args: Any) -> None:
            try:
                await REFUSE(*args)
            finally:
                ended.append(True)

        ended: list[bool] = []
        async with anyio.create_task_group() as group:
            group.start_soon(exchange, DeferredMiddleware(app, runner))
            await anyio.wait_all_tasks_blocked()
            assert ended == []
            scope.cancel()
    assert (scope.cancelled_caught, ended) == (True, [True])
    assert_conserved(runner)


@pytest.mark.parametrize("add_middleware", [True, False])
@pytest.mark.parametrize("framework", [Starlette, FastAPI])
@pytest.mark.parametrize(
    ("unavailable", "expected"),
    [
        (None, (503, "5", "text/plain; charset=utf-8")),
        (JSONResponse({"detail": "full"}, 507, {"retry-after": "60"}), (507, "60", "application/json")),
    ],
)
async def test_cors(framework: Any, unavailable: Any, expected: Any, *, add_middleware: bool) -> None:
    """A refusal inside CORS middleware has its headers, each time, and the transaction around the response rolls back."""
    log: list[str] = []
    runner = Runner(unavailable=unavailable)

    async def endpoint(request: Request) -> Response:
        tasks_from(request).options(durable=True).add_task(Engine([], refuse), "bad")
        return Response("stored", 202, {"x-of": "body"})

    class Transaction:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await self.app(scope, receive, send)
            except EnqueueFailed:
                log.append("rolled back")
                raise

    app = framework()
    app.add_route("/", endpoint)
    app.add_middleware(Transaction)
    app.add_middleware(CORSMiddleware, allow_origins=["https://shop.example"], allow_credentials=True)
    if add_middleware:
        app.add_middleware(DeferredMiddleware, runner=runner)
    else:
        app = DeferredMiddleware(app, runner)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for _ in range(2):
            response = await client.get("/", headers={"origin": "https://shop.example"})
            headers = response.headers
            assert (response.status_code, headers["retry-after"], headers["content-type"]) == expected
            assert sorted(headers) == [
                "access-control-allow-credentials",
                "access-control-allow-origin",
                "content-length",
                "content-type",
                "retry-after",
                "vary",
            ]
    assert log == ["rolled back"] * 2
    assert_conserved(runner)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_refusals_on_uvicorn() -> None:
    """Over one connection to uvicorn each refusal is a whole answer: a streamed one, with the kept headers, of a HEAD too."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"try "
        yield b"again"

    async def unavailable(scope: Any, receive: Any, send: Any) -> None:
        await StreamingResponse(parts(), 503, media_type="text/plain")(scope, receive, send)

    app = DeferredMiddleware(REFUSE, Runner(unavailable=unavailable))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        async with anyio.create_task_group() as group, httpx.AsyncClient(trust_env=False) as client:
            group.start_soon(server.serve, [listener])
            answers = [await client.request(method, url) for method in ("GET", "HEAD", "POST")]
            server.should_exit = True
    assert [(answer.status_code, answer.text) for answer in answers] == [
        (503, "try again"),
        (503, ""),
        (503, "try again"),
    ]
    of_the_server = {"date", "server", "transfer-encoding"}
    kept = ["access-control-allow-origin", "content-type", "vary"]
    assert [sorted(answer.headers.keys() - of_the_server) for answer in answers] == [kept] * 3


async def test_the_log_of_a_refusal_names_its_request(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which request a refused task belonged to, though that has not ended."""
    add: Any = lambda tasks: tasks.options(durable=True).add_task(Engine([], refuse), "bad")  # noqa: E731
    await request(DeferredMiddleware(responder(add)), Wire(), http_scope("/signup"))
    assert ", request 'GET /signup'" in caplog.records[0].getMessage()


async def test_no_message_overtakes_one_that_is_held() -> None:
    """G10: what another task of the application sends while the start is held back goes out after it."""
    log = Wire()
    storing, go = anyio.Event(), anyio.Event()

    async def wait() -> None:
        storing.set()
        await go.wait()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(durable=True).add_task(Engine(log, wait), "bad")

        async def send_the_rest() -> None:
            await storing.wait()
            for body in (b"one", b"two"):
                await send({"type": "http.response.body", "body": body, "more_body": body == b"one"})

        async with anyio.create_task_group() as group:
            group.start_soon(send, START)
            group.start_soon(send_the_rest)
            await storing.wait()
            await anyio.wait_all_tasks_blocked()
            log.append("go")
            go.set()

    await request(DeferredMiddleware(app), log)
    assert log == ["go", "stored bad", "start 200", "body one", "body two", "returned"]


async def test_application_sees_the_refusal() -> None:
    """G10: `send` raises the refusal, so that a transaction rolls back, and goes on raising whatever the app tries."""
    log = Wire()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(durable=True).add_task(Engine(log, refuse), "bad")
        tasks_from(scope).options(when="complete").add_task(log.note, "complete")
        for message in (START, {**BODY, "more_body": True}, START, BODY):
            with pytest.raises(EnqueueFailed, match="Is the broker up"):
                await send(message)
        tasks_from(scope).options(durable=True, when="always").add_task(Engine(log), "late")
        with pytest.raises(EnqueueFailed):
            await send(BODY)
        log.append("rolled back")
        raise KeyError

    with pytest.raises(KeyError):
        await call(app, log, Runner(), with_lifespan=False)
    assert log == [*REFUSED, "rolled back", "stored late"]


async def test_application_may_swallow_the_refusal() -> None:
    """G2: a request whose app swallowed the refusal is no success either."""
    log = Wire()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks = tasks_from(scope)
        tasks.options(durable=True).add_task(Engine(log, refuse), "bad")
        tasks.add_task(log.note, "plain")
        with pytest.raises(EnqueueFailed):
            await send(START)

    await call(app, log, Runner())
    assert log == [*REFUSED, "returned"]


@pytest.mark.parametrize("kind_of_refusal", ["async", "sync"])
async def test_refusal_in_mid_stream(kind_of_refusal: str) -> None:
    """G10: a durable task added while streaming is stored before the last message, or else that is never sent."""
    log = Wire()
    make, refusal = ENGINES[kind_of_refusal]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        durable = tasks_from(scope).options(durable=True)
        await send(START)
        durable.add_task(make(log, refusal), "1")
        await send({**BODY, "more_body": True})
        durable.add_task(make(log, refusal), scope["path"])
        await send(BODY)

    runner = Runner()
    await DeferredMiddleware(app, runner)(http_scope("good"), no_more_messages, log.send)
    assert log == ["start 200", "body hello", "stored 1", "stored good", "body hello"]
    log.clear()
    with pytest.raises(EnqueueFailed):
        await DeferredMiddleware(app, runner)(http_scope("bad"), no_more_messages, log.send)
    assert log == ["start 200", "body hello", "stored 1"]
    assert_conserved(runner)


@pytest.mark.parametrize("kind_of_hang", ["async", "sync", "two-step"])
async def test_an_engine_that_hangs(kind_of_hang: str, caplog: pytest.LogCaptureFixture) -> None:
    """G7: after `enqueue_timeout` the client has its 503, the task is TIMED_OUT, and its fate is called unknown."""
    log, go = Wire(), threading.Event()
    kinds: dict[str, tuple[Any, Any]] = {
        "async": (Engine, anyio.sleep_forever),
        "sync": (BlockingEngine, go.wait),
        "two-step": (TwoStepEngine, anyio.sleep_forever),
    }
    make, does = kinds[kind_of_hang]
    app = responder(lambda tasks: tasks.options(durable=True, name="job").add_task(make(log, does), "bad"))
    try:
        await call(app, log, Runner(observers=[log], enqueue_timeout=0.01))
    finally:
        go.set()
    assert [entry for entry in log if entry != "job RUNNING"][:4] == ["job TIMED_OUT", *REFUSED, "returned"]
    assert "Timed out after 0.01 s" in caplog.text
    assert "whether its engine has it is unknown" in caplog.text


async def test_threads_that_hang_do_not_hold_up_the_503() -> None:
    """G7: with every enqueueing thread stuck, the next client still has its 503 after `enqueue_timeout`."""
    log, go = Wire(), threading.Event()
    app = responder(lambda tasks: tasks.options(durable=True, name="job").add_task(BlockingEngine(log, go.wait), "bad"))
    runner = Runner(observers=[log], enqueue_timeout=0.01, max_threads=1)
    async with runner:
        await request(DeferredMiddleware(app, runner), log)
        await request(DeferredMiddleware(app, runner), log)
        assert [entry for entry in log if entry != "job RUNNING"] == ["job TIMED_OUT", *REFUSED, "returned"] * 2
        go.set()
    assert_conserved(runner)


async def test_two_step_engine_that_was_given_up(recwarn: pytest.WarningsRecorder) -> None:
    """G3: what a sync enqueue returns after its time was up is closed, and not left to a warning."""
    log, go, closed = Wire(), threading.Event(), threading.Event()

    class Late:
        def __await__(self) -> Any: ...

        def close(self) -> None:
            closed.set()

    class LateEngine:
        def __defer_enqueue__(self) -> Any:
            go.wait()
            return Late()

    app = responder(lambda tasks: tasks.options(durable=True).add_task(LateEngine()))
    await call(app, log, Runner(enqueue_timeout=0.5))
    go.set()
    assert await anyio.to_thread.run_sync(closed.wait, 5)
    assert log == [*REFUSED, "returned"]
    assert len(recwarn) == 0


async def test_durable_does_not_wait_behind_other_work(kind: tuple[Any, Any]) -> None:
    """G7: with every slot and thread taken by tasks, a response with a durable task goes out at once."""
    log, stuck = Wire(), threading.Event()
    runner = Runner(max_concurrency=1, max_threads=1)
    async with runner:
        busy = responder(lambda tasks: tasks.add_task(stuck.wait))
        await request(DeferredMiddleware(busy, runner), log)
        await anyio.wait_all_tasks_blocked()
        app = responder(lambda tasks: tasks.options(durable=True).add_task(kind[0](log), "1"))
        await request(DeferredMiddleware(app, runner), log)
        assert log[3:] == ["stored 1", "start 200", "body hello", "returned"]
        stuck.set()
    assert_conserved(runner)


@pytest.mark.parametrize(
    ("when", "status", "expected"),
    [
        ("success", 202, ["stored 1", "start", "body"]),
        ("success", 404, ["start", "body"]),
        ("complete", 404, ["stored 1", "start", "body"]),
        ("failure", 202, ["start", "body"]),
        ("failure", 404, ["stored 1", "start", "body"]),
        ("always", 500, ["stored 1", "start", "body"]),
        (lambda outcome: outcome == Outcome("http", 202, True), 202, ["stored 1", "start", "body"]),
        (lambda _: False, 202, ["start", "body"]),
    ],
)
async def test_when_is_asked_about_the_status(when: Any, status: int, expected: list[str]) -> None:
    """G1: `when` decides at the barrier from the response's status, as of a complete response without an error."""
    log = Wire()
    app = responder(
        lambda tasks: tasks.options(durable=True, when=when).add_task(Engine(log), "1"), messages=response(status)
    )
    await call(app, log, Runner())
    assert [entry.replace(f" {status}", "").replace(" hello", "") for entry in log] == [*expected, "returned"]


async def test_when_that_raises_is_a_refusal(caplog: pytest.LogCaptureFixture) -> None:
    """G3: a durable task whose `when` raises has failed, so the response does not go out."""
    log = Wire()

    def when(outcome: Outcome) -> bool:
        raise Refused

    await call(
        responder(lambda tasks: tasks.options(durable=True, when=when).add_task(Engine(log), "1")), log, Runner()
    )
    assert log == [*REFUSED, "returned"]
    assert "Failed: deferred task" in caplog.text


async def test_a_durable_task_for_failures_runs_when_there_was_no_response() -> None:
    """G11: a durable task that no barrier let through is decided at the request's end, as any other."""
    log = Wire()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).options(durable=True, when="failure").add_task(Engine(log), "alarm")
        raise Refused

    with pytest.raises(Refused):
        await call(app, log, Runner(), with_lifespan=False)
    assert log == ["stored alarm"]


async def test_cancelled_and_replaced_durable_tasks() -> None:
    """G2: a durable task that was cancelled or replaced before the response is not enqueued, and refuses nothing."""
    log = Wire()

    def add(tasks: DeferredTasks) -> None:
        assert tasks.options(durable=True).add_task(Engine(log), "cancelled").cancel()
        tasks.options(durable=True, key="k").add_task(Engine(log), "replaced")
        tasks.options(durable=True, key="k").add_task(Engine(log), "replacing")

    await call(responder(add), log, Runner())
    assert log == ["stored replacing", "start 200", "body hello", "returned"]


async def test_cancellation_lets_the_enqueue_end(kind: tuple[Any, Any]) -> None:
    """G2, G10: a request cancelled while it enqueues sends nothing more; the task still ends, stored or not."""
    log, entered, go = Wire(), threading.Event(), threading.Event()

    def wait_sync() -> None:
        entered.set()
        go.wait()

    async def wait() -> None:
        entered.set()
        await anyio.to_thread.run_sync(go.wait)

    engine = kind[0](log, wait_sync if kind[0] is BlockingEngine else wait)
    lists: list[DeferredTasks] = []

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.options(durable=True, name="job").add_task(engine, "bad")
        tasks.options(name="plain").add_task(log.note, "plain")

    app = DeferredMiddleware(responder(add), runner := Runner())
    async with runner:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(app, http_scope(), no_more_messages, log.send)
                await anyio.to_thread.run_sync(entered.wait)
                scope.cancel()
                go.set()
        assert scope.cancelled_caught
    assert log == ["stored bad"]
    assert states(lists[0]) == ["job SUCCEEDED", "plain SKIPPED"]
    assert_conserved(runner)


async def test_durable_where_there_is_no_response_to_hold_back() -> None:
    """G11: durable is refused at the adding line for a function, a websocket, a late task and outside a request."""
    log = Wire()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        durable = tasks_from(scope).options(durable=True)
        if scope["type"] == "http":
            with pytest.raises(TypeError, match="Make it a task of an engine"):
                durable.add_task(log.note, "plain")
            await send(START)
            await send(BODY)
        with pytest.raises(DeferredError, match="no response to hold back"):
            durable.add_task(Engine(log), "1")

    runner = Runner()
    async with runner:
        for kind in ("http", "websocket"):
            await request(DeferredMiddleware(app, runner), log, {**http_scope(), "type": kind})
        with pytest.raises(DeferredError, match="no response to hold back"):
            current_tasks().options(durable=True).add_task(Engine(log), "1")
    assert log == ["start 200", "body hello", "returned", "returned"]
    assert runner.statistics().accepted == 0


async def test_a_barrier_without_a_time_limit() -> None:
    """With `enqueue_timeout=math.inf` a sync engine may take as long as it likes."""
    log = Wire()
    add: Any = lambda tasks: tasks.options(durable=True).add_task(BlockingEngine(log), "1")  # noqa: E731
    await call(responder(add), log, Runner(enqueue_timeout=math.inf))
    assert log == ["stored 1", "start 200", "body hello", "returned"]


async def test_cancelled_as_the_barrier_comes_to_it() -> None:
    """G2: a durable task that an earlier one's enqueue, or a `when`, cancels is not enqueued; the response goes out."""
    log = Wire()
    lists: list[DeferredTasks] = []

    async def cancel_the_next() -> None:
        assert list(lists[0])[1].cancel()

    def cancel_itself(outcome: Outcome) -> bool:
        return list(lists[0])[2].cancel()

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.options(durable=True).add_task(Engine(log, cancel_the_next), "bad")
        tasks.options(durable=True).add_task(Engine(log), "2")
        tasks.options(durable=True, when=cancel_itself).add_task(Engine(log), "3")

    runner = Runner()
    await call(responder(add), log, runner)
    assert log == ["stored bad", "start 200", "body hello", "returned"]
    assert runner.statistics().cancelled == 2


async def test_added_while_the_barrier_stands() -> None:
    """G11: a durable task added from elsewhere while others are enqueued is enqueued too, before the response."""
    log = Wire()
    lists: list[DeferredTasks] = []

    async def add_another() -> None:
        lists[0].options(durable=True).add_task(Engine(log), "another")

    def add(tasks: DeferredTasks) -> None:
        lists.append(tasks)
        tasks.options(durable=True).add_task(Engine(log, add_another), "bad")

    await call(responder(add), log, Runner())
    assert log == ["stored bad", "stored another", "start 200", "body hello", "returned"]


async def test_engine_tasks_go_first_at_shutdown(kind: tuple[Any, Any]) -> None:
    """G8: with every slot and thread stuck, engines' tasks that wait are enqueued, in order, and nothing of them is lost."""
    log, entered, stuck = Wire(), threading.Event(), threading.Event()
    runner = Runner(max_concurrency=1, max_threads=1, drain_timeout=0.2, observers=[log])

    def stick() -> None:
        entered.set()
        stuck.wait()

    def add(tasks: DeferredTasks) -> None:
        tasks.options(name="stuck").add_task(stick)
        for number in "123":
            tasks.options(name=number).add_task(kind[0](log), number)
            tasks.options(name=f"plain {number}").add_task(log.note, "never")

    try:
        async with runner:
            await request(DeferredMiddleware(responder(add), runner), log)
            await request(
                DeferredMiddleware(
                    responder(lambda tasks: tasks.options(name="4").add_task(kind[0](log), "4")), runner
                ),
                log,
            )
            await anyio.to_thread.run_sync(entered.wait)
            log.clear()
    finally:
        stuck.set()
    assert [entry for entry in log if entry.startswith("stored") and entry != "stored 4"] == [
        "stored 1",
        "stored 2",
        "stored 3",
    ]
    assert "stored 4" in log
    assert sorted(log[-4:]) == ["plain 1 ABANDONED", "plain 2 ABANDONED", "plain 3 ABANDONED", "stuck ABANDONED"]
    assert runner.statistics().succeeded == 4
    assert_conserved(runner)


async def test_order_at_shutdown_behind_one_that_is_being_enqueued() -> None:
    """G4: engines' tasks keep their order when the drain starts while the first of them is on its way."""
    log, entered, go = Wire(), threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        go.wait()

    def add(tasks: DeferredTasks) -> None:
        for job in ("bad", "2"):
            tasks.add_task(BlockingEngine(log, wait), job)

    async def go_soon() -> None:
        await anyio.wait_all_tasks_blocked()
        go.set()

    runner = Runner()
    async with anyio.create_task_group() as group:
        async with runner:
            await request(DeferredMiddleware(responder(add), runner), log)
            await anyio.to_thread.run_sync(entered.wait)
            group.start_soon(go_soon)
        assert log[3:] == ["stored bad", "stored 2"]
    assert_conserved(runner)


async def test_enqueueing_ends_with_the_drain(kind: tuple[Any, Any]) -> None:
    """G8: an engine that hangs at shutdown holds it up for `drain_timeout` alone, and its task is ABANDONED."""
    log, go, stuck = Wire(), threading.Event(), threading.Event()
    hang = go.wait if kind[0] is BlockingEngine else anyio.sleep_forever
    runner = Runner(max_concurrency=1, drain_timeout=0.3, observers=[log])

    def add(tasks: DeferredTasks) -> None:
        tasks.options(name="stuck").add_task(stuck.wait)
        tasks.options(name="job").add_task(kind[0](log, hang), "bad")

    try:
        async with runner:
            await request(DeferredMiddleware(responder(add), runner), log)
            await anyio.wait_all_tasks_blocked()
    finally:
        stuck.set()
        go.set()
    assert sorted(log[3:7]) == ["job ABANDONED", "job RUNNING", "stuck ABANDONED", "stuck RUNNING"]
    assert_conserved(runner)


async def test_engine_tasks_of_a_request_that_ends_while_draining() -> None:
    """G8: what a request hands over after the drain has begun goes to its engine past all that is stuck."""
    log, stuck, started, finish = Wire(), threading.Event(), anyio.Event(), anyio.Event()
    runner = Runner(max_concurrency=1, drain_timeout=0.5)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks_from(scope).add_task(Engine(log), "1")
        for message in OK:
            await send(message)
        started.set()
        await finish.wait()

    async def finish_soon() -> None:
        await anyio.wait_all_tasks_blocked()
        finish.set()

    try:
        async with anyio.create_task_group() as group:
            async with runner:
                await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(stuck.wait)), runner), Log())
                group.start_soon(request, DeferredMiddleware(app, runner), log)
                await started.wait()
                group.start_soon(finish_soon)
    finally:
        stuck.set()
    assert log == ["start 200", "body hello", "returned", "stored 1"]
    assert_conserved(runner)


async def test_a_system_without_threads_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: a durable task whose blocking engine finds no thread is refused: the client gets a 503, and knows."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    log, runner = Wire(), Runner(max_threads=1)
    engine = BlockingEngine(log)
    app = DeferredMiddleware(responder(lambda tasks: tasks.options(durable=True).add_task(engine, "job")), runner)
    async with runner:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await request(app, log)
        await request(app, log)
    assert log == [*REFUSED, "returned", "stored job", "start 200", "body hello", "returned"]
    assert_conserved(runner)
