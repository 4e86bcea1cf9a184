from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from asgi_deferred.dbos import Store

from .common import BROKER

store = Store(BROKER)


@store.task
def job(token: str) -> None: ...


def opened() -> AbstractAsyncContextManager[Any]:
    return store
