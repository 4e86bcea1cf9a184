"""What the lifespan opens, and the dependencies that hand it to endpoints, also in mounted applications."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from fastapi import Depends
from fastapi.requests import HTTPConnection
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from .mail import Mailer
from .stock import Hub


@dataclass(frozen=True)
class Settings:
    database: str = "sqlite+aiosqlite:///shop.db"
    media: Path = Path("media")
    audit_log: Path = Path("audit.log")
    owner: str = "owner@example.org"
    admin_token: str = "not for production"
    smtp_host: str = "localhost"
    smtp_port: int = 25

    @classmethod
    def from_environ(cls) -> Settings:
        return cls(
            smtp_host=os.environ.get("EMAIL_HOST", cls.smtp_host),
            smtp_port=int(os.environ.get("EMAIL_PORT", cls.smtp_port)),
        )


@dataclass(frozen=True)
class Resources:
    settings: Settings
    sessions: async_sessionmaker[AsyncSession]
    mailer: Mailer
    hub: Hub


def get_resources(connection: HTTPConnection) -> Resources:
    resources: Resources = connection.state.resources
    return resources


Opened: TypeAlias = Annotated[Resources, Depends(get_resources)]


async def get_session(opened: Opened) -> AsyncIterator[AsyncSession]:
    async with opened.sessions() as session:
        yield session


Session: TypeAlias = Annotated[AsyncSession, Depends(get_session)]
