"""The middleware on a part of an application, whose lifespan nobody runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from asgi_deferred import DeferredMiddleware, Runner, tasks_from

from .support import Log, http_scope, lifespan, request

pytestmark = pytest.mark.anyio

RESPONSE = ["http.response.start", "http.response.body"]
IN_THE_CALL = [*RESPONSE, "task", "returned"]
AFTER_THE_CALL = [*RESPONSE, "returned", "task"]


def endpoint(log: Log, *, defers: bool = True) -> Callable[[HTTPConnection], Any]:
    async def endpoint(request: HTTPConnection) -> PlainTextResponse:
        if defers:
            tasks_from(request).add_task(log.note, "task")
        return PlainTextResponse("hello")

    return endpoint


def mount(sub: Any, runner: Runner) -> Any:
    return Mount("/sub", DeferredMiddleware(Starlette(routes=[Route("/", sub)]), runner))


def mount_with_middleware(sub: Any, runner: Runner) -> Any:
    return Mount("/sub", routes=[Route("/", sub)], middleware=[Middleware(DeferredMiddleware, runner=runner)])


def route_with_middleware(sub: Any, runner: Runner) -> Any:
    return Route("/sub/", sub, middleware=[Middleware(DeferredMiddleware, runner=runner)])


def fastapi_mounted(sub: Any, runner: Runner) -> Any:
    async def endpoint(request: Request) -> Any:
        return await sub(request)

    app = FastAPI()
    app.get("/")(endpoint)
    app.add_middleware(DeferredMiddleware, runner=runner)
    return Mount("/sub", app)


HOW = pytest.mark.parametrize("how", [mount, mount_with_middleware, route_with_middleware, fastapi_mounted])


def a_request(path: str = "/sub/") -> dict[str, Any]:
    """Make the scope of a request to a server that runs lifespans."""
    return http_scope(path, query_string=b"", state={})


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "asgi_deferred"]


@HOW
async def test_no_lifespan_reaches_it(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    """G11: of tasks that a server may drop, as no lifespan reaches the middleware, one line warns, with the remedy."""
    log = Log()
    app = Starlette(routes=[how(endpoint(log), Runner())])
    async with lifespan(app):
        for _ in range(2):
            await request(app, log, a_request())
    assert log == IN_THE_CALL * 2
    (line,) = lines(caplog)
    assert line == (
        "The tasks of request 'GET /sub/' run inside its call, and a server may drop them when it shuts down: this "
        "DeferredMiddleware wraps a mounted application or a route, which no lifespan reaches. Wrap the outermost "
        "application instead, or enter the runner, `async with runner:`, in the outermost one's lifespan. (said once)"
    )


@HOW
async def test_entered_in_the_outermost_lifespan(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    """G6, G8: with the runner entered in the outermost lifespan the tasks run in the background, and nothing warns."""
    log, runner = Log(), Runner()

    @asynccontextmanager
    async def run(_: Any) -> AsyncIterator[None]:
        async with runner:
            yield

    app = Starlette(routes=[how(endpoint(log), runner)], lifespan=run)
    async with lifespan(app):
        await request(app, log, a_request())
    assert (log, lines(caplog)) == (AFTER_THE_CALL, [])


@HOW
async def test_below_another_middleware(how: Any, caplog: pytest.LogCaptureFixture) -> None:
    """G6: where the whole application is wrapped as well, its runner runs the tasks, and nothing warns."""
    log = Log()
    app = DeferredMiddleware(Starlette(routes=[how(endpoint(log), Runner())]))
    async with lifespan(app):
        await request(app, log, a_request())
    assert (log, lines(caplog)) == (AFTER_THE_CALL, [])


@pytest.mark.parametrize("wrap", [DeferredMiddleware, lambda app: app.add_middleware(DeferredMiddleware) or app])
async def test_no_warning_for_a_whole_application(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    """G9: a whole application without a lifespan, its mounts and routes included, is nothing to warn of."""
    log = Log()
    app = wrap(Starlette(routes=[Mount("/sub", routes=[Route("/", endpoint(log))])]))
    await request(app, log, {**a_request(), "root_path": ""})
    assert (log, lines(caplog)) == (IN_THE_CALL, [])


async def test_no_warning_without_need(caplog: pytest.LogCaptureFixture) -> None:
    """G9: nothing warns on a server that has no lifespans, nor of requests without tasks."""
    log = Log()
    app = Starlette(routes=[mount(endpoint(log), Runner())])
    scope = a_request()
    del scope["state"]
    await request(app, log, scope)
    without_tasks = Starlette(routes=[mount(endpoint(log, defers=False), Runner())])
    await request(without_tasks, log, a_request())
    assert (log, lines(caplog)) == ([*IN_THE_CALL, *RESPONSE, "returned"], [])
