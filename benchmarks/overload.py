"""Overload: tasks added ten times as fast as they can end, and what another endpoint's clients notice of it.

    python -m benchmarks.overload

One uvicorn process, 4 threads, tasks of 0.1 s: 40 a second can be sustained, 400 a second are asked for. Beside that a
client asks for an endpoint without tasks; its latency is compared with that under as many requests without tasks.
It exits with 1 if the median more than doubles, anything is lost, or the backlog does not empty.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

from asgi_deferred import BacklogFull, DeferredMiddleware, Runner, tasks_from

RATE, SECONDS = 400, 2
OVERFLOW = os.environ.get("OVERFLOW", "wait")

runner = Runner(max_threads=4, max_pending=200, overflow=cast("Any", OVERFLOW))


def task() -> None:
    time.sleep(0.1)


async def respond(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError
    status, body = 200, b"ok"
    if scope["path"] == "/defers":
        try:
            tasks_from(scope).add_task(task)
        except BacklogFull:
            status = 503
    elif scope["path"] == "/account":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        body = json.dumps({**runner.statistics()._asdict(), "pages": pages}).encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app = DeferredMiddleware(respond, runner)


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def get(self, path: str) -> tuple[int, bytes]:
        if not hasattr(self, "writer"):
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def account(self) -> dict[str, int]:
        return cast("dict[str, int]", json.loads((await self.get("/account"))[1]))


async def load(port: int, path: str) -> list[int]:
    """Ask for a path at the rate, whatever the answers do; return their statuses."""
    idle = [Client(port) for _ in range(64)]
    statuses: list[int] = []

    async def once(client: Client) -> None:
        statuses.append((await client.get(path))[0])
        idle.append(client)

    async with asyncio.TaskGroup() as group:
        started = time.monotonic()
        for number in range(RATE * SECONDS):
            group.create_task(once(idle.pop(0) if idle else Client(port)))
            await asyncio.sleep(max(0.0, started + (number + 1) / RATE - time.monotonic()))
    return statuses


async def latencies(port: int, path: str) -> tuple[list[float], list[int]]:
    """Measure the endpoint without tasks while a path is asked for."""
    client, measured = Client(port), []
    await client.get("/")
    loading = asyncio.create_task(load(port, path))
    while not loading.done():
        started = time.perf_counter()
        await client.get("/")
        measured.append(time.perf_counter() - started)
        await asyncio.sleep(0.005)
    return measured, await loading


async def measure(port: int) -> bool:
    client = Client(port)
    await latencies(port, "/")
    before = await client.account()
    unloaded, _ = await latencies(port, "/")
    loaded, statuses = await latencies(port, "/defers")
    peak = await client.account()
    for _ in range(600):
        account = await client.account()
        if account["pending"] + account["running"] == 0:
            break
        await asyncio.sleep(0.1)
    ratio = statistics.median(loaded) / statistics.median(unloaded)
    grown = (account["pages"] - before["pages"]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    refused = statuses.count(503)
    print(
        f"overflow={OVERFLOW!r}: median {statistics.median(unloaded) * 1e3:.2f} ms without tasks, "
        f"{statistics.median(loaded) * 1e3:.2f} ms overloaded, ratio {ratio:.2f}; 99th percentile "
        f"{statistics.quantiles(unloaded, n=100)[98] * 1e3:.1f} and {statistics.quantiles(loaded, n=100)[98] * 1e3:.1f} ms; "
        f"{peak['accepted']} accepted, {refused} answered 503, {peak['pending']} waiting at the end; "
        f"{account['succeeded']} succeeded, memory grew by {grown:.1f} MiB"
    )
    complete = account["succeeded"] == account["accepted"] == len(statuses) - refused
    return ratio <= 2 and complete


def main() -> int:
    kept = True
    for overflow in ("wait", "reject"):
        os.environ["OVERFLOW"] = globals()["OVERFLOW"] = overflow
        command = [sys.executable, "-m", "uvicorn", "benchmarks.overload:app", "--fd", "0", "--log-level", "critical"]
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
            port = listening.getsockname()[1]
            server = subprocess.Popen([*command, "--timeout-keep-alive", "75"], stdin=listening.fileno())
        try:
            kept &= asyncio.run(measure(port))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
