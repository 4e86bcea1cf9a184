"""A websocket whose transcript is saved once it is closed: `uvicorn examples.websocket:app`."""

from __future__ import annotations

import json
from pathlib import Path

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from asgi_deferred import DeferredMiddleware
from asgi_deferred.fastapi import Deferred

app = FastAPI()
app.add_middleware(DeferredMiddleware)

TRANSCRIPTS = Path("transcripts")


def save(room: str, lines: list[str]) -> None:
    TRANSCRIPTS.mkdir(exist_ok=True)
    (TRANSCRIPTS / f"{room}.json").write_text(json.dumps(lines))


@app.websocket("/rooms/{room}")
async def chat(websocket: WebSocket, room: str, deferred: Deferred) -> None:
    lines: list[str] = []
    deferred.options(when="always").add_task(save, room, lines)  # runs when the connection is over, however it ended
    await websocket.accept()
    try:
        while True:
            lines.append(await websocket.receive_text())
            await websocket.send_text(f"{len(lines)} lines")
    except WebSocketDisconnect:
        pass
