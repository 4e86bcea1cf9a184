"""An application of 13 endpoints in four routers and two mounts, and its tests: with the one line, and without."""

import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import anyio
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, UploadFile
from fastapi import __version__ as fastapi_version
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.routing import Mount, Route

from asgi_deferred import DeferredMiddleware as CoreMiddleware
from asgi_deferred import Runner
from asgi_deferred.fastapi import DeferredMiddleware

from .support import assert_conserved

# Before that, FastAPI closes uploads and tears dependencies down ahead of its background tasks.
OPEN = tuple(int(each) for each in fastapi_version.split(".")[:2]) >= (0, 118)


class Session:
    """What an application has in place of a database session: it can be used until its request is over."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = rows
        self.closed = False

    def insert(self, row: str) -> None:
        if self.closed:
            raise RuntimeError("the session is closed")
        self.rows.append(row)


class Shop:
    """The application. It knows nothing of asgi-deferred."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.files: list[Path] = []
        self.sessions: list[Session] = []
        self.semaphore = anyio.Semaphore(1)
        self.app = FastAPI(dependencies=[Depends(self.audited)])
        self.app.include_router(self.accounts())
        self.app.include_router(self.orders(), prefix="/orders")
        self.app.mount("/admin", self.admin())
        self.app.mount("/legacy", self.legacy())

    def insert(self, row: str) -> None:
        self.rows.append(row)

    async def insert_async(self, row: str) -> None:
        self.rows.append(row)

    def audited(self, background: BackgroundTasks, audit: str = "") -> None:
        if audit:
            background.add_task(self.insert, f"audit {audit}")

    def session(self) -> Iterator[Session]:
        session = Session(self.rows)
        self.sessions.append(session)
        yield session
        session.closed = True

    async def slot(self) -> AsyncIterator[int]:
        async with self.semaphore:
            yield self.semaphore.value

    def accounts(self) -> APIRouter:
        router = APIRouter(prefix="/accounts")

        @router.post("/signup", status_code=202)
        def signup(background: BackgroundTasks, email: str) -> dict[str, str]:
            background.add_task(self.insert, f"mail to {email}")
            return {"email": email}

        @router.post("/avatar")
        async def avatar(upload: UploadFile, background: BackgroundTasks) -> str | None:
            async def ingest(upload: UploadFile) -> None:
                self.insert(f"{upload.filename}: {(await upload.read()).decode()}")

            background.add_task(ingest, upload)
            return upload.filename

        @router.post("/login", response_class=PlainTextResponse)
        async def login(background: BackgroundTasks) -> str:
            background.add_task(self.insert, "never: the login failed")
            raise HTTPException(401)

        router.include_router(self.profiles())
        return router

    def profiles(self) -> APIRouter:
        router = APIRouter(prefix="/profiles")

        @router.put("/{name}")
        def rename(name: str, background: BackgroundTasks, session: Annotated[Session, Depends(self.session)]) -> None:
            background.add_task(session.insert, f"renamed {name}")

        @router.get("/{name}/picture")
        def picture(name: str) -> Response:
            handle, path = tempfile.mkstemp()
            os.write(handle, name.encode())
            os.close(handle)
            self.files.append(Path(path))
            return FileResponse(path, background=BackgroundTask(os.unlink, path))

        return router

    def orders(self) -> APIRouter:
        router = APIRouter()

        @router.post("/")
        async def create(background: BackgroundTasks, slot: Annotated[int, Depends(self.slot)]) -> int:
            async def bill() -> None:
                self.insert(f"billed with {self.semaphore.value} slots free")

            background.add_task(bill)
            return slot

        @router.get("/export")
        async def export(background: BackgroundTasks) -> StreamingResponse:
            async def body() -> AsyncIterator[str]:
                yield "one,"
                background.add_task(self.insert_async, "exported")
                yield "two"

            return StreamingResponse(body())

        router.include_router(self.returns(), prefix="/returns")
        return router

    def returns(self) -> APIRouter:
        router = APIRouter()

        @router.post("/{order}")
        async def send_back(order: int, background: BackgroundTasks) -> None:
            async def refund() -> None:
                self.insert(f"refund {order}")
                background.add_task(self.insert, f"mail of the refund {order}")

            background.add_task(refund)

        @router.delete("/{order}")
        async def withdraw(order: int) -> Response:
            return JSONResponse(None, background=BackgroundTask(self.insert_async, f"withdrawn {order}"))

        return router

    def admin(self) -> FastAPI:
        app = FastAPI()

        @app.get("/report")
        def report(background: BackgroundTasks) -> str:
            background.add_task(self.insert, "report was read")
            return "report"

        @app.get("/broken")
        def broken() -> Response:
            return Response("no", status_code=500, background=BackgroundTask(self.insert, "alert"))

        return app

    def legacy(self) -> Starlette:
        shop = self

        class Stock(HTTPEndpoint):
            async def get(self, request: Request) -> Response:
                return PlainTextResponse("stock", background=BackgroundTask(shop.insert, "stock was read"))

        def ping(request: Request) -> Response:
            return PlainTextResponse("pong", background=BackgroundTask(shop.insert_async, "pinged"))

        return Starlette(routes=[Route("/stock", Stock), Mount("/v1", routes=[Route("/ping", ping)])])


