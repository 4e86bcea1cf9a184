"""Connections to PostgreSQL under load: the database refuses one more than its role's limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import monotonic
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import psycopg
import pytest
from anyio import create_task_group, sleep
from psycopg import sql

from .serve import serve

pytestmark = pytest.mark.anyio

URL = os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
LIMIT = 20
REQUESTS = 1000
CLIENTS = 6

try:
    psycopg.connect(URL, connect_timeout=5).close()
except psycopg.OperationalError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip(f"No PostgreSQL at {URL}: set DATABASE_URL", allow_module_level=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def admin() -> Iterator[psycopg.Connection]:
    with psycopg.connect(URL, autocommit=True) as connection:
        yield connection


@pytest.fixture
def database(admin: psycopg.Connection) -> Iterator[str]:
    """A database whose owner may have LIMIT connections at once; yields its name, which is the role's too."""
    name = f"asgi_deferred_{uuid4().hex}"
    quoted = sql.Identifier(name)
    limit = sql.Literal(LIMIT)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' CONNECTION LIMIT {}").format(quoted, limit))
    admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(quoted, quoted))
    yield name
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
    admin.execute(sql.SQL("DROP ROLE {}").format(quoted))


def connections(admin: psycopg.Connection, database: str) -> int:
    row = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [database]).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize(
    ("options", "query", "kept"),
    [
        pytest.param({"DJPROJECT_CONN_MAX_AGE": "0"}, "?database", 0, id="CONN_MAX_AGE=0"),
        # Django itself strands a connection of this age with each request's thread, so here only tasks have any.
        pytest.param({"DJPROJECT_CONN_MAX_AGE": "60"}, "", 0, id="CONN_MAX_AGE=60"),
        pytest.param({"DJPROJECT_POOL": "8"}, "?database", 8, id="pool"),
    ],
)
async def test_connections(
    options: dict[str, str], query: str, kept: int, database: str, admin: psycopg.Connection
) -> None:
    """1000 requests with a sync and an async task each stay within the budget, fail nowhere and leave no connection."""
    server_url = urlsplit(URL)
    url = f"postgresql://{database}:secret@{server_url.hostname}:{server_url.port or 5432}/{database}"
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE djproject_entry (id bigserial PRIMARY KEY, text varchar(100) NOT NULL)")
    limits = {"DJPROJECT_CONCURRENCY": "6", "DJPROJECT_THREADS": "3"}
    environ = {"DJANGO_SETTINGS_MODULE": "tests.django.djproject.settings", "DJPROJECT_POSTGRES": url}
    application = "tests.django.djproject.asgi:application"
    statuses: list[int] = []
    left = REQUESTS
    with serve("uvicorn", application, **environ, **limits, **options) as server:
        async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=60) as client:

            async def send() -> None:
                nonlocal left
                while left:
                    left -= 1
                    response = await client.get(f"/{'load' if left % 2 else 'aload'}{query}")
                    statuses.append(response.status_code)

            async with create_task_group() as group:
                for _ in range(CLIENTS):
                    group.start_soon(send)
            deadline = monotonic() + 60
            while (statistics := (await client.get("/statistics")).json())["pending"] or statistics["running"]:
                assert monotonic() < deadline, statistics
                await sleep(0.05)
        while connections(admin, database) > kept:
            assert monotonic() < deadline, connections(admin, database)
            await sleep(0.05)
        with psycopg.connect(url) as connection:
            rows = connection.execute("SELECT text, count(*) FROM djproject_entry GROUP BY text ORDER BY text").fetchall()
        server.terminate()
    assert statuses == [202] * REQUESTS
    assert (statistics["accepted"], statistics["succeeded"]) == (2 * REQUESTS, 2 * REQUESTS)
    assert rows == [("async", REQUESTS), ("sync", REQUESTS)]
