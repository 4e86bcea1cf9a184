"""Live updates of the stock, over a websocket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import anyio
from fastapi import APIRouter, WebSocket

router = APIRouter()


class Update(TypedDict):
    product: int
    stock: int


class Hub:
    def __init__(self) -> None:
        self._subscribers: set[asyncio.Queue[Update]] = set()

    @contextmanager
    def subscribe(self) -> Iterator[asyncio.Queue[Update]]:
        updates: asyncio.Queue[Update] = asyncio.Queue()
        self._subscribers.add(updates)
        try:
            yield updates
        finally:
            self._subscribers.remove(updates)

    async def publish(self, update: Update) -> None:
        for updates in self._subscribers:
            updates.put_nowait(update)


@router.websocket("/stock")
async def watch(websocket: WebSocket) -> None:
    hub: Hub = websocket.state.resources.hub
    with hub.subscribe() as updates:

        async def send_updates() -> None:
            while True:
                await websocket.send_json(await updates.get())

        await websocket.accept()
        async with anyio.create_task_group() as group:
            group.start_soon(send_updates)
            async for _ in websocket.iter_text():  # until the client leaves
                pass
            group.cancel_scope.cancel()
