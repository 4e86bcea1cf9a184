"""What Django's own test tools see of deferred work."""

from __future__ import annotations

from functools import partial
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIHandler
from django.db import transaction
from django.test import AsyncClient, Client, TestCase, override_settings

import django
from asgi_deferred import MiddlewareMissing, TaskState, current_tasks, defer
from asgi_deferred.django import capture_deferred

from . import dj
from .djproject import views
from .djproject.journal import journal
from .djproject.models import Entry


async def acount() -> None:
    journal.append(f"acount {await Entry.objects.acount()}")


def count() -> None:
    journal.append(f"count {Entry.objects.count()}")


def count_later() -> Any:
    count()
    return acount()


def add_another() -> None:
    defer(journal.append, "another")


def raising() -> None:
    raise LookupError("as told")


class CaptureTest(TestCase):
    """A transaction around each test, which the tasks have to see."""

    def setUp(self) -> None:
        journal.clear()
        Entry.objects.create(text="of the test")

    def test_collects(self) -> None:
        """What a request defers is there to be asserted, and none of it runs."""
        with capture_deferred() as deferred:
            assert self.client.get("/sync_view").status_code == 200
            assert self.client.get("/async_view").status_code == 200
            assert self.client.get("/from_request").status_code == 200
        assert [(task.func, task.args) for task in deferred] == [
            (journal.append, ("task",)),
            (views.async_task, ()),
            (journal.append, ("task",)),
        ]
        assert {task.state for task in deferred} == {TaskState.PENDING}
        assert journal == []

    async def test_collects_async(self) -> None:
        """The same with `AsyncClient`."""
        async with capture_deferred() as deferred:
            assert (await self.async_client.get("/async_view")).status_code == 200
            assert (await self.async_client.get("/async_from_request")).status_code == 200
        assert [task.func for task in deferred] == [views.async_task, journal.append]
        assert journal == []

    def view(self, _: object) -> None:
        Entry.objects.create(text="of the view")
        defer(count)
        defer(acount)
        defer(count_later)
        defer(add_another)

    ran = ("count 2", "acount 2", "count 2", "acount 2", "another")

    def test_executes(self) -> None:
        """Tasks, and those they add, run in order and see the test's transaction."""
        views.hooked.append(self.view)
        with capture_deferred(execute=True) as deferred:
            self.client.get("/hook")
            assert journal == []
        assert journal == [*self.ran]
        assert {task.state for task in deferred} == {TaskState.SUCCEEDED}

    async def test_executes_async(self) -> None:
        """The same in an async test, from a sync view and an async one."""

        async def view(request: object) -> None:
            await Entry.objects.acreate(text="of the async view")
            defer(acount)
            defer(count)

        views.hooked.append(self.view)
        async with capture_deferred(execute=True):
            await self.async_client.get("/hook")
            assert journal == []
        assert journal == [*self.ran]
        journal.clear()
        views.hooked.append(view)
        async with capture_deferred(execute=True):
            await self.async_client.get("/ahook")
        assert journal == ["acount 3", "count 3"]

    def test_on_commit(self) -> None:
        """With `captureOnCommitCallbacks` inside, what is deferred on commit is collected and run too."""

        def view(_: object) -> None:
            transaction.on_commit(partial(defer, count))

        views.hooked.append(view)
        with capture_deferred(execute=True) as deferred, self.captureOnCommitCallbacks(execute=True) as callbacks:
            self.client.get("/hook")
            assert deferred == []
        assert (len(callbacks), len(deferred), journal) == (1, 1, ["count 1"])

    def test_when(self) -> None:
        """`when` is decided by the response that the client got."""

        def view(_: object) -> None:
            defer(journal.append, "on success")
            current_tasks().options(when="failure").add_task(journal.append, "on failure")
            raise ValueError("as told")

        views.hooked.append(view)
        client = Client(raise_request_exception=False)
        with capture_deferred(execute=True) as deferred:
            assert client.get("/hook").status_code == 500
        assert journal == ["on failure"]
        assert [task.state for task in deferred] == [TaskState.SKIPPED, TaskState.SUCCEEDED]

    def test_key(self) -> None:
        """A task that another replaced is collected, CANCELLED, and does not run."""

        def view(_: object) -> None:
            for text in ("one", "two"):
                current_tasks().options(key="k").add_task(journal.append, text)

        views.hooked.append(view)
        with capture_deferred(execute=True) as deferred:
            self.client.get("/hook")
        assert [task.state for task in deferred] == [TaskState.CANCELLED, TaskState.SUCCEEDED]
        assert journal == ["two"]

    def test_outside_a_request(self) -> None:
        """A function that defers can be tested without a request."""
        with capture_deferred(execute=True) as deferred:
            defer(count)
        assert [task.name for task in deferred] == ["count"]
        assert journal == ["count 1"]
        with pytest.raises(MiddlewareMissing):
            defer(count)

    def test_raises(self) -> None:
        """All tasks run, and the first one's error is the test's."""
        with pytest.raises(LookupError, match="as told"), capture_deferred(execute=True):
            defer(raising)
            defer(count)
        assert journal == ["count 1"]

    def test_error_in_block(self) -> None:
        """An error of the test itself passes through, nothing runs, and Django is left as it was."""
        before = (BaseHandler.get_response, BaseHandler.get_response_async)
        with pytest.raises(LookupError, match="as told"), capture_deferred(execute=True):
            defer(count)
            raising()
        assert journal == []
        assert (BaseHandler.get_response, BaseHandler.get_response_async) == before

    async def test_error_in_async_block(self) -> None:
        """The same in an async test."""
        with pytest.raises(LookupError, match="as told"):
            async with capture_deferred(execute=True):
                defer(count)
                raising()
        assert journal == []


