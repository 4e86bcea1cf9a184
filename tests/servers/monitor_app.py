"""A shop with a live page. Its tasks wait for a gate, so that what the page shows stands still."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
from fastapi import FastAPI

from asgi_deferred import DeferredMiddleware, Runner
from asgi_deferred.fastapi import Deferred
from asgi_deferred.monitor import Monitor

gates = Path(os.environ["GATES"])
runner = Runner(max_concurrency=8, drain_timeout=float(os.environ["DRAIN_TIMEOUT"]))
app = FastAPI()
app.add_middleware(DeferredMiddleware, runner=runner)
app.mount("/deferred", Monitor(runner, allow=lambda _: not (gates / "refuse").exists()))
done: set[str] = set()


async def charge_card(why: str) -> None:
    try:
        raise TimeoutError("the bank did not answer within 5 s")
    except TimeoutError as error:
        raise ConnectionError(why) from error


async def send_receipt(number: str, _address: str) -> None:
    while not (gates / number.partition("/")[0]).exists():
        await anyio.sleep(0.01)


def resize_photos(_folder: str) -> None:
    while not (gates / "photos").exists():
        time.sleep(0.01)


async def update_stock() -> None:
    await anyio.sleep_forever()


async def update_search() -> None: ...


@app.post("/orders/{number:path}")
async def order(number: str, deferred: Deferred, why: str = "card declined", name: str | None = None) -> int:
    """Place an order once in each process, and say in which this was."""
    if number not in done:
        done.add(number)
        deferred.add_task(charge_card, why)
        for customer in range(12):
            deferred.options(name=name).add_task(send_receipt, number, f"the secret address of customer {customer}")
    return os.getpid()


@app.post("/photos/{product}")
async def photos(product: str, deferred: Deferred) -> int:
    if product not in done:
        done.add(product)
        deferred.options(timeout=0.05).add_task(update_stock)
        deferred.add_task(resize_photos, "the secret folder")
        for _ in range(3):
            deferred.add_task(update_search)
    return os.getpid()
