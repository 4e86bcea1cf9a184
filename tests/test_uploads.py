"""Uploads stay open for the tasks that have them, and are closed after those."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import anyio
import pytest
from fastapi import FastAPI, File, HTTPException, UploadFile
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.datastructures import FormData
from starlette.datastructures import UploadFile as StarletteUploadFile
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from asgi_deferred import DeferredMiddleware as CoreMiddleware
from asgi_deferred import DeferredTasks, Runner, tasks_from
from asgi_deferred.fastapi import Deferred, DeferredMiddleware

from .clients import OpenClient, async_client, open_client

__all__ = ["open_client"]

FILES = {"upload": ("hello.txt", b"hello")}


class Both:
    """What was read, and the uploads themselves."""

    def __init__(self) -> None:
        self.read: list[bytes] = []
        self.uploads: list[Any] = []

    async def ingest(self, upload: StarletteUploadFile) -> None:
        self.uploads.append(upload)
        self.read.append(await upload.read())

    def ingest_sync(self, upload: StarletteUploadFile) -> None:
        self.uploads.append(upload)
        self.read.append(upload.file.read())

    @property
    def closed(self) -> list[bool]:
        return [each.file.closed for each in self.uploads]


def tell_of_close(upload: StarletteUploadFile, closed: threading.Event) -> None:
    close = upload.file.close

    def close_and_tell() -> None:
        close()
        closed.set()

    upload.file.close = close_and_tell  # type: ignore[method-assign]


@dataclass
class Record:
    upload: Any


class Model(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    uploads: list[Any]


WAYS: dict[str, Callable[[Both, DeferredTasks, Any], object]] = {
    "argument": lambda both, tasks, upload: tasks.add_task(both.ingest, upload),
    "sync": lambda both, tasks, upload: tasks.add_task(both.ingest_sync, upload),
    "keyword": lambda both, tasks, upload: tasks.add_task(both.ingest, upload=upload),
    "partial": lambda both, tasks, upload: tasks.add_task(partial(both.ingest, upload)),
    "closure": lambda both, tasks, upload: tasks.add_task(lambda: both.ingest(upload)),
    "file": lambda both, tasks, upload: tasks.add_task(lambda file: both.read.append(file.read()), upload.file),
    "method": lambda both, tasks, upload: tasks.add_task(upload.seek, 0),
    "list": lambda both, tasks, upload: tasks.add_task(lambda each: both.ingest(each[0]), [upload]),
    "mapping": lambda both, tasks, upload: tasks.add_task(
        lambda each: both.ingest(each["it"]), {"it": {"it": upload}["it"]}
    ),
    "form": lambda both, tasks, upload: tasks.add_task(
        lambda form: both.ingest(cast("UploadFile", form["it"])), FormData({"it": upload})
    ),
    "dataclass": lambda both, tasks, upload: tasks.add_task(lambda each: both.ingest(each.upload), Record(upload)),
    "model": lambda both, tasks, upload: tasks.add_task(
        lambda each: both.ingest(each.uploads[0]), Model(uploads=[upload])
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("middleware", [CoreMiddleware, DeferredMiddleware])
def test_a_task_gets_the_upload(open_client: OpenClient, way: str, middleware: Any) -> None:
    """G6: a task reads the upload that it was given, however that is wrapped, and the upload is closed afterwards."""
    both, closed = Both(), threading.Event()
    app = FastAPI()
    app.add_middleware(middleware)

    @app.post("/")
    async def endpoint(upload: UploadFile, deferred: Deferred) -> None:
        tell_of_close(upload, closed)
        WAYS[way](both, deferred, upload)

    with open_client(app) as client:
        assert client.post("/", files=FILES).status_code == 200
    assert both.read == ([] if way == "method" else [b"hello"])
    assert closed.wait(10)  # by the thread of a sync task, perhaps


@pytest.mark.anyio
async def test_a_large_one_on_disk() -> None:
    """G6: an upload that was rolled to disk is read by its task and closed afterwards."""
    both, runner = Both(), Runner()
    app = FastAPI()
    app.add_middleware(DeferredMiddleware, runner=runner)

    @app.post("/")
    async def endpoint(upload: UploadFile, deferred: Deferred) -> None:
        deferred.add_task(both.ingest, upload)

    async with async_client(app) as client:
        await client.post("/", files={"upload": b"x" * 3_000_000})
        await runner.wait_idle()
        assert [len(each) for each in both.read] == [3_000_000]
        assert both.closed == [True]


@pytest.mark.anyio
async def test_closed_when_the_last_task_has_ended() -> None:
    """G6: of two uploads, one given to a task stays open until the list has ended, the other is closed with the request."""
    both, runner, go = Both(), Runner(), anyio.Event()
    uploads: list[UploadFile] = []
    app = FastAPI()
    app.add_middleware(DeferredMiddleware, runner=runner)

    @app.post("/")
    async def endpoint(files: Annotated[list[UploadFile], File()], deferred: Deferred) -> None:
        uploads.extend(files)
        deferred.add_task(both.ingest, files[0])
        deferred.add_task(go.wait)

    async with async_client(app) as client:
        await client.post("/", files=[("files", b"first"), ("files", b"second")])
        await anyio.wait_all_tasks_blocked()
        assert both.read == [b"first"]
        assert [upload.file.closed for upload in uploads] == [False, True]
        go.set()
        await runner.wait_idle()
        assert [upload.file.closed for upload in uploads] == [True, True]


@pytest.mark.anyio
async def test_skipped_and_cancelled_tasks_close_it() -> None:
    """G2: an upload is closed as well if its task is skipped or cancelled, and at once if it was before."""
    both, uploads = Both(), []
    app = FastAPI()
    app.add_middleware(DeferredMiddleware)

    @app.post("/skipped")
    async def skipped(upload: UploadFile, deferred: Deferred) -> None:
        uploads.append(upload)
        deferred.add_task(both.ingest, upload)
        raise HTTPException(400)

    @app.post("/cancelled")
    async def cancelled(upload: UploadFile, deferred: Deferred) -> None:
        uploads.append(upload)
        deferred.add_task(both.ingest, upload).cancel()

    async with async_client(app) as client:
        for path in "/skipped", "/cancelled":
            await client.post(path, files=FILES)
    assert both.read == []
    assert [upload.file.closed for upload in uploads] == [True, True]


@pytest.mark.anyio
async def test_a_form_of_starlette() -> None:
    """G6: `async with request.form()` keeps what a task has open, and closes the rest."""
    both, closed = Both(), []

    async def endpoint(request: StarletteRequest) -> Response:
        async with request.form() as form:
            first, second = form["first"], form["second"]
            assert isinstance(first, StarletteUploadFile)
            assert isinstance(second, StarletteUploadFile)
            tasks_from(request).add_task(both.ingest, first)
        closed.extend([first.file.closed, second.file.closed])
        await FormData({"text": "no upload"}).close()
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DeferredMiddleware)
    async with async_client(app) as client:
        await client.post("/", files={"first": b"first", "second": b"second"})
    assert closed == [False, True]
    assert both.read == [b"first"]
    assert both.closed == [True]


@pytest.mark.anyio
async def test_two_forms_of_one_request() -> None:
    """G6: each form of a request closes what it had put off."""
    both = Both()

    async def endpoint(request: StarletteRequest) -> Response:
        (upload,) = [each for each in (await request.form()).values() if isinstance(each, StarletteUploadFile)]
        again = StarletteUploadFile(Path(__file__).open("rb"))
        for each in upload, again:
            tasks_from(request).add_task(both.ingest, each)
            await FormData({"it": each}).close()
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(DeferredMiddleware)
    async with async_client(app) as client:
        await client.post("/", files=FILES)
    assert both.read[0] == b"hello"
    assert both.closed == [True, True]


@pytest.mark.anyio
async def test_closed_by_the_user() -> None:
    """G10: `await upload.close()` closes an upload, though a task has it."""
    closed: list[bool] = []
    app = FastAPI()
    app.add_middleware(DeferredMiddleware)

    @app.post("/")
    async def endpoint(upload: UploadFile, deferred: Deferred) -> None:
        deferred.add_task(lambda: closed.append(upload.file.closed))
        await upload.close()

    async with async_client(app) as client:
        await client.post("/", files=FILES)
    assert closed == [True]


@pytest.mark.anyio
async def test_without_a_list_or_after_the_request() -> None:
    """G10: a form that is closed outside of a request, or by one of its tasks, is closed at once."""
    both, uploads = Both(), [StarletteUploadFile(Path(__file__).open("rb")) for _ in range(2)]
    DeferredMiddleware(FastAPI())
    await FormData({"it": uploads[0]}).close()

    async def task(upload: StarletteUploadFile) -> None:
        await FormData({"it": upload}).close()
        both.uploads.append(upload)

    async def endpoint(request: StarletteRequest) -> Response:
        tasks_from(request).add_task(task, uploads[1])
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(DeferredMiddleware)
    async with async_client(app) as client:
        await client.get("/")
    assert [each.file.closed for each in uploads] == [True, True]


@pytest.mark.anyio
async def test_one_that_cannot_be_closed(caplog: pytest.LogCaptureFixture) -> None:
    """G3: an upload whose close raises is logged, and changes nothing for the others."""
    both = Both()

    class Broken:
        closed = False

        def read(self, size: int) -> bytes:
            return b"broken"

        def close(self) -> None:
            raise OSError("no")

    async def endpoint(request: StarletteRequest) -> Response:
        broken: Any = Broken()
        uploads = [StarletteUploadFile(broken), StarletteUploadFile(Path(__file__).open("rb"))]
        for upload in uploads:
            tasks_from(request).add_task(both.ingest, upload)
        await FormData([(str(index), upload) for index, upload in enumerate(uploads)]).close()
        return PlainTextResponse("hello")

    app = Starlette(routes=[Route("/", endpoint)])
    app.add_middleware(DeferredMiddleware)
    async with async_client(app) as client:
        assert (await client.get("/")).text == "hello"
    assert [entry.getMessage() for entry in caplog.records] == ["An upload could not be closed"]
    assert both.closed == [False, True]


def test_an_empty_cell(open_client: OpenClient) -> None:
    """G3: a task whose closure has a variable that is not set yet is looked through like any other."""
    both = Both()
    app = FastAPI()
    app.add_middleware(DeferredMiddleware)

    @app.post("/")
    async def endpoint(upload: UploadFile, deferred: Deferred) -> None:
        other = upload

        async def task() -> None:
            await both.ingest(other or upload)  # noqa: F821 - that is the point

        deferred.add_task(task)
        del other

    with open_client(app, raise_errors=False) as client:
        assert client.post("/", files=FILES).status_code == 200
    assert both.read == []
