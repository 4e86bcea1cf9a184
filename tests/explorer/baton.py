"""One thread at a time: a baton that threads hand on, by chance, where the library calls a function of its own.

A profile function stops each thread there, and where it waits for its next job. So threads are real, and yet their
order is the seed's. The library calls nothing while it holds its lock, so that nobody is stopped there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from random import Random
from threading import Thread
from types import FrameType
from typing import Any

import asgi_deferred

LIBRARY = str(Path(asgi_deferred.__file__).parent)
PATIENCE = 5.0  # seconds until a thread that does not come back is a hang
STEPS = 20_000  # after which a run is taken to go round in circles


class Hang(BaseException):
    """Raised in a run that cannot end."""


def always() -> bool:
    return True


class Member:
    """A thread, and what it waits for."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.may_go: Callable[[], bool] = always
        self.go = threading.Semaphore(0)


class Baton:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.rate = random.choice([0.0, 0.02, 0.2])  # how often a thread is stopped
        self.steps = 0
        self.now = 0.0  # the time that has passed in this run
        self.slow = False  # some of it while a thread could run
        self.main = Member()
        self.members = {threading.get_ident(): self.main}
        self.joined = threading.Condition()
        self.closed = False

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS:
            raise Hang("It goes on for ever")

    def others_may_go(self) -> bool:
        """Return whether a thread other than the event loop's could run."""
        return any(member.may_go() for member in self.members.values() if member is not self.main)

    def choose(self) -> Member:
        able = [member for member in self.members.values() if member.may_go()]
        return self.random.choice(able) if able else self.main

    def hand_on(self, may_go: Callable[[], bool] = always) -> None:
        """Let any thread go on that can; return when it is this one's turn. The event loop's comes if nobody can."""
        me = self.members[threading.get_ident()]
        if self.closed:
            return
        me.may_go = may_go
        chosen = self.choose()
        if chosen is not me:
            chosen.go.release()
            if not me.go.acquire(timeout=PATIENCE) and not self.closed:
                raise Hang(f"{me.thread.name} did not get its turn")
        me.may_go = always

    def join(self) -> None:
        """Let a new thread wait for its first turn."""
        me = Member()
        with self.joined:
            self.members[threading.get_ident()] = me
            self.joined.notify_all()
        if not self.closed:
            me.go.acquire(timeout=PATIENCE)

    def started(self, thread: Thread) -> None:
        """Wait until a new thread has joined."""
        with self.joined:
            self.joined.wait_for(lambda: thread.ident in self.members, PATIENCE)

    def profile(self, frame: FrameType, event: str, arg: Any) -> None:
        """Stop a thread, perhaps."""
        if threading.get_ident() not in self.members:
            self.join()
        if event == "c_call":
            queue = getattr(arg, "__self__", None)
            if isinstance(queue, SimpleQueue) and arg.__name__ == "get":
                self.hand_on(lambda: not queue.empty())
                if self.closed and queue.empty():
                    raise SystemExit  # ends an idle thread
        elif event == "return":
            if frame.f_code is Thread.start.__code__:
                self.started(frame.f_locals["self"])
        elif event == "call" and frame.f_code.co_filename.startswith(LIBRARY) and self.random.random() < self.rate:
            self.hand_on()

    def thread(self, call: Callable[[], object]) -> Thread:
        """Make a thread that takes part."""

        def run() -> None:
            try:
                call()
            finally:
                sys.setprofile(None)
                del self.members[threading.get_ident()]  # another thread may get its number
                if not self.closed:
                    self.choose().go.release()

        return Thread(target=run, name="explorer", daemon=True)

    @contextlib.contextmanager
    def in_hand(self) -> Iterator[None]:
        """Take part with all threads that start meanwhile, and end those that idle."""
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            self.closed = True
            others = [member for member in self.members.values() if member is not self.main]
            for member in others:
                member.go.release()
            for member in others:
                member.thread.join(PATIENCE)
