"""No 202 is lost: a server is killed with SIGKILL at random moments, and what its clients heard is compared with what was done.

    python -m tests.servers.kill_proof --app examples.durable_sqlite:app --kills 20 --seed 7
    python -m tests.servers.kill_proof --app examples.durable_sqlite:app --kills 20 --seed 7 --workers 2
    python -m tests.servers.kill_proof --app examples.durable_huey:app --kills 20 --seed 7 \
        --beside "huey.bin.huey_consumer examples.durable_huey.queue"

The application answers `POST /signup?email=...` with 202 once it has stored a job in the SQLite file that DATABASE_URL
names, and the job appends the address as one line to the file that EFFECTS names. Clients sign up without a pause while
the server and all its processes are killed and started again. After the last start the program waits until nothing
more is due, and then judges. The exit code is 1 if an answer of 202 had no effect.

A seed decides what the clients send and at which moments the kills come; not how the machine interleaves it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from .harness import ROOT, free_port, until

CLIENTS = 4
DEADLINE = 60.0  # seconds, of the moment that a kill waits for, and of a request

# More than once: more often.
MOMENTS = ["started", "sent", "sent", "sent", "answered", "answered", "answered", "done", "done", "done"]


class Moment(NamedTuple):
    """When a kill comes: some time after something has happened for the n-th time since the start."""

    what: str
    number: int
    delay: float

    def __str__(self) -> str:
        return f"{self.delay * 1000:.0f} ms after {self.what} {self.number}"


def make_moments(seed: int, kills: int) -> list[Moment]:
    chance = random.Random(seed)

    def moment() -> Moment:
        what = chance.choice(MOMENTS)
        if what == "started":  # which no one can see happen, so that the kill falls into it
            return Moment(what, 0, chance.uniform(0, 2))
        return Moment(what, chance.randint(1, 25), chance.uniform(0, 0.03))

    return [moment() for _ in range(kills)]


@dataclass
class Record:
    """What came of one life of the machine, from a start to a kill."""

    accepted: list[str] = field(default_factory=list[str])  # answered with 202
    refused: list[str] = field(default_factory=list[str])  # answered with anything else
    unanswered: list[str] = field(default_factory=list[str])  # sent, and the connection broke
    done: list[str] = field(default_factory=list[str])  # its effects, in order


class Verdict(NamedTuple):
    """What clients were told, compared with what was done."""

    accepted: int
    refused: int
    unanswered: int
    survived: int  # accepted, not done when a kill came, and done after it
    lost: list[str]  # accepted and never done
    repeated: dict[str, int]  # how often it was done, of what was done more than once
    needless: list[str]  # done more than once between a start and a kill
    unpromised: list[str]  # done and refused or unanswered: the client does not know
    unknown: list[str]  # done and never sent, such as half a line

    @property
    def holds(self) -> bool:
        return bool(self.accepted) and not self.lost and not self.unknown

    def __str__(self) -> str:
        repeated = [f"{email} ({times} times)" for email, times in self.repeated.items()]
        return "\n".join(
            [
                f"answered with 202: {self.accepted}, with another status: {self.refused}, not at all: {self.unanswered}",
                f"answered with 202, not done when a kill came, and done after it: {self.survived}",
                *_named("answered with 202 and LOST", self.lost),
                *_named("done more than once", repeated),
                *_named("of these, more than once without a kill in between", self.needless),
                *_named("done without a 202", self.unpromised),
                *_named("done and never asked for", self.unknown),
            ]
        )


def _named(what: str, names: Sequence[str]) -> Iterable[str]:
    yield f"{what}: {len(names)}"
    yield from (f"    {name}" for name in names)


def judge(records: Sequence[Record]) -> Verdict:
    accepted: set[str] = set()
    unpromised: set[str] = set()
    done: Counter[str] = Counter()
    waited: set[str] = set()
    for record in records:
        accepted.update(record.accepted)
        unpromised.update(record.refused, record.unanswered)
        done.update(record.done)
        waited |= accepted - done.keys()
    return Verdict(
        accepted=len(accepted),
        refused=sum(len(record.refused) for record in records),
        unanswered=sum(len(record.unanswered) for record in records),
        survived=len(waited & done.keys()),
        lost=sorted(accepted - done.keys()),
        repeated={email: times for email, times in done.items() if times > 1},
        needless=[email for record in records for email, times in Counter(record.done).items() if times > 1],
        unpromised=sorted(unpromised & done.keys()),
        unknown=sorted(done.keys() - accepted - unpromised),
    )


class Machine:
    """The server and what runs beside it: one process group, which starts and dies as one."""

    def __init__(self, folder: Path, app: str, workers: int, beside: Sequence[str]) -> None:
        self.port = free_port()
        self.effects = folder / "effects"
        self.effects.touch()
        self._log = folder / "log"
        uvicorn = f"uvicorn {app} --port {self.port} --workers {workers} --log-level warning"
        self._commands = [shlex.split(command) for command in (uvicorn, *beside)]
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": f"sqlite:///{folder}/jobs.sqlite",
            "EFFECTS": str(self.effects),
        }
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._processes = []
        for command in self._commands:
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=self._folder,
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=self._processes[0].pid if self._processes else 0,
                )
            self._processes.append(process)

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended of itself, and `check` says so
            os.killpg(self._processes[0].pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        until(lambda: not self._listens(), "the port to be free")  # a worker may die later than its parent

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def done(self) -> list[str]:
        return self.effects.read_text().splitlines()

    def check(self) -> None:
        """Raise if a process has ended of itself."""
        if any(process.poll() is not None for process in self._processes):
            raise RuntimeError(f"a process has ended of itself:\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text()[-5000:]


class Life:
    """One life of the machine, with clients that sign up all the time."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.record = Record()
        self._machine = machine
        self._name = name
        self._over = False
        self._sent = 0
        self._answered = 0
        self._done_before = len(machine.done())

    async def last_until(self, moment: Moment, seed: int) -> None:
        with self._living():
            clients = [asyncio.create_task(self._sign_up_on_and_on(number, seed)) for number in range(CLIENTS)]
            await self._wait_for(lambda: self._happened(moment.what) >= moment.number, str(moment))
            await asyncio.sleep(moment.delay)
        await asyncio.gather(*clients)

    async def last_until_quiet(self, seconds: float, is_done: Callable[[Sequence[str]], bool]) -> None:
        """Live until one more signup is done, and then nothing for some seconds, or for one if all is done."""
        with self._living():
            async with asyncio.timeout(DEADLINE), self._client() as client:
                while not self.record.accepted:
                    await self._sign_up(client, f"{self._name}.{self._sent}@example.org")
            await self._wait_for(lambda: self.record.accepted[0] in self._machine.done(), "the last signup")
            before, since = 0, time.monotonic()
            while (silence := time.monotonic() - since) < seconds:
                done = self._machine.done()
                if len(done) != before:
                    before, since = len(done), time.monotonic()
                elif silence > 1 and is_done(done):
                    break
                await asyncio.sleep(0.05)

    @contextmanager
    def _living(self) -> Iterator[None]:
        self._machine.start()
        try:
            yield
        finally:
            self._over = True
            self._machine.kill()
            self.record.done = self._machine.done()[self._done_before :]

    def _happened(self, what: str) -> int:
        if what == "done":
            return len(self._machine.done()) - self._done_before
        return {"started": 0, "sent": self._sent, "answered": self._answered}[what]

    async def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            self._machine.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {DEADLINE:g} s for {what}:\n{self._machine.log()}")
            await asyncio.sleep(0.001)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self._machine.port}", timeout=DEADLINE, trust_env=False)

    async def _sign_up_on_and_on(self, number: int, seed: int) -> None:
        chance = random.Random(f"{seed} {self._name} {number}")
        signup = 0
        async with self._client() as client:
            while not self._over:
                signup += 1
                await self._sign_up(client, f"{self._name}.{number}.{signup}@example.org")
                await asyncio.sleep(chance.uniform(0, 0.02))

    async def _sign_up(self, client: httpx.AsyncClient, email: str) -> None:
        """Send one signup, as soon as there is a server, and note what came of it."""

        async def trace(event: str, info: Any) -> None:
            self._sent += event == "http11.send_request_body.complete"

        while not self._over:
            try:
                answer = await client.post("/signup", params={"email": email}, extensions={"trace": trace})
            except httpx.ConnectError:  # never sent
                await asyncio.sleep(0.01)
                continue
            except httpx.TransportError:
                self.record.unanswered.append(email)
            else:
                self._answered += 1
                (self.record.accepted if answer.status_code == 202 else self.record.refused).append(email)
            return