if django.VERSION >= (6, 0):
    from django.tasks import TaskResultStatus

    from .djproject import jobs

    class CaptureTasksTest(TestCase):
        """`django.tasks` under capture."""

        def test_enqueued(self) -> None:
            """Enqueued tasks are collected as others are, and their results follow."""

            async def view(_: object) -> None:
                results.extend([jobs.add.enqueue(1, 2), await jobs.aadd.aenqueue(3, 4)])

            results: list[Any] = []
            journal.clear()
            views.hooked.append(view)
            with capture_deferred(execute=True) as deferred:
                self.client.get("/ahook")
                assert [task.name for task in deferred] == [f"{jobs.__name__}.add", f"{jobs.__name__}.aadd"]
                assert {result.status for result in results} == {TaskResultStatus.READY}
            assert journal == ["add 1 2", "aadd 3 4 of 0"]
            for result in results:
                result.refresh()
            assert [result.return_value for result in results] == [3, 7]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_bypassed() -> None:
    """Without capture a test client's request has no list, as the client bypasses the middleware; and says so."""
    for path in ("/async_view", "/from_request"):
        with pytest.raises(MiddlewareMissing, match=NOT_ASGI):
            await AsyncClient().get(path)


NOT_ASGI = (
    "(not come through the middleware|it came by WSGI).* In Django, WSGI does not go through asgi.py: "
    r'run an ASGI server.*"daphne".*runserver.*test clients.*capture_deferred\(\)'
)


@pytest.mark.parametrize("path", ["/sync_view", "/async_view", "/from_request", "/async_from_request", "/middleware"])
def test_by_wsgi(path: str) -> None:
    """By WSGI, as `runserver` goes, a request has no list, and is told so and what to run; the test client is too."""
    environ: dict[str, Any] = {"PATH_INFO": path}
    setup_testing_defaults(environ)
    with override_settings(DEBUG_PROPAGATE_EXCEPTIONS=True):
        with pytest.raises(MiddlewareMissing, match=NOT_ASGI):
            WSGIHandler()(environ, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(MiddlewareMissing, match=NOT_ASGI):
        Client().get(path)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_wrapped_under_capture() -> None:
    """A request that does go through the middleware keeps its own list."""
    async with capture_deferred() as deferred:
        assert await dj.request(dj.wrapped(), "/async_view") == ["200", "sent", "task"]
        assert await dj.request(dj.wrapped(), "/from_request") == ["200", "sent", "task"]
    assert deferred == []
