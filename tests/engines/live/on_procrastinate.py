from __future__ import annotations

from typing import Any

import procrastinate

from .common import BROKER, save_async

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=BROKER))


job = app.task(name="save")(save_async)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    rows = await app.connector.execute_query_all_async(
        "SELECT status::text FROM procrastinate_jobs WHERE args ->> 'token' = %(token)s", token=token
    )
    return token.upper() if [row["status"] for row in rows] == ["succeeded"] else None


opened = app.open_async
