"""Event loops whose order is a seed's, and whose time passes only when there is nothing else to do."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Awaitable, Callable
from math import inf
from random import Random
from typing import Any

import trio
from trio import _core as trio_core

from .baton import Baton, Hang

FOREVER = 3600.0  # no scenario has a timer as late as that
EARLY = 0.05  # how often time passes though a thread could run: it is slow


class Shuffled(deque[Any]):
    """What is ready: any of it comes next."""

    def __init__(self, random: Random, baton: Baton) -> None:
        super().__init__()
        self.random = random
        self.rate = random.choice([0.0, 0.2, 1.0])
        self.baton = baton

    def popleft(self) -> Any:
        self.baton.step()
        if len(self) < 2 or self.random.random() >= self.rate:
            return super().popleft()
        place = self.random.randrange(len(self))
        self.rotate(-place)
        handle = super().popleft()
        self.rotate(place)
        return handle


def pass_time(baton: Baton, ready: Callable[[], bool], seconds: float) -> float:
    """Let threads run until something is ready; return how much time passes if nothing is."""
    while not ready():
        if not baton.others_may_go() or (seconds < FOREVER and baton.random.random() < EARLY):
            if seconds >= FOREVER:
                raise Hang("Everybody waits")
            baton.slow |= baton.others_may_go()
            baton.now += seconds
            return seconds
        baton.hand_on(ready)
    return 0.0


class Selector(selectors.DefaultSelector):
    """Waits in no real time."""

    loop: ExplorerLoop

    def select(self, timeout: float | None = None) -> Any:
        loop = self.loop
        if timeout is None or timeout > 0:
            loop.now += pass_time(loop.baton, lambda: bool(loop._ready), inf if timeout is None else timeout)
        return super().select(0)


class ExplorerLoop(asyncio.SelectorEventLoop):
    _ready: Any

    def __init__(self, random: Random, baton: Baton) -> None:
        self.now = 0.0
        self.baton = baton
        selector = Selector()
        selector.loop = self
        super().__init__(selector)
        self._ready = Shuffled(random, baton)

    def time(self) -> float:
        self.now += 1e-7  # so that what tries again and again comes to its end
        return self.now


class ExplorerClock(trio.abc.Clock):
    def __init__(self, baton: Baton) -> None:
        self.now = 0.0
        self.baton = baton

    def start_clock(self) -> None:
        """Begin at 0."""

    def current_time(self) -> float:
        self.baton.step()
        self.now += 1e-7
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Sleep: trio asks for this when nothing is ready."""
        calls: Any = trio.lowlevel.current_trio_token()._reentry_queue
        self.now += pass_time(self.baton, lambda: calls.size() > 0, max(0.0, deadline - self.now))
        return 0.0


def run_asyncio(
    main: Callable[[], Awaitable[None]], random: Random, baton: Baton, failed: Callable[[str], None]
) -> None:
    loop = ExplorerLoop(random, baton)
    loop.set_exception_handler(lambda _, context: failed(f"{context['message']}: {context.get('exception')!r}"))

    async def run() -> None:
        await main()

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()


def run_trio(main: Callable[[], Awaitable[None]], random: Random, baton: Baton, failed: Callable[[str], None]) -> None:
    settings: Any = trio_core._run
    before = settings._r, settings._ALLOW_DETERMINISTIC_SCHEDULING
    settings._r, settings._ALLOW_DETERMINISTIC_SCHEDULING = random, True
    try:
        trio.run(main, clock=ExplorerClock(baton))
    except trio.TrioInternalError as exc:
        raise exc.__cause__ or exc from None
    finally:
        settings._r, settings._ALLOW_DETERMINISTIC_SCHEDULING = before


BACKENDS = {"asyncio": run_asyncio, "trio": run_trio}
