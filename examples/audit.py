"""An audit log of the requests that failed: `uvicorn examples.audit:app`."""

from __future__ import annotations

import json
from pathlib import Path

from fastapi import FastAPI, HTTPException

from asgi_deferred import DeferredMiddleware, DeferredTasks, Outcome
from asgi_deferred.fastapi import Deferred

api = FastAPI()

AUDIT = Path("audit.jsonl")


def audit(account: str, amount: int, tasks: DeferredTasks) -> None:
    outcome = tasks.outcome
    assert outcome is not None  # it is known by the time a task runs
    with AUDIT.open("a") as file:
        record = {"account": account, "amount": amount, "status": outcome.status, "error": repr(outcome.error)}
        file.write(json.dumps(record) + "\n")


def refused(outcome: Outcome) -> bool:
    return outcome.status == 403


@api.post("/transfers/{account}")
async def transfer(account: str, amount: int, deferred: Deferred) -> dict[str, str]:
    deferred.options(when="failure").add_task(audit, account, amount, deferred)
    deferred.options(when=refused, name="alert").add_task(print, f"{account} tried to take {amount}")
    if amount > 1000:
        raise HTTPException(403, "over the limit")
    return {"transferred": f"{amount // (amount > 0)}"}  # a bug: amount=0 divides by zero


# Around all of it, as FastAPI answers an unhandled error outside of the middleware it is given.
app = DeferredMiddleware(api)
