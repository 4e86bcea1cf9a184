"""Soak: many requests with tasks on one uvicorn process, and what that has grown by.

    python -m benchmarks.soak                    200 000 requests
    python -m benchmarks.soak 20000

Each request defers an async and a sync task; every hundredth also one that fails. Between rounds the process is left
to get idle, and says what it holds. It exits with 1 if that grew beyond the bounds after the first rounds.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from asgi_deferred import DeferredMiddleware, Runner, tasks_from

ROUNDS = 20
WARM_UP = 4  # rounds in which caches and pools fill
CONNECTIONS = 16
PIPELINED = 10
# A backlog of max_pending=10 000 tasks leaves some MiB with the allocator; a leak shows in the number of objects.
BOUNDS = {"memory_mib": 16.0, "descriptors": 2, "threads": 8, "objects": 500, "unfinished": 0}

runner = Runner(max_threads=8)
numbers = itertools.count()


async def task() -> None:
    await asyncio.sleep(0)


def task_in_thread() -> None:
    pass


def failing() -> None:
    raise ValueError("one in a hundred")


async def holdings() -> dict[str, float]:
    """Say what this process holds, once it is idle."""
    await runner.wait_idle()
    await asyncio.sleep(0.2)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "descriptors": len([*Path("/proc/self/fd").iterdir()]),
        "threads": threading.active_count(),
        "objects": len(gc.get_objects()),
        "unfinished": runner.statistics().pending + runner.statistics().running,
        "accepted": runner.statistics().accepted,
    }


async def respond(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        raise NotImplementedError
    body = b"ok"
    if scope["path"] == "/holdings":
        body = json.dumps(await holdings()).encode()
    else:
        tasks = tasks_from(scope)
        tasks.add_task(task)
        tasks.add_task(task_in_thread)
        if next(numbers) % 100 == 0:
            tasks.add_task(failing)
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app = DeferredMiddleware(respond, runner)
logging.getLogger("asgi_deferred").setLevel(logging.CRITICAL)


async def fetch(port: int, path: bytes, times: int) -> bytes:
    """Ask for a path a number of times over one connection, and return the last answer's body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b""
    while times > 0:
        batch = min(times, PIPELINED)
        writer.write(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path * batch)
        for _ in range(batch):
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split()[0]
            body = await reader.readexactly(int(length))
        times -= batch
    writer.close()
    await writer.wait_closed()
    return body


async def soak(port: int, requests: int) -> bool:
    samples: list[dict[str, float]] = []
    print(f"{'requests':>9} {'seconds':>8} " + " ".join(f"{name:>11}" for name in BOUNDS))
    started = time.monotonic()
    for number in range(1, ROUNDS + 1):
        each = requests // ROUNDS // CONNECTIONS
        await asyncio.gather(*(fetch(port, b"/", each) for _ in range(CONNECTIONS)))
        samples.append(json.loads(await fetch(port, b"/holdings", 1)))
        row = " ".join(f"{samples[-1][name]:>11}" for name in BOUNDS)
        print(f"{number * each * CONNECTIONS:>9} {time.monotonic() - started:>8.1f} {row}", flush=True)
    kept = True
    warm = samples[WARM_UP - 1 :]
    for name, bound in BOUNDS.items():
        growth = max(sample[name] for sample in warm[1:]) - warm[0][name]
        kept &= growth <= bound
        print(
            f"{name}: grew by at most {growth:g} after {WARM_UP} rounds; bound {bound}: {'kept' if growth <= bound else 'BROKEN'}"
        )
    print(f"tasks accepted: {samples[-1]['accepted']:.0f}")
    return kept


def main(requests: int) -> int:
    command = [sys.executable, "-m", "uvicorn", "benchmarks.soak:app", "--fd", "0", "--log-level", "critical"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        server = subprocess.Popen(command, stdin=listening.fileno())
    try:
        ok = asyncio.run(soak(port, requests))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000))
