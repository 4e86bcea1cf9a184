"""The application: `uvicorn --factory examples.shop.main:create_app`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from fastapi import APIRouter, FastAPI, Request, Response
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from starlette.middleware.base import RequestResponseEndpoint
from starlette.staticfiles import StaticFiles

from . import admin, catalog, orders, stock
from .mail import Mailer
from .models import Base
from .resources import Resources, Settings
from .stock import Hub


def create_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or Settings.from_environ()
    settings.media.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Resources]]:
        engine = create_async_engine(settings.database)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        sessions = async_sessionmaker(engine, expire_on_commit=False, close_resets_only=False)
        mailer = Mailer(settings.smtp_host, settings.smtp_port)
        yield {"resources": Resources(settings, sessions, mailer, Hub())}
        await engine.dispose()

    app = FastAPI(title="Shop", lifespan=lifespan)
    app.middleware("http")(time_request)
    app.exception_handler(orders.OutOfStock)(orders.refuse)
    api = APIRouter(prefix="/api")
    api.include_router(catalog.router)
    api.include_router(orders.router)
    app.include_router(api)
    app.include_router(stock.router)
    app.mount("/admin", admin.app)
    app.mount("/media", StaticFiles(directory=settings.media))
    return app


async def time_request(request: Request, call_next: RequestResponseEndpoint) -> Response:
    began = perf_counter()
    response = await call_next(request)
    response.headers["server-timing"] = f"app;dur={(perf_counter() - began) * 1000:.1f}"
    return response
