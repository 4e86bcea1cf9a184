"""Clients of an application in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import httpx
import pytest
from starlette.testclient import TestClient

from .support import lifespan

OpenClient: TypeAlias = Callable[..., AbstractContextManager[TestClient]]


@asynccontextmanager
async def async_client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An httpx client on this event loop, with the application's lifespan around it."""
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture(params=["asyncio, lifespan", "asyncio", "trio, lifespan", "trio"])
def open_client(request: pytest.FixtureRequest) -> OpenClient:
    """Starlette's TestClient, which runs the application in another thread; all tasks have ended when it closes."""
    backend, _, with_lifespan = request.param.partition(", ")

    @contextmanager
    def open_client(app: Any, *, raise_errors: bool = True) -> Iterator[TestClient]:
        client = TestClient(app, backend=backend, raise_server_exceptions=raise_errors)
        if with_lifespan:
            with client:
                yield client
        else:
            yield client

    return open_client
