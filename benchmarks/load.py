"""A load generator, in a process of its own: keep-alive connections, each sending its next request on a response.

    python -m benchmarks.load http://127.0.0.1:8000/path --connections 32 --seconds 2

It prints one line of JSON: requests, errors (a status other than 200, or a lost connection), requests per second, and
the latencies' percentiles in milliseconds. Without an interval between requests, it never sleeps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop


class Load:
    """What all connections share."""

    def __init__(self, url: str, requests: int | None, interval: float) -> None:
        self.url = urlsplit(url)
        self.request = f"GET {self.url.path} HTTP/1.1\r\nHost: {self.url.netloc}\r\n\r\n".encode()
        self.left = requests
        self.interval = interval
        self.over = False
        self.errors = 0
        self.latencies: list[float] = []


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.loop = asyncio.get_running_loop()
        self.ended = self.loop.create_future()
        self.parser: Any = httptools.HttpResponseParser(self)
        self.sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.next()

    def next(self) -> None:
        if self.load.over or self.load.left == 0:
            self.transport.close()
            return
        if self.load.left is not None:
            self.load.left -= 1
        self.sent = perf_counter()
        self.transport.write(self.load.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.load.latencies.append(perf_counter() - self.sent)
        if self.parser.get_status_code() != 200:
            self.load.errors += 1
        self.parser = httptools.HttpResponseParser(self)
        if self.load.interval:
            self.loop.call_later(self.load.interval, self.next)
        else:
            self.loop.call_soon(self.next)

    def connection_lost(self, exc: Exception | None) -> None:
        if not (self.load.over or self.load.left == 0):
            self.load.errors += 1
        self.ended.set_result(None)


async def run(load: Load, connections: int, seconds: float) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    start = perf_counter()
    opened = [
        (await loop.create_connection(lambda: Connection(load), load.url.hostname, load.url.port))[1]
        for _ in range(connections)
    ]

    def stay_awake() -> None:  # or a server also pays for waking this process, and a slow one does so more often
        if not load.over:
            loop.call_soon(stay_awake)

    if not load.interval:
        stay_awake()
    await asyncio.wait([one.ended for one in opened], timeout=seconds)
    took = perf_counter() - start
    load.over = True
    for one in opened:
        one.transport.abort()
    latencies = sorted(load.latencies)
    count = len(latencies)
    return {
        "requests": count,
        "errors": load.errors,
        "per_second": count / took,
        **{f"p{p}": latencies[min(count - 1, count * p // 100)] * 1e3 for p in (50, 99) if count},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="at most")
    parser.add_argument("--requests", type=int, help="at most; no limit if left out")
    parser.add_argument("--interval", type=float, default=0.0, help="seconds from a response to the next request")
    arguments = parser.parse_args()
    load = Load(arguments.url, arguments.requests, arguments.interval)
    print(json.dumps(uvloop.run(run(load, arguments.connections, arguments.seconds))))


if __name__ == "__main__":
    main()
