"""Services that the tests need, and processes that they start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

ROOT = Path(__file__).parents[2]
REDIS = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379")
RABBITMQ = os.environ.get("RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672")
PATIENCE = 10.0  # seconds that a process has to end
POSTGRES = os.environ.get("POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432")


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def need(url: str) -> str:
    """Return the URL of a service that runs; skip the test where none does, or fail it in CI."""
    parts = urlsplit(url)
    if not answers(parts.hostname or "127.0.0.1", parts.port or 0):
        missing = f"no {parts.scheme} service at {parts.hostname}:{parts.port}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return url


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
    command = ["redis-server", f"--port {port}", "--bind 127.0.0.1", "--save ''", "--appendonly no", f"--dir {place}"]
    with process(*" ".join(command).replace("''", "").split(), log=place / "redis.log") as child:
        wait_until(lambda: answers("127.0.0.1", port), "redis-server")
        yield child


@contextmanager
def database(name: str) -> Iterator[str]:
    """Make a database of the test's own; yield its URL."""
    with psycopg.connect(need(POSTGRES), dbname="postgres", autocommit=True) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(name)))
        try:
            yield f"{POSTGRES}/{name}"
        finally:
            connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
