"""Orders, their invoices, and what is sent back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, PositiveInt
from starlette.background import BackgroundTask

from .catalog import find_product
from .models import Order
from .resources import Opened, Session, get_resources


class OrderIn(BaseModel):
    product_id: int
    email: str
    quantity: PositiveInt


class OrderOut(OrderIn):
    model_config = ConfigDict(from_attributes=True)

    id: int
    returned: bool


class OutOfStock(Exception):
    """Raised when there is less of a product than was ordered."""


router = APIRouter(prefix="/orders", tags=["orders"])
returns = APIRouter(prefix="/{order_id}/return")


async def find_order(order_id: int, session: Session) -> Order:
    order = await session.get(Order, order_id)
    if order is None:
        raise HTTPException(404, "no such order")
    return order


@router.post("", status_code=201, response_model=OrderOut)
async def place(order: OrderIn, session: Session, opened: Opened, background: BackgroundTasks) -> Order:
    product = await find_product(order.product_id, session)
    placed = Order(**order.model_dump())
    session.add(placed)
    product.stock -= order.quantity
    await session.flush()
    background.add_task(
        opened.mailer.send, order.email, f"Order {placed.id}", f"{order.quantity} x {product.name} is on its way."
    )
    background.add_task(opened.hub.publish, {"product": product.id, "stock": product.stock})
    if product.stock < 0:
        raise OutOfStock(product.name)  # so nothing is committed, and the customer gets no mail
    await session.commit()
    return placed


async def refuse(request: Request, error: OutOfStock) -> JSONResponse:
    opened = get_resources(request)
    tell = BackgroundTask(opened.mailer.send, opened.settings.owner, "Out of stock", f"Customers want more {error}.")
    return JSONResponse({"detail": f"not enough {error} in stock"}, status_code=409, background=tell)


@router.get("/{order_id}/invoice")
def invoice(order: Annotated[Order, Depends(find_order)]) -> FileResponse:
    with tempfile.NamedTemporaryFile("w", prefix="invoice-", suffix=".txt", delete=False) as file:
        file.write(f"Invoice {order.id}: {order.quantity} x {order.product.name}, to {order.email}\n")
    path = Path(file.name)
    return FileResponse(path, filename=f"invoice-{order.id}.txt", background=BackgroundTask(path.unlink))


@returns.post("", response_model=OrderOut)
async def send_back(
    order: Annotated[Order, Depends(find_order)], session: Session, opened: Opened, background: BackgroundTasks
) -> Order:
    if order.returned:
        raise HTTPException(409, "it was sent back before")
    order.returned = True
    order.product.stock += order.quantity
    await session.commit()
    background.add_task(opened.mailer.send, order.email, f"Order {order.id}", "You get your money back.")
    background.add_task(opened.hub.publish, {"product": order.product_id, "stock": order.product.stock})
    return order


router.include_router(returns)
