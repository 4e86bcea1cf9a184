"""Connections to PostgreSQL under load: the database refuses one more than its role's limit."""

from __future__ import annotations

import httpx
import psycopg
import pytest
from anyio import create_task_group, fail_after

from tests.engines.services import wait_until

from .serve import serve

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

REQUESTS = 1000
CLIENTS = 6


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def connections(admin: psycopg.Connection, database: str) -> int:
    name = database.rpartition("/")[2]
    row = admin.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = %s", [name]).fetchone()
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
    with psycopg.connect(database) as connection:
        connection.execute("CREATE TABLE djproject_entry (id bigserial PRIMARY KEY, text varchar(100) NOT NULL)")
    limits = {"DJPROJECT_CONCURRENCY": "6", "DJPROJECT_THREADS": "3"}
    environ = {"DJANGO_SETTINGS_MODULE": "tests.django.djproject.settings", "DJPROJECT_POSTGRES": database}
    application = "tests.django.djproject.asgi:application"
    statuses: list[int] = []
    left = REQUESTS
    with serve("uvicorn", application, {**environ, **limits, **options}) as server:
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
            statistics = {"pending": 1, "running": 0}
            with fail_after(60):
                while statistics["pending"] + statistics["running"]:
                    statistics = (await client.get("/statistics")).json()
        wait_until(lambda: connections(admin, database) <= kept, "connections to be closed")
        with psycopg.connect(database) as connection:
            rows = connection.execute(
                "SELECT text, count(*) FROM djproject_entry GROUP BY text ORDER BY text"
            ).fetchall()
        server.terminate()
    assert statuses == [202] * REQUESTS
    assert (statistics["accepted"], statistics["succeeded"]) == (2 * REQUESTS, 2 * REQUESTS)
    assert rows == [("async", REQUESTS), ("sync", REQUESTS)]
