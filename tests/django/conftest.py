"""PostgreSQL for a test: a database and a role of its own, which go with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

URL = os.environ.get("DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
LIMIT = 20


@pytest.fixture
def admin() -> Iterator[psycopg.Connection]:
    try:
        connection = psycopg.connect(URL, autocommit=True, connect_timeout=5)
    except psycopg.OperationalError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"No PostgreSQL at {URL}: set DATABASE_URL")
    with connection:
        yield connection


@pytest.fixture
def database(admin: psycopg.Connection) -> Iterator[str]:
    """A database whose owner may have LIMIT connections at once; yields its URL."""
    name = f"asgi_deferred_{uuid4().hex}"
    quoted = sql.Identifier(name)
    limit = sql.Literal(LIMIT)
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' CONNECTION LIMIT {}").format(quoted, limit))
    admin.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(quoted, quoted))
    server = urlsplit(URL)
    yield f"postgresql://{name}:secret@{server.hostname}:{server.port or 5432}/{name}"
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(quoted))
    admin.execute(sql.SQL("DROP ROLE {}").format(quoted))
