"""Worker threads for sync tasks.

`anyio.to_thread` does not fit. Its limiter forgets a thread after a timeout, although the thread still runs. On asyncio
its threads also keep the process alive at exit. These threads are daemons, and they count until they have really ended.
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
        self._idle: list[SimpleQueue[tuple[Job, Job]]] = []  # needs no lock: `pop` gives each to one caller

    def start(self, job: Job, done: Job) -> None:
        """Run `job` in a thread, and then `done`, once that thread is free again. Neither may raise.

        Raises:
            RuntimeError: The system starts no more threads.
        """
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            thread = Thread(target=self._serve, args=(inbox,), name="asgi-deferred", daemon=True)
            Context().run(thread.start)  # or the thread, which outlives the request, could inherit its context
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
