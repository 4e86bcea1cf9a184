"""On uvicorn, with httptools and uvloop, over loopback, and with the load from a process of its own."""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median

from ._report import Comparison, Result, progress
from ._serve import FAST, finish, serve

METHOD = "uvicorn (httptools, uvloop), load generator as a separate process on loopback"
CLOSED = f"{METHOD}, which never sleeps; 32 connections"


QUICK = ["Starlette", "asgi-background", "ours in Starlette", "FastAPI", "ours in FastAPI"]


def throughput(factor: float) -> Result:
    rounds = max(2, round(6 * factor))
    samples, _ = _quick("throughput", rounds)
    return Result(
        "throughput",
        "Requests with one async no-op task each",
        "requests/s",
        f"{CLOSED}, {rounds} sets of server processes, each 3 times 1 s in turn after a warm-up, medians",
        samples,
        [
            Comparison("ours in Starlette", "Starlette", at_least=True),
            Comparison("ours in Starlette", "asgi-background", at_least=True),
            Comparison("ours in FastAPI", "FastAPI", at_least=True),
        ],
    )


def processor(factor: float) -> Result:
    rounds = max(2, round(6 * factor))
    _, samples = _quick("processor", rounds)
    return Result(
        "processor",
        "Processor time of the server for a request with one async no-op task",
        "µs for each request",
        f"{CLOSED}, {rounds} sets of server processes, each 3 times 1 s in turn after a warm-up, medians",
        samples,
        [
            Comparison("ours in Starlette", "Starlette", 1.35),
            Comparison("asgi-background", "Starlette"),
            Comparison("ours in FastAPI", "FastAPI"),
        ],
    )


def _quick(what: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Load all with quick requests; return the requests in a second, and microseconds of processor time for each."""
    rates: dict[str, list[float]] = {name: [] for name in QUICK}
    used: dict[str, list[float]] = {name: [] for name in QUICK}
    for index in range(rounds):
        progress(f"{what}: round {index} of {rounds}")
        with ExitStack() as stack:  # where a process has its objects moves its figures, so each round has new ones
            servers = {name: stack.enter_context(serve(name, *FAST)) for name in QUICK}
            for name in QUICK:
                servers[name].load("/quick", connections=32, requests=2000, seconds=10)
            for name in QUICK * 3:
                before = servers[name].cpu_seconds()
                figures = servers[name].load("/quick", connections=32, seconds=1.0)
                seconds = servers[name].cpu_seconds() - before
                if figures["errors"]:
                    raise RuntimeError(f"{name}: {figures}")
                rates[name].append(figures["per_second"])
                used[name].append(seconds / figures["requests"] * 1e6)
    return rates, used


def latency(factor: float) -> Result:
    rounds = max(3, round(15 * factor))
    names = ["Starlette", "asgi-background", "ours in Starlette", "FastAPI", "ours in FastAPI"]
    samples: dict[str, list[float]] = {name: [] for name in names}
    p99: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serve(name, *FAST, BENCHMARKS_NOTE="1")) for name in names}
        for index in range(-1, rounds):
            progress(f"latency: round {index} of {rounds}")
            for name in names[index % len(names) :] + names[: index % len(names)]:
                servers[name].load("/quick", connections=1, requests=300, seconds=10, interval=0.001)
                waits = sorted(map(float, servers[name].get("/waits").split()))
                if index >= 0:
                    samples[name].append(median(waits))
                    p99[name].append(waits[len(waits) * 99 // 100])
    return Result(
        "latency",
        "From the response's final message to the start of its task",
        "µs, median",
        f"{METHOD}; one connection, {rounds} interleaved rounds of 300 requests, 1 ms apart",
        samples,
        [Comparison("ours in Starlette", "Starlette"), Comparison("ours in FastAPI", "FastAPI")],
        notes=["p99: " + ", ".join(f"{name} {median(figures):.0f}" for name, figures in p99.items())],
    )


def endpoints(factor: float) -> Result:
    rounds = max(3, round(5 * factor))
    names = ["FastAPI", "ours in FastAPI"]
    samples: dict[str, list[float]] = {}
    middle: dict[str, list[float]] = {}
    for index in range(rounds):
        progress(f"endpoints: round {index} of {rounds}")
        for name in names:
            # A server of its own for each round, as the backlog of the last must not last into the next.
            with serve(name, *FAST) as server:
                server.load("/async", requests=200, connections=1, seconds=5)
                server.load("/sync", requests=200, connections=1, seconds=5)
                server.load("/blocking", requests=200, connections=50, seconds=5)
                probes = {
                    path: server.start_load(path, connections=2, seconds=1.5, interval=0.005)
                    for path in ("/sync", "/async")
                }
                for path, probe in probes.items():
                    figures = finish(probe)
                    samples.setdefault(f"{path[1:]} endpoint, {name}", []).append(figures["p99"])
                    middle.setdefault(f"{path[1:]} endpoint, {name}", []).append(figures["p50"])
    samples = dict(sorted(samples.items(), reverse=True))
    return Result(
        "endpoints",
        "Endpoints while sync tasks of 50 ms saturate the threads",
        "ms, 99th percentile",
        f"{METHOD}; 200 requests deferred 10 tasks each, 40 threads, then 1.5 s of probes; {rounds} rounds, medians",
        samples,
        [
            Comparison("sync endpoint, ours in FastAPI", "sync endpoint, FastAPI", 0.1),
            Comparison("async endpoint, ours in FastAPI", "async endpoint, FastAPI"),
        ],
        notes=["p50: " + ", ".join(f"{name} {median(figures):.1f}" for name, figures in middle.items())],
    )


def memory(factor: float) -> Result:
    rounds = max(3, round(3 * factor))
    names = ["Starlette", "FastAPI", "ours in Starlette", "ours in FastAPI"]
    waiting = 10_000
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names:
            progress(f"memory: round {index} of {rounds}, {name}")
            with serve(name, *FAST) as server:
                server.load("/async", requests=2000, connections=32, seconds=30)
                server.load("/gated", requests=100, connections=32, seconds=30)
                before = int(server.get("/memory"))
                server.load("/gated", requests=waiting, connections=32, seconds=120)
                samples[name].append((int(server.get("/memory")) - before) / waiting / 1024)
    return Result(
        "memory",
        "Memory for each waiting task, at 10 000 of them",
        "KiB resident",
        f"{METHOD}; sync tasks that wait for a thread; growth of the server's resident memory; {rounds} rounds, medians",
        samples,
        [Comparison("ours in Starlette", "Starlette", 0.1), Comparison("ours in FastAPI", "FastAPI", 0.1)],
    )
