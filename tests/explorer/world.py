"""What a scenario is made of: a runner, requests, tasks that do all sorts of things, and a judge of what happens.

The judge knows the guarantees, and sees what a user could see: calls, events, statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import inf
from random import Random
from typing import Any

import anyio
import anyio.lowlevel

from asgi_deferred import (
    BacklogFull,
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Runner,
    RunnerClosed,
    TaskEvent,
    TaskState,
    tasks_from,
)
from tests.support import OK, http_scope, no_more_messages

from .baton import Baton

GRACE = 1.0
SLACK = 0.05  # what many steps take

ASYNC = ["quick", "pauses", "sleeps", "fails", "forever", "defers", "stubborn"]
SYNC = ["quick", "pauses", "fails", "stuck", "defers", "returns"]

logging.getLogger("asgi_deferred").addHandler(logging.NullHandler())


class Request:
    """One call of the application, and what the judge knows of it."""

    def __init__(self, number: int, works: int = 0) -> None:
        self.number = number
        self.works = works
        self.added = 0
        self.tasks: DeferredTasks | None = None
        self.final = False  # the final message was handed over
        self.over = False  # the application's call has ended
        self.begun: list[str] = []
        self.scope = anyio.CancelScope()


class Work:
    """A task, and what the judge has seen of it."""

    def __init__(self, request: Request, name: str, when: str) -> None:
        self.request = request
        self.name = name
        self.when = when
        self.events: list[TaskState] = []
        self.active = False
        self.started: float | None = None
        self.timeout: float | None = None
        self.obeys = True  # it ends when it is cancelled
        self.hinders = False  # an observer of it is stuck, in its thread
        self.task: DeferredTask | None = None

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1] is not TaskState.RUNNING

    @property
    def runs(self) -> bool:
        return self.active and not self.ended


class World:
    """A run of a scenario."""

    def __init__(self, random: Random, baton: Baton) -> None:
        self.random = random
        self.baton = baton
        self.breaches: list[str] = []
        self.works: dict[str, Work] = {}
        self.requests: list[Request] = []
        self.in_threads = 0
        self.last_end = 0.0  # when a task has reached its final state
        self.opened = False  # what is stuck may end
        self.lives = False  # a lifespan is under way
        self.asynchronous, self.synchronous = ASYNC, SYNC

    def expect(self, kept: bool, promise: str) -> None:
        """Note that a promise was not kept."""
        if not kept:
            self.breaches.append(promise)

    def configure(self, **options: Any) -> None:
        """Make the runner."""
        self.runner = Runner(observers=[self.observe], **options)
        self.app = DeferredMiddleware(self.answer, self.runner)

    # The application

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        request: Request = scope["explorer"]
        request.tasks = tasks_from(scope)
        try:
            for _ in range(request.works):
                self.add(request)
                await self.pause()
            for message in OK:
                await send(message)
            await self.pause()
            if self.synchronous and self.random.random() < 0.3:
                self.thread(lambda: self.add(request))
        finally:
            request.over = True

    async def call(self, works: int = 2) -> Request:
        """Make a request; return when its call has."""
        request = Request(len(self.requests), works)
        self.requests.append(request)

        async def send(message: Any) -> None:
            request.final |= message is OK[-1]
            await self.pause()

        with request.scope:
            await self.app(http_scope(explorer=request), no_more_messages, send)
        return request

    def add(self, request: Request) -> None:
        """Add a task of any kind to a request's list; from any thread."""
        assert request.tasks is not None
        request.added += 1
        name, random = f"{request.number}.{request.added}", self.random
        work = Work(request, name, random.choice(["success", "success", "always"]))
        work.timeout = random.choice([None, None, random.uniform(0.1, 2)])
        self.works[name] = work
        sync = random.random() < 0.5 if self.synchronous else False
        kind = random.choice(self.synchronous if sync else self.asynchronous)
        work.obeys = kind != "stubborn"
        work.hinders = sync and kind == "stuck" and random.random() < 0.5
        adder = request.tasks.options(
            name=name,
            when=work.when,  # type: ignore[arg-type]
            key=random.choice([None, None, "key"]),
            timeout=work.timeout,
        )
        try:
            work.task = adder.add_task(self.sync_work if sync else self.async_work, work, kind)
        except (BacklogFull, RunnerClosed) as exc:
            self.refused(work, exc)

    def refused(self, work: Work, error: Exception) -> None:
        self.expect(not work.events, f"G2: {work.name} was refused, and yet {work.events}")
        late = work.request.over or isinstance(error, BacklogFull)
        self.expect(late, f"G11: {work.name} was refused before its request had ended")

    # Tasks

    async def async_work(self, work: Work, kind: str) -> None:
        self.begin(work)
        try:
            if kind == "sleeps":
                await anyio.sleep(self.random.uniform(0, 3))
            elif kind == "forever":
                await anyio.sleep_forever()
            elif kind == "stubborn":
                await self.swallow()
            elif kind != "quick":
                await self.pause()
            self.end(work, kind)
        finally:
            work.active = False

    async def swallow(self) -> None:
        """Go on though cancelled, for up to a long time."""
        for _ in range(self.random.randint(1, 3)):
            try:
                with anyio.CancelScope(shield=self.random.random() < 0.5):
                    await anyio.sleep(self.random.uniform(1, 30))
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(self.random.uniform(0, 3))

    def sync_work(self, work: Work, kind: str) -> Any:
        self.in_threads += 1
        self.expect(self.in_threads <= self.runner.max_threads, f"G7: {self.in_threads} threads are at work")
        self.begin(work)
        try:
            if kind == "stuck":
                self.baton.hand_on(lambda: self.opened)
            elif kind != "quick":
                self.baton.hand_on()
            self.end(work, kind)
            return self.pause() if kind == "returns" else None
        finally:
            self.in_threads -= 1
            work.active = False

    def begin(self, work: Work) -> None:
        request = work.request
        due = request.over and (request.final or work.when == "always")
        self.expect(due, f"G1: {work.name} began before its request had ended")
        self.expect(TaskState.RUNNING in work.events, f"G2: {work.name} began without a RUNNING event")
        running = [other.name for other in self.works.values() if other.request is request and other.runs]
        self.expect(not running or self.runner.concurrent, f"G4: {work.name} began while {running} ran")
        work.active = True
        request.begun.append(work.name)
        self.probe()

    def end(self, work: Work, kind: str) -> None:
        if kind == "defers" and work.request.added < 6:
            self.add(work.request)
        if kind == "fails":
            raise ArithmeticError(work.name)

    async def pause(self) -> None:
        for _ in range(self.random.randint(0, 2)):
            await anyio.lowlevel.checkpoint()

    # The judge

    def observe(self, event: TaskEvent) -> None:
        work = self.works[event.task.name]
        once = event.state not in work.events and not work.ended
        self.expect(once, f"G2: {work.name}: {event.state.name} after {work.events}")
        true = event.state in (TaskState.RUNNING, event.task.state)
        self.expect(true, f"G2: {work.name} is {event.task.state.name}, and its event says {event.state.name}")
        work.events.append(event.state)
        if event.state is TaskState.RUNNING:
            work.started = self.baton.now
        took = 0.0 if work.started is None else self.baton.now - work.started
        most = work.timeout or inf
        in_time = took <= most + SLACK or not work.obeys or self.baton.slow
        self.expect(in_time, f"Timeout: {work.name} ran {took:.2f} s, not {most:.2f}")
        self.last_end = self.baton.now
        self.probe()
        if event.state is TaskState.RUNNING and work.hinders:
            self.in_threads += 1
            self.baton.slow = True  # as its thread is
            self.baton.hand_on(lambda: self.opened)
            self.in_threads -= 1

    def probe(self) -> None:
        """Look at the account at any moment."""
        counts = self.runner.statistics()
        self.expect(counts.running <= self.runner.max_concurrency, f"G7: {counts.running} tasks run")
        unfinished = counts.pending + counts.running
        bounded = self.runner.overflow == "wait" or unfinished <= self.runner.max_pending
        self.expect(bounded, f"G7: {unfinished} tasks are unfinished")
        self.expect(min(counts) >= 0 and counts.accepted == sum(counts[1:]), f"G2: {counts}")

    def startable(self) -> set[str]:
        """Return the tasks that nothing keeps from running, if nothing is about to happen."""
        counts = self.runner.statistics()
        if self.baton.others_may_go() or counts.running >= self.runner.max_concurrency:
            return set()
        names = set()
        for request in self.requests:
            tasks = request.tasks if request.tasks is not None and request.over else ()
            unfinished = [task for task in tasks if not self.works[task.name].ended]
            for task in unfinished if self.runner.concurrent else unfinished[:1]:
                free = self.in_threads < self.runner.max_threads or task.func != self.sync_work
                if task.state is TaskState.PENDING and free:
                    names.add(task.name)
        return names

    async def watch(self) -> None:
        """Wait a little, and find a task that was forgotten."""
        await anyio.sleep(0.01)
        waiting = self.startable()
        for _ in range(3):
            await anyio.sleep(0.001)
            waiting &= self.startable()
        self.expect(not waiting, f"G7: {sorted(waiting)} could run, and nobody starts it")

    def judge_drain(self, start: float, guarantee: str) -> None:
        took, most = anyio.current_time() - start, self.runner.drain_timeout + GRACE
        self.expect(took <= most + SLACK, f"{guarantee}: a drain took {took:.2f} s, not {most:.2f}")
        idle = min(took, self.baton.now - self.last_end)
        counts = self.runner.statistics()
        left = counts.pending + counts.running > 0  # of requests under way, if the runner is entered by others as well
        waits = self.baton.slow or left
        self.expect(idle <= SLACK or waits, f"{guarantee}: a drain ended {idle:.2f} s after the last task")

    async def finish(self) -> None:
        """Let go of what is stuck, once all has to be over, and judge the whole."""
        left = self.runner.statistics()
        self.expect(left.pending == left.running == 0, f"G8: {left} after the last drain")
        self.opened = True
        await anyio.sleep(100)
        while self.baton.others_may_go():
            await anyio.sleep(0.1)
        later = self.runner.statistics()
        self.expect(later == left, f"G2: {left}, and later {later}")
        accepted = [work for work in self.works.values() if work.task is not None]
        self.expect(left.accepted == len(accepted), f"G2: accepted {len(accepted)}, counted {left.accepted}")
        for work in accepted:
            state = work.task and work.task.state
            self.expect(work.ended and work.events[-1] is state, f"G2: {work.name} is {state}, events {work.events}")
        for request in self.requests:
            order = [task.name for task in request.tasks or () if task.name in request.begun]
            kept = order == request.begun or self.runner.concurrent
            self.expect(kept, f"G4: added {order}, begun {request.begun}")

    # Others that interfere

    def meddle(self) -> None:
        """Cancel a task, or add one to any list; from any thread."""
        tasks = [work.task for work in self.works.values() if work.task is not None]
        if not tasks:
            return
        task = self.random.choice(tasks)
        work = self.works[task.name]
        if self.random.random() < 0.5 or work.request.added > 7:
            cancelled = task.cancel()
            self.expect(not (cancelled and work.active), f"G2: {work.name} ran, and could be cancelled")
        else:
            self.add(work.request)

    def thread(self, call: Callable[[], object]) -> None:
        """Do something in another thread."""
        self.baton.thread(call).start()
