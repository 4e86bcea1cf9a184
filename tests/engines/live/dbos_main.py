"""A process that defers a DBOS workflow and lets DBOS do it."""

from __future__ import annotations

import os
import sys

import anyio
import dbos

from asgi_deferred import DeferredMiddleware, Runner
from examples.engine_dbos import OnDBOS
from tests.support import Log, request, responder

dbos.DBOS(config={"name": "live", "system_database_url": os.environ["DATABASE_URL"]})


@dbos.DBOS.workflow()
def report(user: int) -> str:
    return f"report {user}"


async def serve() -> Log:
    log = Log()
    async with Runner(observers=[log]) as runner:
        app = responder(lambda tasks: tasks.options(durable=True, name="job").add_task(OnDBOS(report), 1))
        await request(DeferredMiddleware(app, runner), log)
    return log


dbos.DBOS.launch()
OnDBOS.queue = dbos.DBOS.register_queue("reports", polling_interval_sec=0.1)
for line in anyio.run(serve):
    print(line)
(stored,) = dbos.DBOS.list_workflows()
print(dbos.DBOS.retrieve_workflow(stored.workflow_id).get_result())
print(OnDBOS(report)(2))
dbos.DBOS.destroy()
sys.stdout.flush()
