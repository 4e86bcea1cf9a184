from __future__ import annotations

from typing import Any

import procrastinate

from .common import BROKER, save

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=BROKER))


@app.task(name="save")
async def job(token: str) -> str:
    return save(token)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    rows = await app.connector.execute_query_all_async(
        "SELECT status::text FROM procrastinate_jobs WHERE args ->> 'token' = %(token)s", token=token
    )
    return token.upper() if [row["status"] for row in rows] == ["succeeded"] else None


opened = app.open_async
