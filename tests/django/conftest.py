"""PostgreSQL for a test: a database and a role of its own, which go with it."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from tests.engines.services import POSTGRES, need

from . import dj  # noqa: F401 - sets Django up
from .djproject.journal import journal
from .djproject.models import Entry

LIMIT = 20


@pytest.fixture(autouse=True)
def _empty() -> None:
    Entry.objects.all().delete()
    journal.clear()


@pytest.fixture
def admin() -> Iterator[psycopg.Connection]:
    with psycopg.connect(need(POSTGRES), dbname="postgres", autocommit=True) as connection:
        yield connection


@pytest.fixture
def database(admin: psycopg.Connection) -> Iterator[str]:
    """A database whose owner may have LIMIT connections at once; yields its URL."""
    name = f"asgi_deferred_{uuid4().hex}"
    quoted = sql.Identifier(name)
    limit = sql.Literal(LIMIT)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' CONNECTION LIMIT {}").format(quoted, limit))
    admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(quoted, quoted))
    server = urlsplit(POSTGRES)
    yield f"postgresql://{name}:secret@{server.hostname}:{server.port or 5432}/{name}"
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
    admin.execute(sql.SQL("DROP ROLE {}").format(quoted))
