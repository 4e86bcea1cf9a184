"""Worker threads for sync tasks.

Not `anyio.to_thread`: its limiter forgets a thread that a timeout gave up on, though it still runs, and on asyncio
its threads hold the process open at exit. These are daemons, counted until they are really done.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeAlias

Job: TypeAlias = Callable[[], object]

IDLE_SECONDS = 10.0


class Threads:
    """Starts threads as needed and reuses them; one that idles for `IDLE_SECONDS` ends. The caller sets the limit."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[tuple[Job, Job]]] = []  # without a lock: whoever takes one out of it has it

    def start(self, job: Job, done: Job) -> None:
        """Run `job` in a thread of its own, then, once that thread is free again, `done`. Neither may raise.

        Raises:
            RuntimeError: The system starts no more threads.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            thread = Thread(target=self._serve, args=(inbox,), name="asgi-deferred", daemon=True)
            Context().run(thread.start)  # a thread may inherit the context, and outlives the request
        inbox.put((job, done))

    def _serve(self, inbox: SimpleQueue[tuple[Job, Job]]) -> None:
        while True:
            try:
                job, done = inbox.get(timeout=IDLE_SECONDS)
            except Empty:
                try:
                    self._idle.remove(inbox)
                except ValueError:  # a job is on its way
                    continue
                return
            try:
                job()
            finally:
                self._idle.append(inbox)
                done()
            del job, done  # an idle thread keeps nothing of its last task alive
