"""Services that the tests need, and processes that they start."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import kombu.connection
import psycopg
import pytest
import redis
from psycopg.sql import SQL, Identifier

ROOT = Path(__file__).parents[2]
REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
RABBITMQ = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672")
POSTGRES = os.environ.get("POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432")
PATIENCE = 10.0  # seconds that a process has to end
CONNECT = 3  # seconds that a service has to answer


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def use_redis(url: str) -> None:
    with redis.Redis.from_url(url, socket_connect_timeout=CONNECT, socket_timeout=CONNECT) as client:
        client.ping()


def use_rabbitmq(url: str) -> None:
    with kombu.connection.Connection(url, connect_timeout=CONNECT) as connection:
        connection.connect()


def use_postgres(url: str) -> None:
    with psycopg.connect(url, dbname="postgres", connect_timeout=CONNECT) as connection:
        if connection.info.parameter_status("is_superuser") != "on":
            raise PermissionError("the role is no superuser")


SERVICES = {
    "redis": ("Redis", use_redis),
    "amqp": ("RabbitMQ", use_rabbitmq),
    "postgresql": ("PostgreSQL", use_postgres),
}


@cache
def what_is_wrong(url: str) -> str | None:
    """Use a service as the tests do, with the URL's user and password; return why that fails."""
    parts = urlsplit(url)
    name, use = SERVICES[parts.scheme]
    try:
        use(url)
    except Exception as exc:
        first_line = f"{exc}".strip().partition("\n")[0]
        return (
            f"no {name} at {parts.hostname}:{parts.port}, see docs/contributing.md ({type(exc).__name__}: {first_line})"
        )
    return None


def give_up(missing: str) -> NoReturn:
    """Skip a test for what this machine lacks, or fail it in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


def need(url: str) -> str:
    """Return the URL of a service that runs; skip the test where none does, or fail it in CI."""
    if missing := what_is_wrong(url):
        give_up(missing)
    return url


def need_program(name: str) -> str:
    """Return the path of a program; skip the test where there is none, or fail it in CI."""
    path = shutil.which(name)
    if path is None:
        give_up(f"no {name} on PATH, see docs/contributing.md")
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait for another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


@contextmanager
def process(*command: str, log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in the background, ended by SIGTERM, or SIGKILL where that does not end it."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield child
    except BaseException:
        print(f"--- {' '.join(command)}\n{log.read_text()[-6000:]}")
        raise
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGCONT)
            child.terminate()
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


@contextmanager
def web(place: Path, **env: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the live application under uvicorn; yield its address and the process."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.engines.live.app:app", f"--port={port}", "--log-level=warning"]
    with process(*command, log=place / "web.log", **env) as child:
        wait_until(lambda: child.poll() is not None or answers("127.0.0.1", port), "uvicorn")
        yield f"http://127.0.0.1:{port}", child


@contextmanager
def redis_server(port: int, place: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Redis of the test's own, which may be stopped and killed."""
    options = {"port": f"{port}", "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": f"{place}"}
    command = [need_program("redis-server"), *(part for name in options for part in (f"--{name}", options[name]))]
    with process(*command, log=place / "redis.log") as child:
        wait_until(lambda: answers("127.0.0.1", port), "redis-server")
        yield child


@contextmanager
def database(name: str) -> Iterator[str]:
    """Make a database of the test's own; yield its URL."""
    with psycopg.connect(need(POSTGRES), dbname="postgres", autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            yield urlsplit(POSTGRES)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