def check_signup(client: TestClient, shop: Shop) -> None:
    assert client.post("/accounts/signup?email=ada&audit=me").json() == {"email": "ada"}
    assert shop.rows == ["audit me", "mail to ada"]


def check_avatar(client: TestClient, shop: Shop) -> None:
    assert client.post("/accounts/avatar", files={"upload": ("ada.png", b"picture")}).json() == "ada.png"
    assert shop.rows == ["ada.png: picture"]


def check_login(client: TestClient, shop: Shop) -> None:
    assert client.post("/accounts/login").status_code == 401
    assert shop.rows == []


def check_rename(client: TestClient, shop: Shop) -> None:
    assert client.put("/accounts/profiles/ada").status_code == 200
    assert shop.rows == ["renamed ada"]
    assert [session.closed for session in shop.sessions] == [True]


def check_picture(client: TestClient, shop: Shop) -> None:
    assert client.get("/accounts/profiles/ada/picture").text == "ada"
    assert [file.exists() for file in shop.files] == [False]


def check_create(client: TestClient, shop: Shop) -> None:
    assert client.post("/orders/").json() == 0
    assert shop.rows == ["billed with 0 slots free"]
    assert shop.semaphore.value == 1


def check_export(client: TestClient, shop: Shop) -> None:
    assert client.get("/orders/export").text == "one,two"
    assert shop.rows == ["exported"]


def check_send_back(client: TestClient, shop: Shop) -> None:
    assert client.post("/orders/returns/7").status_code == 200
    assert shop.rows == ["refund 7", "mail of the refund 7"]


def check_withdraw(client: TestClient, shop: Shop) -> None:
    assert client.delete("/orders/returns/7").status_code == 200
    assert shop.rows == ["withdrawn 7"]


def check_report(client: TestClient, shop: Shop) -> None:
    assert client.get("/admin/report").json() == "report"
    assert shop.rows == ["report was read"]


def check_broken(client: TestClient, shop: Shop) -> None:
    assert client.get("/admin/broken").status_code == 500
    assert shop.rows == ["alert"]


def check_stock(client: TestClient, shop: Shop) -> None:
    assert client.get("/legacy/stock").text == "stock"
    assert shop.rows == ["stock was read"]


def check_ping(client: TestClient, shop: Shop) -> None:
    assert client.get("/legacy/v1/ping").text == "pong"
    assert shop.rows == ["pinged"]


Check: TypeAlias = Callable[[TestClient, Shop], None]
Backend: TypeAlias = Literal["asyncio", "trio"]

CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
if not OPEN:  # pragma: no cover
    CHECKS = [check for check in CHECKS if check not in (check_avatar, check_rename, check_create)]
MOVED: dict[Check, int] = {check_signup: 2, check_login: 0, check_send_back: 2}  # the others: one task each


@contextmanager
def opened(app: Any, backend: Backend, *, with_lifespan: bool) -> Iterator[TestClient]:
    client = TestClient(app, backend=backend)
    if with_lifespan:
        with client:
            yield client
    else:
        yield client


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("with_lifespan", [True, False])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("moved", ["", "added", "wrapped"])
def test_its_own_tests_pass(check: Check, with_lifespan: bool, backend: Backend, moved: str) -> None:
    """G11: the application's own tests pass without the one line and with it, and then each task was the runner's."""
    shop, runner = Shop(), Runner()
    app: Any = shop.app
    if moved == "added":
        shop.app.add_middleware(DeferredMiddleware, runner=runner)
    elif moved == "wrapped":
        app = DeferredMiddleware(shop.app, runner)
    with opened(app, backend, with_lifespan=with_lifespan) as client:
        check(client, shop)
    assert runner.statistics().succeeded == (MOVED.get(check, 1) if moved else 0)
    assert_conserved(runner)


@pytest.mark.skipif(not OPEN, reason="this FastAPI closes uploads ahead of its background tasks")
def test_detached_runs_all_of_it(open_all: Callable[[Any], TestClient]) -> None:
    """G11: detached, all of its endpoints' tasks run too, uploads are open, and a request-scoped session is not."""
    shop, runner = Shop(), Runner()
    shop.app.add_middleware(DeferredMiddleware, runner=runner, detached=True)
    with open_all(shop.app) as client:
        for check in CHECKS:
            with suppress(AssertionError):  # of a test that looks right after its request
                check(client, shop)
    assert sorted(shop.rows) == [
        "ada.png: picture",
        "alert",
        "audit me",
        "billed with 1 slots free",
        "exported",
        "mail of the refund 7",
        "mail to ada",
        "pinged",
        "refund 7",
        "report was read",
        "stock was read",
        "withdrawn 7",
    ]
    assert (runner.statistics().succeeded, runner.statistics().failed) == (13, 1)


@pytest.fixture(params=["asyncio", "trio"])
def open_all(request: pytest.FixtureRequest) -> Callable[[Any], TestClient]:
    return lambda app: TestClient(app, backend=request.param)


def test_the_core_moves_nothing() -> None:
    """G10: under the core's middleware an application's background tasks stay its framework's."""
    shop, runner = Shop(), Runner()
    shop.app.add_middleware(CoreMiddleware, runner=runner)
    with TestClient(shop.app) as client:
        for check in CHECKS:
            shop.rows.clear()
            shop.sessions.clear()
            shop.files.clear()
            check(client, shop)
    assert runner.statistics().accepted == 0