def prove(
    app: str,
    *,
    kills: int,
    seed: int,
    folder: Path,
    workers: int = 1,
    beside: Sequence[str] = (),
    quiet: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Kill an application so many times, and return what became of its signups."""
    machine = Machine(folder, app, workers, beside)
    records: list[Record] = []

    async def main() -> None:
        for number, moment in enumerate(make_moments(seed, kills), 1):
            life = Life(machine, str(number))
            records.append(life.record)
            await life.last_until(moment, seed)
            say(f"kill {number}: {moment}; {len(life.record.accepted)} answered with 202")
        accepted = {email for record in records for email in record.accepted}
        life = Life(machine, "last")
        records.append(life.record)
        await life.last_until_quiet(quiet, accepted.issubset)

    asyncio.run(main())
    return judge(records)


def versions() -> str:
    """Name what a figure was measured with."""

    def found() -> Iterable[str]:
        for package in ("dbos", "pysqlite3-binary", "huey", "fastapi", "uvicorn"):
            with suppress(PackageNotFoundError):
                yield f"{package} {version(package)}"

    python = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{datetime.now(UTC).date()}: {python}, {', '.join(found())}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.servers.kill_proof")
    parser.add_argument("--app", required=True, help="what uvicorn serves, as module:name")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--workers", type=int, default=1, help="processes of uvicorn")
    parser.add_argument("--beside", action="append", default=[], help="a module to run beside it, with its arguments")
    parser.add_argument("--quiet", type=float, default=10.0, help="seconds without effects, after which it is judged")
    options = parser.parse_args(arguments)
    print(versions(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        verdict = prove(**vars(options), folder=Path(folder), say=partial(print, flush=True))
    print(verdict)
    if not verdict.holds:
        again = shlex.join([*arguments, *([] if "--seed" in arguments else ["--seed", str(options.seed)])])
        print(f"FAILED: python -m tests.servers.kill_proof {again}")
    return not verdict.holds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
