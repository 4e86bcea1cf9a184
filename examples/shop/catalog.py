"""Products, their pictures, and the import of a supplier's list."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Annotated, BinaryIO

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, UploadFile
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from .models import Product
from .resources import Opened, Session


class ProductIn(BaseModel):
    name: str
    stock: int


class ProductOut(ProductIn):
    model_config = ConfigDict(from_attributes=True)

    id: int
    views: int
    picture: str | None


router = APIRouter(prefix="/products", tags=["catalog"])
pictures = APIRouter(prefix="/{product_id}/picture")


async def find_product(product_id: int, session: Session) -> Product:
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(404, "no such product")
    return product


@router.post("", status_code=201, response_model=ProductOut)
async def add(product: ProductIn, session: Session) -> Product:
    added = Product(**product.model_dump())
    session.add(added)
    await session.commit()
    return added


@router.get("/{product_id}", response_model=ProductOut)
async def show(
    product: Annotated[Product, Depends(find_product)], session: Session, background: BackgroundTasks
) -> Product:
    background.add_task(count_view, product, session)
    return product


async def count_view(product: Product, session: AsyncSession) -> None:
    product.views += 1
    await session.commit()


@router.post("/import", status_code=202)
async def import_list(upload: UploadFile, session: Session, background: BackgroundTasks) -> dict[str, str | None]:
    background.add_task(import_products, upload, session)
    return {"importing": upload.filename}


async def import_products(upload: UploadFile, session: AsyncSession) -> None:
    lines = (await upload.read()).decode().splitlines()
    session.add_all(Product(name=row["name"], stock=int(row["stock"])) for row in csv.DictReader(lines))
    await session.commit()


@pictures.put("", status_code=202)
async def replace_picture(
    product: Annotated[Product, Depends(find_product)],
    picture: UploadFile,
    session: Session,
    opened: Opened,
    background: BackgroundTasks,
) -> dict[str, str]:
    name = f"{product.id}{Path(picture.filename or '').suffix}"
    background.add_task(store, picture.file, opened.settings.media / name)
    background.add_task(show_picture, product, name, session)
    return {"picture": f"/media/{name}"}


def store(source: BinaryIO, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)


async def show_picture(product: Product, name: str, session: AsyncSession) -> None:
    product.picture = name
    await session.commit()


router.include_router(pictures)
