"""Start a real server as a process, drive it, end it, and read what its application wrote down."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import trustme

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0  # of anything a test waits for in a server's process


def free_port() -> int:
    """Find a port outside the range that outgoing connections take theirs from."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll another process until it has done something, and return what `condition` then says."""
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {DEADLINE:g} s for {what}")
        time.sleep(0.01)
    return result


@dataclass
class Server:
    """A running server: its process, its transcript and its gates."""

    kind: Kind
    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    tls: ssl.SSLContext | None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, verify=self.tls or False, http2=self.kind.tls, http1=not self.kind.tls, timeout=DEADLINE
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)

    def accepts(self) -> bool:
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log(), f"{text!r} in the log")

    def wait_until_closed(self) -> None:
        until(lambda: not self.accepts(), "the server to close its listening socket")

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    # What the application wrote

    def lines(self, request: str | None = None) -> list[str]:
        """Return the transcript, or the lines of one request without its id."""
        lines = (self.folder / "transcript").read_text().splitlines()
        if request is None:
            return lines
        return [line.partition(" ")[2] for line in lines if line.split(" ")[0] == request]

    def wait_for(self, *lines: str) -> None:
        def written() -> bool:
            return all(any(have.startswith(line) for have in self.lines()) for line in lines)

        until(written, f"{lines} in {self.folder}/transcript")

    def ends_of_lifespan(self) -> list[str]:
        """Return what the applications told their servers, sorted."""
        found = [line.split()[1] for line in self.lines("-") if line.startswith("server: ") and "complete" in line]
        return sorted(found, reverse=True)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def show(self) -> str:
        return "\n".join(["", *self.lines(), "-- log --", self.log()])

    def open_gate(self, name: str) -> None:
        (self.folder / "gates" / name).touch()

    # Its end

    def send_signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end of itself, and return its exit code."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the server runs on: {self.show()}") from None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()


@dataclass(frozen=True)
class Kind:
    """A server and the options it is started with; `{port}` and `{app}` stand for what a test chooses."""

    name: str
    command: tuple[str, ...]
    lifespan: bool = True
    workers: int = 1
    tls: bool = False
    websocket: bool = True
    asyncio: bool = True
    settings: str = ""  # hypercorn's, for a file

    def __str__(self) -> str:
        return self.name

    def with_options(self, *options: str, settings: str = "") -> Kind:
        return replace(self, command=(*self.command, *options), settings=settings)


def _uvicorn(name: str, *options: str, lifespan: bool = True, workers: int = 1) -> Kind:
    return Kind(name, ("uvicorn", "{app}", "--port", "{port}", *options), lifespan, workers)


def _hypercorn(name: str, *options: str, tls: bool = False, asyncio: bool = True) -> Kind:
    bind = ("hypercorn", "{app}", "--bind", "127.0.0.1:{port}", *options)
    return Kind(name, bind, tls=tls, websocket=not tls, asyncio=asyncio)


H11 = _uvicorn("uvicorn-h11", "--http", "h11", "--loop", "asyncio")
HTTPTOOLS = _uvicorn("uvicorn-httptools", "--http", "httptools", "--loop", "asyncio")
UVLOOP = _uvicorn("uvicorn-uvloop", "--http", "httptools", "--loop", "uvloop")
WORKERS = _uvicorn("uvicorn-workers", "--workers", "2", workers=2)
NO_LIFESPAN = _uvicorn("uvicorn-lifespan-off", "--lifespan", "off", lifespan=False)
GUNICORN = Kind(
    "gunicorn",
    ("gunicorn", "{app}", "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:{port}", "--no-control-socket"),
)
HYPERCORN = _hypercorn("hypercorn-asyncio")
HYPERCORN_TRIO = _hypercorn("hypercorn-trio", "-k", "trio", asyncio=False)
HYPERCORN_H2 = _hypercorn("hypercorn-h2", tls=True)
HYPERCORN_TRIO_H2 = _hypercorn("hypercorn-trio-h2", "-k", "trio", tls=True, asyncio=False)
DAPHNE = Kind("daphne", ("daphne", "-b", "127.0.0.1", "-p", "{port}", "{app}"), lifespan=False)
GRANIAN = Kind("granian", ("granian", "--interface", "asgi", "--port", "{port}", "{app}"))

ALL = (
    H11, HTTPTOOLS, UVLOOP, WORKERS, NO_LIFESPAN, GUNICORN,
    HYPERCORN, HYPERCORN_TRIO, HYPERCORN_H2, HYPERCORN_TRIO_H2, DAPHNE, GRANIAN,
)  # fmt: skip


def _certificates(folder: Path) -> tuple[ssl.SSLContext, str]:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "tls.pem")
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    return trusted, f'certfile = "{folder}/tls.pem"\nkeyfile = "{folder}/tls.pem"\n'


@contextmanager
def serve(
    kind: Kind, folder: Path, *, app: str = "apps:app", drain_timeout: float = 15.0, max_pending: int = 1000
) -> Iterator[Server]:
    """Start a server and wait until it answers; at the end make sure that it is gone, and its children with it."""
    port = free_port()
    (folder / "gates").mkdir()
    (folder / "gates" / "hello.txt").write_text("hello")
    (folder / "transcript").touch()
    command = [part.format(port=port, app=f"tests.servers.{app}") for part in kind.command]
    settings = kind.settings
    client_tls = None
    if kind.tls:
        client_tls, files = _certificates(folder)
        settings += files
    if settings:
        (folder / "settings.toml").write_text(settings)
        command += ["--config", str(folder / "settings.toml")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TRANSCRIPT": str(folder / "transcript"),
        "GATES": str(folder / "gates"),
        "DRAIN_TIMEOUT": str(drain_timeout),
        "MAX_PENDING": str(max_pending),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(kind, process, port, folder, client_tls)
    try:
        until(lambda: process.poll() is not None or server.accepts(), f"{kind} to listen: {server.log()}")
        assert process.poll() is None, server.log()
        yield server
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def tasks(*specifications: str, request: str) -> str:
    """Write the query of a request that defers tasks."""
    return "?" + "&".join([f"id={request}", *(f"task={one}" for one in specifications)])


def raw_request(path: str, *, close: bool = False) -> bytes:
    connection = b"Connection: close\r\n" if close else b""
    return b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + connection + b"\r\n"


def read_until(connection: socket.socket, end: bytes, times: int = 1) -> bytes:
    received = b""
    while received.count(end) < times:
        chunk = connection.recv(65536)
        if not chunk:
            break
        received += chunk
    return received
