"""SQLAlchemy's sessions that are found by a scope, not passed, in background tasks that were moved over."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi import __version__ as fastapi_version
from fastapi.testclient import TestClient
from sqlalchemy import AsyncAdaptedQueuePool, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine

from asgi_deferred import DeferredTask, Runner
from asgi_deferred.fastapi import DeferredMiddleware

pytestmark = pytest.mark.skipif(
    tuple(int(each) for each in fastapi_version.split(".")[:2]) < (0, 118),
    reason="this FastAPI removes the session ahead of its background tasks",
)

request_scope: ContextVar[object] = ContextVar("request_scope")


class App:
    """An application whose background task uses the session of its scope."""

    def __init__(self, database: Path, *, by_task: bool) -> None:
        url = f"sqlite+aiosqlite:///{database}"
        engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool, pool_size=2, max_overflow=0, pool_timeout=1)
        self.sessions = async_scoped_session(
            async_sessionmaker(engine), scopefunc=asyncio.current_task if by_task else request_scope.get
        )
        self.same: list[bool] = []

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            assert "Current Checked out connections: 0" in engine.pool.status()
            await engine.dispose()

        async def session() -> AsyncIterator[AsyncSession]:
            request_scope.set(object())
            yield self.sessions()
            await self.sessions.remove()

        async def task(of_request: AsyncSession) -> None:
            await self.sessions.execute(text("SELECT 1"))
            self.same.append(self.sessions() is of_request)

        self.app = FastAPI(lifespan=lifespan)

        @self.app.get("/")
        async def endpoint(session: Annotated[AsyncSession, Depends(session)], background: BackgroundTasks) -> None:
            await session.execute(text("SELECT 1"))
            background.add_task(task, session)

    @asynccontextmanager
    async def removed(self, task: DeferredTask) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self.sessions.remove()


@pytest.mark.parametrize("moved", [False, True])
def test_scope_of_the_request(tmp_path: Path, moved: bool) -> None:
    """G5: where a context variable is the scope, a task has the request's session, plain and moved over."""
    app = App(tmp_path / "db", by_task=False)
    if moved:
        app.app.add_middleware(DeferredMiddleware)
    with TestClient(app.app) as client:
        for _ in range(3):
            assert client.get("/").status_code == 200
    assert app.same == [True] * 3


def test_scope_of_the_task(tmp_path: Path) -> None:
    """G3: where `asyncio.current_task` is the scope, a task has a session of its own, which an `around` removes."""
    app = App(tmp_path / "db", by_task=True)
    app.app.add_middleware(DeferredMiddleware, runner=Runner(around=[app.removed]))
    with TestClient(app.app) as client:
        for _ in range(3):
            assert client.get("/").status_code == 200
    assert app.same == [False] * 3
