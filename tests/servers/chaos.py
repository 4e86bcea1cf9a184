"""Conservation under chaos: clients, applications and tasks that misbehave, and a SIGTERM at a random moment.

    python -m tests.servers.chaos uvicorn 17      one run, of that server with that seed
    python -m tests.servers.chaos                 a hundred runs and more

After each run the transcript has to show that every accepted task had exactly one final event, and none before its
request was over; that the runner's account is right; that the process ended in time; and that no task is still alive.
A seed decides what clients, applications and tasks do, and when the signal comes; not how the machine interleaves it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .harness import GRANIAN, H11, HYPERCORN, HYPERCORN_TRIO, Server, serve

SERVERS = {
    "uvicorn": H11.with_options("--timeout-graceful-shutdown", "1", "--log-level", "critical"),
    "hypercorn": HYPERCORN.with_options("--graceful-timeout", "1"),
    "hypercorn-trio": HYPERCORN_TRIO.with_options("--graceful-timeout", "1"),
    "granian": GRANIAN,
}
SEEDS = 26  # of each server
CLIENTS = 10
FINAL = {"SUCCEEDED", "FAILED", "TIMED_OUT", "SKIPPED", "CANCELLED", "ABANDONED"}

# More than once: more often.
CLIENT = ["polite", "polite", "pipelines", "vanishes", "half-closes", "stalls", "sends half"]
APPLICATION = ["ok", "ok", "ok", "500", "stream", "teardown", "raise", "raise-midway", "raise-late"]
TASK = ["ok", "ok", "sync", "sync", "sync-times-out", "times-out", "fail", "nest", "flood", "replaced", "cancelled"]
WHEN = ["success", "success", "complete", "failure", "always"]


class Plan(NamedTuple):
    """What a seed stands for."""

    clients: list[tuple[str, list[str]]]  # what it does, the targets it requests
    signal_after: float


def make_plan(seed: int) -> Plan:
    chance = random.Random(seed)
    kinds = [*TASK, "never"] if chance.random() < 0.2 else TASK
    clients = []
    for client in range(CLIENTS):
        targets = []
        requests = chance.randint(1, 4)
        for number in range(requests):
            request = f"{client}.{number}"
            tasks = [
                (f"{request}.{task}", chance.choice(kinds), chance.choice(WHEN)) for task in range(chance.randint(0, 5))
            ]
            # Behind a call that waits for the disconnect, a pipelined request keeps hypercorn and granian from seeing it.
            does = chance.choice([*APPLICATION, "hang"] if number == requests - 1 else APPLICATION)
            plan = {"id": request, "does": does, "tasks": tasks}
            targets.append("/?" + quote(json.dumps(plan)))
        clients.append((chance.choice(CLIENT), targets))
    return Plan(clients, chance.uniform(0, 0.4))


async def act(port: int, does: str, targets: Sequence[str]) -> None:
    """Be one client, until the server has had enough of it."""
    requests = [f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for target in targets]
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    try:
        if does == "pipelines":
            writer.write(b"".join(requests))
            await reader.read()
            return
        for request in requests:
            writer.write(request if does != "sends half" else request[: len(request) // 2])
            if does == "half-closes":
                writer.write_eof()
                await reader.read()
                return
            if does == "vanishes":
                return
            if does in ("stalls", "sends half"):
                await asyncio.sleep(60)
            async with asyncio.timeout(0.2):
                while await reader.read(1024):
                    pass
    finally:
        writer.close()


async def drive(server: Server, plan: Plan) -> None:
    clients = [asyncio.create_task(act(server.port, *client)) for client in plan.clients]
    await asyncio.sleep(plan.signal_after)
    server.send_signal()
    await asyncio.sleep(0.2)
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


def faults(lines: Sequence[str], kept_by_connection: float) -> Iterator[str]:
    """Compare a transcript with what is promised."""
    words = [line.split() for line in lines]
    accepted = Counter(line[1] for line in words if line[0] == "accepted")
    over = {line[1]: place for place, line in enumerate(words) if line[0] == "over"}
    events = [(place, line[1], line[2]) for place, line in enumerate(words) if line[0] == "event"]
    ends = Counter(name for _, name, state in events if state in FINAL)

    def request_of(name: str) -> str:
        return ".".join(name.split(".")[:2])

    for name in accepted:
        # A server may drop a call with its process, and nothing can be said about its tasks then.
        if ends[name] != 1 and (request_of(name) in over or ends[name] > 1):
            yield f"{name} was accepted and had {ends[name]} final events"
    yield from (f"{name} had an end and was never accepted" for name in ends.keys() - accepted.keys())
    for place, name, state in events:
        if state == "RUNNING" and place < over.get(request_of(name), len(words)):
            yield f"{name} ran before its request was over"
    at_end = [json.loads(" ".join(line[1:])) for line in words if line[0] == "end"]
    if len(at_end) != 1:
        yield f"the lifespan's end was seen {len(at_end)} times"
        return
    account, alive = at_end[0]
    if account.pop("accepted") != sum(account.values()):
        yield f"what was accepted is not the sum of {account}"
    for state in FINAL:
        if account[state.lower()] > (found := sum(event[2] == state for event in events)):
            yield f"{state}: {account[state.lower()]} counted, {found} events"
    # A thread that was given up on, and whoever cancelled a task, may hold it a little longer, and its list with it.
    # Uvicorn's and hypercorn's timers for an idle connection hold the contexts of its requests for 5 s, cancelled or not.
    kept = {request_of(name) for _, name, state in events if state in {"ABANDONED", "TIMED_OUT"}}
    lists = {request_of(name) for name in alive} & over.keys() - kept
    if max(Counter(request.split(".")[0] for request in lists).values(), default=0) > kept_by_connection:
        yield f"the lists of {sorted(lists)} are still alive"


def run(name: str, seed: int, folder: Path) -> str:
    """Do one run, and return what was wrong with it."""
    with serve(SERVERS[name], folder, app="chaos_app:app") as server:
        asyncio.run(drive(server, make_plan(seed)))
        try:
            server.wait()
        except TimeoutError as exc:
            return str(exc)
        if "BusyResourceError" in server.log():  # hypercorn's trio worker dies of sending twice at once
            return ""
        found = list(faults(server.lines(), inf if name in {"uvicorn", "hypercorn"} else 0))
        return "\n".join([*found, server.show()]) if found else ""


def main(names: Sequence[str], seeds: Sequence[int]) -> int:
    """Do all runs, two at a time, print each failing one with the command that repeats it, and return their number."""

    def one(job: tuple[str, int]) -> bool:
        name, seed = job
        with tempfile.TemporaryDirectory() as folder:
            fault = run(name, seed, Path(folder))
        if fault:
            print(f"FAILED: python -m tests.servers.chaos {name} {seed}\n{fault}", flush=True)
        return bool(fault)

    jobs = [(name, seed) for seed in seeds for name in names]
    with ThreadPoolExecutor(2) as pool:
        failed = sum(pool.map(one, jobs))
    print(f"{len(jobs)} runs, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:2] or [*SERVERS], [int(seed) for seed in sys.argv[2:]] or range(SEEDS)))
