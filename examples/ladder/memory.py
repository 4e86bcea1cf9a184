"""The first rung: in memory, with nothing to install.

    uvicorn examples.ladder.memory:app

An answer of 202 means that the mail will be sent unless the process is killed or crashes.
"""

from __future__ import annotations

import os
import time

from fastapi import FastAPI

from asgi_deferred.fastapi import Deferred, DeferredMiddleware

Jobs = Deferred
app = FastAPI()


def welcome(email: str) -> None:
    time.sleep(0.01)  # as long as a mail server takes
    effects = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(effects, f"{email}\n".encode())
    os.close(effects)


app.add_middleware(DeferredMiddleware)


@app.post("/signup", status_code=202)
async def signup(email: str, jobs: Jobs) -> None:
    jobs.add_task(welcome, email)
