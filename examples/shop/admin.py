"""What only the owner may do: an application of its own, mounted. Every successful request is in the audit log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI, Header, HTTPException
from fastapi.requests import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sqlalchemy import select
from starlette.background import BackgroundTask

from .models import Order
from .resources import Opened, Session


class Newsletter(BaseModel):
    recipients: list[str]
    text: str


def audited(request: Request, opened: Opened, background: BackgroundTasks) -> None:
    background.add_task(write_audit, opened.settings.audit_log, f"{request.method} {request.url.path}")


def write_audit(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def authorised(opened: Opened, token: Annotated[str, Header()] = "") -> None:
    if token != opened.settings.admin_token:
        raise HTTPException(403)


app = FastAPI(title="Shop administration", dependencies=[Depends(audited), Depends(authorised)])


@app.post("/newsletter", status_code=202)
def send_newsletter(newsletter: Newsletter, opened: Opened, background: BackgroundTasks) -> dict[str, int]:
    for recipient in newsletter.recipients:
        background.add_task(opened.mailer.send, recipient, "News from the shop", newsletter.text)
    return {"recipients": len(newsletter.recipients)}


@app.get("/orders.csv")
async def export(session: Session, opened: Opened) -> StreamingResponse:
    async def rows() -> AsyncIterator[str]:
        yield "id,email,product,quantity\n"
        async for order in await session.stream_scalars(select(Order).order_by(Order.id)):
            yield f"{order.id},{order.email},{order.product.name},{order.quantity}\n"

    tell = BackgroundTask(opened.mailer.send, opened.settings.owner, "Export", "The orders were exported.")
    return StreamingResponse(rows(), media_type="text/csv", background=tell)
