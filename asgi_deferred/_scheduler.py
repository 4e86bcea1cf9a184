"""Where and when task lists run on one event loop.

1. A *strand* is a queue of tasks that run one at a time, in order: those of a list, or one of a concurrent list.
   A session has a list's strand from the first task on, so that a drain waits for the list's request. It is active from
   the end of that request until its queue is found empty, under the runner's lock.
2. A *session* owns the task group in which strands run, and ends only when all of them have: one for the lifespan,
   or, without a lifespan, one for each ASGI call. When it ends, what is left is ABANDONED, so that every task ends.
3. The *scheduler*, one per event loop, hands out slots (`max_concurrency`) and threads (`max_threads`) first come,
   first served, across sessions. A strand that waits for a thread holds no slot.
4. A *worker* is a pooled anyio task that runs one async task after another, each stepped in the context of the line
   that added it. No worker runs a user's code before it has yielded to the event loop, so nothing of the user's runs
   inside `add_task` or the ASGI call. A run of sync tasks is one *hop* to a thread, which needs no worker, but to time
   it, or to await what it returned.
   Engines' tasks take no slot when a response waits for them, or when the drain starts: nothing may hold those up.
5. While a session has strands ready, one of its workers *attends*: it takes the next of them before it waits for
   anything. When a unit of its own makes it wait, another is summoned first. So strands wait for no other strand,
   and tasks that never wait share one worker's turn.
6. `pump` runs on the event loop's thread only. Other threads reach it through `soon`, which never blocks.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from logging import getLogger
from math import inf
from threading import get_ident
from types import coroutine
from typing import TYPE_CHECKING, Any

from anyio import (
    TASK_STATUS_IGNORED,
    CancelScope,
    Event,
    NoEventLoopError,
    Semaphore,
    create_task_group,
    current_effective_deadline,
    current_time,
    get_cancelled_exc_class,
    move_on_after,
)
from anyio.abc import TaskGroup, TaskStatus
from anyio.lowlevel import checkpoint, current_token

from ._tasks import DeferredTask, DeferredTasks, TaskState

if TYPE_CHECKING:
    from ._runner import Runner

logger = getLogger("asgi_deferred")

sniffio: Any = sys.modules.get("sniffio")  # anyio has imported and asks it, where it is installed

MAX_IDLE_WORKERS = 16
UNITS_IN_A_TURN = 16  # then the event loop's other tasks have theirs


def soon_here() -> Callable[..., None]:
    """Return a function that calls a function on this event loop soon, from any thread, without waiting.

    `anyio.from_thread.run_sync` would wait, and so would block another event loop or a thread of a loop that stopped.
    """
    native: Any = current_token().native_token
    call_soon = native.run_sync_soon if hasattr(native, "run_sync_soon") else native.call_soon_threadsafe

    def soon(func: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, and its sessions with it
            call_soon(func, *args)

    return soon


@coroutine
def in_context(
    context: Context, coro: Coroutine[Any, Any, None], before_waiting: Callable[[], object]
) -> Generator[Any, Any, None]:
    """Await `coro`, each of its steps in `context` but in the current task, whose scopes and timeouts it keeps.

    `before_waiting` is called each time that the task is about to wait.
    """
    step: Callable[[Any], Any] = coro.send
    value: Any = None
    while True:
        try:
            trap = context.run(step, value)
        except StopIteration:
            return
        before_waiting()
        try:
            value = yield trap
            step = coro.send
        except GeneratorExit as exc:  # the event loop is gone
            with suppress(BaseException):
                context.run(coro.throw, exc)
            raise
        except BaseException as exc:
            step, value = coro.throw, exc


def close_unawaited(awaitable: Awaitable[Any] | None) -> None:
    """Close what nobody will await, or Python warns about it."""
    if close := getattr(awaitable, "close", None):
        close()


def torn_down() -> bool:
    """Whether the scopes around us are cancelled, or the event loop is gone."""
    try:
        return current_effective_deadline() == -inf
    except NoEventLoopError:
        return True


class Strand:
    """Tasks that run one at a time, in order (rule 1).

    Its place in the queue belongs to whoever runs it: the event loop, or a thread, then under the runner's lock.
    """

    __slots__ = ("active", "current", "freed", "hop", "position", "queue", "session")

    def __init__(self, session: Session, tasks: list[DeferredTask], *, active: bool = False) -> None:
        self.session = session
        self.queue = tasks
        self.position = 0
        self.current: DeferredTask | None = None
        self.hop: Hop | None = None
        self.freed: Event | None = None
        self.active = active

    def head(self) -> DeferredTask | None:
        """Return the next task that is still PENDING."""
        while self.position < len(self.queue):
            task = self.queue[self.position]
            if task.state is TaskState.PENDING:
                return task
            self.position += 1
        return None

    def rest(self) -> list[DeferredTask]:
        """Return what was not taken yet."""
        return self.queue[self.position :]

    def take(self) -> DeferredTask:
        """Make the head the current task."""
        self.current = self.queue[self.position]
        self.position += 1
        return self.current


class Scheduler:
    """Hands out slots and threads (rule 3)."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.soon = soon_here()
        self.slots = runner.max_concurrency
        self.threads = runner.max_threads
        self.cancelled_calls: set[Session] = set()
        self.waiting: deque[Strand] = deque()
        self.parked: deque[Strand] = deque()  # came before those waiting; a thread is all they lack
        self.enqueueing = Semaphore(runner.max_threads)

    def push(self, *strands: Strand) -> None:
        self.waiting.extend(strands)
        self.pump()

    def pump(self) -> None:
        while self.slots:
            if self.parked and self.threads:
                strand = self.parked.popleft()
            elif self.waiting:
                strand = self.waiting.popleft()
            else:
                return
            task = strand.head()
            self.slots -= 1
            if task is None or strand.session.cancelled:
                self.release(strand)
            elif task._async:
                strand.take()
                strand.session.make_ready(strand)
            elif self.threads:
                self.threads -= 1
                self._start_hop(strand)
            else:
                self.slots += 1
                self.parked.append(strand)

    def _start_hop(self, strand: Strand) -> None:
        task = strand.take()
        strand.hop = hop = Hop(strand, task)
        # In the session's context: a thread, which may inherit it, outlives the request that happened to need it.
        if not strand.session._context.run(self.start_thread, task, hop.run, partial(self._end_hop, hop)):
            self.threads += 1
            self.release(strand)
        elif task.timeout is not None:
            hop.done = strand.session._context.run(Event)
            strand.session.make_ready(strand)

    def _end_hop(self, hop: Hop) -> None:
        self.threads += 1
        if hop.strand.hop is hop:  # or it was given up
            if hop.done is not None:
                hop.done.set()
            elif hop.awaitable is not None:
                hop.strand.session.make_ready(hop.strand)
            else:
                self.release(hop.strand)
        self.pump()

    def release(self, strand: Strand) -> None:
        """Take a slot back, and queue what else the strand has."""
        self.slots += 1
        if strand.freed is not None:
            strand.freed.set()
        with self.runner._lock:
            strand.current = strand.hop = None
            if strand.head() is None or strand.session.cancelled:
                strand.session.retire(strand)
            else:
                self.waiting.append(strand)

    async def enqueue_shielded(self, task: DeferredTask) -> None:
        with CancelScope(shield=True):
            await self.enqueue(task)

    async def enqueue(self, task: DeferredTask) -> None:
        """Let an engine's task end, past all that waits for a slot or a thread."""
        runner = self.runner
        if task._async:
            await in_context(task._context, runner._run_async(task, task.timeout), lambda: None)
            return
        returned: list[Awaitable[Any]] = []
        done = Event()
        started = current_time()

        def job() -> None:
            awaitable = task._context.run(runner._run_sync, task)
            if awaitable is not None:
                returned.append(awaitable)
                if task.state is not TaskState.RUNNING:
                    discard()

        def discard() -> None:
            """Nobody will await it: of the thread and us, the one that comes second sees what the first has done."""
            with suppress(IndexError):
                close_unawaited(returned.pop())

        def free() -> None:
            self.enqueueing.release()
            done.set()

        try:
            with move_on_after(task.timeout):
                await self.enqueueing.acquire()
                if not self.start_thread(task, job, free):
                    self.enqueueing.release()
                    return
                await done.wait()
        except BaseException:
            runner._finish_outside(task, TaskState.ABANDONED)
            discard()
            raise
        if not done.is_set():
            runner._time_out(task)
            discard()
        elif returned:
            left = None if task.timeout is None else max(0.0, started + task.timeout - current_time())
            await in_context(task._context, runner._run_async(task, left, returned.pop()), lambda: None)

    def start_thread(self, task: DeferredTask, job: Callable[[], None], done: Callable[[], None]) -> bool:
        """Run `job` in a thread, and `done` here after it; return False if the task FAILED for want of a thread."""
        try:
            self.runner._threads.start(job, partial(self.soon, done))
        except RuntimeError as exc:  # the system's limit is lower than ours
            self.runner._finish_outside(task, TaskState.FAILED, exc)
            return False
        return True


class Hop:
    """One trip of a strand to a thread, for one sync task with a timeout or for a run of them without."""

    __slots__ = ("abandoned", "awaitable", "done", "finished", "strand", "task")

    def __init__(self, strand: Strand, task: DeferredTask) -> None:
        self.strand = strand
        self.task = task
        self.finished = False
        self.abandoned = False  # whichever of the two comes first, under the runner's lock, excludes the other
        self.done: Event | None = None  # where a worker waits for it
        self.awaitable: Awaitable[Any] | None = None

    def run(self) -> None:
        """In the thread: run the task and those after it."""
        runner = self.strand.session.runner
        while not self.finished:
            self.awaitable = self.task._context.run(runner._run_sync, self.task)
            with runner._lock:
                if self.abandoned:
                    break
                following = self.strand.head()
                alone = self.awaitable is not None or self.task.timeout
                if alone or following is None or following._async or following.timeout:
                    self.finished = True
                else:
                    self.task = self.strand.take()
        if self.abandoned:
            self.discard()

    def abandon(self) -> bool:
        """Give up on the thread, unless it has finished just now."""
        with self.strand.session.runner._lock:
            self.abandoned = not self.finished
            return self.abandoned

    def discard(self) -> None:
        """Nobody will await what the task returned."""
        close_unawaited(self.awaitable)


class Worker:
    """A pooled task that runs what its session has ready (rules 4 and 5)."""

    __slots__ = ("session", "summons")

    def __init__(self, session: Session) -> None:
        self.session = session
        self.summons = Semaphore(0)

    async def run(self) -> None:
        session, scheduler, runner = self.session, self.session.scheduler, self.session.runner
        try:
            host = asyncio.current_task()
        except RuntimeError:  # trio
            host = None
        try:
            await checkpoint()
            while True:
                units = 0
                while session.ready:
                    strand = session.ready.popleft()
                    task: Any = strand.current
                    try:
                        if strand.hop is None:
                            run = runner._run_async(task, task.timeout)
                            await in_context(task._context, run, self.before_waiting)
                            del run
                        else:
                            await self.finish(strand.hop)
                    finally:
                        scheduler.release(strand)
                        del strand, task  # an idle worker keeps nothing of its last task alive
                    if host is not None and host.cancelling():
                        # The user's code cancelled this very task. The next one must not pay for it, nor the group.
                        with suppress(get_cancelled_exc_class()):
                            await checkpoint()
                        return
                    if session.attendant is None:
                        session.attendant = self
                    if scheduler.waiting or scheduler.parked:
                        scheduler.pump()
                    units += 1
                    if session.ready and units % UNITS_IN_A_TURN == 0:
                        await checkpoint()
                if session.attendant is self:
                    session.attendant = None
                if len(session.idle) == MAX_IDLE_WORKERS:
                    return
                session.idle.append(self)
                await self.summons.acquire()
        except BaseException as exc:
            if not torn_down() and isinstance(exc, get_cancelled_exc_class()):
                return  # the user's code cancelled this task after its own had ended
            session.cancelled = True
            raise
        finally:
            if self in session.idle:
                session.idle.remove(self)
            self.before_waiting()
            scheduler.pump()

    async def finish(self, hop: Hop) -> None:
        """Await a sync task's thread, if that has a timeout, and then what the task returned."""
        runner, timeout = self.session.runner, hop.task.timeout
        if timeout is not None and hop.done is not None:
            deadline = current_time() + timeout
            self.before_waiting()
            try:
                with move_on_after(timeout):
                    await hop.done.wait()
            except BaseException:
                if not hop.abandon():
                    hop.discard()
                runner._finish_outside(hop.task, TaskState.ABANDONED)
                raise
            if not hop.done.is_set() and hop.abandon():
                runner._time_out(hop.task)
                return
            timeout = max(0.0, deadline - current_time())
        if hop.awaitable is not None:
            run = runner._run_async(hop.task, timeout, hop.awaitable)
            await in_context(hop.task._context, run, self.before_waiting)

    def before_waiting(self) -> None:
        """Let another worker attend."""
        session = self.session
        if session.attendant is self:
            session.attendant = None
            if session.ready and not session.cancelled:
                session.summon()


class Session:
    """A home for strands on one event loop (rule 2)."""

    group: TaskGroup

    def __init__(self, scheduler: Scheduler, *, shield: bool = False) -> None:
        self.scheduler = scheduler
        self.runner = scheduler.runner
        self.open = True
        self.cancelled = False
        self.ready: deque[Strand] = deque()
        self.idle: list[Worker] = []
        self.attendant: Worker | None = None
        self.strands: set[Strand] = set()
        self.scope = CancelScope(shield=shield)
        self.enqueue_first = False
        self.draining = Event()
        self.ended = Event()
        self._settled: Event | None = None
        self.thread = get_ident()
        self._context = copy_context()
        if sniffio is not None:  # it sees no event loop from a callback, which `summon` may be called from
            self._context.run(sniffio.current_async_library_cvar.set, sniffio.current_async_library())

    async def keep(
        self, tasks: DeferredTasks | None = None, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED
    ) -> None:
        """Run the session, until it is drained and idle."""
        try:
            with self.scope:
                async with create_task_group() as self.group:
                    try:
                        task_status.started()
                        if tasks is not None:
                            self.hand_over(tasks)
                        await self.draining.wait()
                        while not self._close_if_idle():
                            self._settled = Event()
                            await self._settled.wait()
                    finally:
                        self.cancelled = True  # no strand starts in a group that is about to close
                        self.group.cancel_scope.cancel()
        finally:
            self._sweep()
            self.ended.set()

    async def drain(self, timeout: float) -> None:
        """Wait for what is left, `timeout` seconds at most; then cancel the rest and wait for that."""
        self.enqueue_first = True
        with self.runner._lock:
            strands = self._take_engine_tasks([strand for strand in self.strands if strand.active])
        for strand in strands:
            self._start_enqueueing(strand)
        self.draining.set()
        with move_on_after(timeout):
            await self.ended.wait()
        if not self.ended.is_set():
            with self.runner._lock:
                left = self._unfinished()
            names = Counter(ascii(task.name) for task in left)
            logger.error(
                "drain_timeout=%s s is over; abandoning deferred tasks: %s",
                timeout,
                ", ".join(f"{name} ({count})" for name, count in names.items()),
            )
            self.scope.cancel()
            await self.ended.wait()

    def expect(self, tasks: DeferredTasks) -> Strand:
        """Let a drain wait for a request that has tasks. Under the runner's lock, from any thread."""
        if tasks._strand is not None:  # a session that is closed by now, or on another event loop, expected them
            other = tasks._strand.session
            other.strands.discard(tasks._strand)
            other.scheduler.soon(other.settle)
        tasks._strand = Strand(self, tasks._tasks)
        self.strands.add(tasks._strand)
        return tasks._strand

    def hand_over(self, tasks: DeferredTasks) -> None:
        """Take over the list of a request that has ended."""
        with self.runner._lock:
            tasks._ended = True
            tasks._forget_start()
            strand = tasks._strand
            if strand is None or strand.session is not self:
                strand = self.expect(tasks)
            if self.runner.concurrent:
                self.strands.discard(strand)
                strands = [Strand(self, [task], active=True) for task in tasks._tasks]
                self.strands.update(strands)
            else:
                strand.active = True
                strands = [strand]
            taken = self._take_engine_tasks(strands) if self.enqueue_first else ()
        for strand in taken:
            self._start_enqueueing(strand)
        self.scheduler.push(*strands)

    def add_late(self, tasks: DeferredTasks, task: DeferredTask) -> None:
        """Queue a task of a list that was handed over before. Under the runner's lock, from any thread."""
        strand = tasks._strand
        if strand is not None and strand.active and strand.session is self:
            strand.queue.append(task)
            return
        strand = Strand(self, [task], active=True)
        if not self.runner.concurrent and tasks._type != "lifespan":
            tasks._strand = strand
        self.strands.add(strand)
        self.scheduler.soon(self.scheduler.push, strand)

    def _take_engine_tasks(self, strands: list[Strand]) -> list[Strand]:
        """Split what waits for its engine off each strand. Under the runner's lock."""
        taken = []
        for strand in strands:
            queue = strand.rest()
            tasks = [task for task in queue if task._call is not task.func]
            if tasks:
                taken.append(rest := Strand(self, tasks, active=True))
                strand.queue = [task for task in queue if task._call is task.func]
                strand.position = 0
                if strand.current is not None and strand.current._call is not strand.current.func:
                    strand.freed = rest.freed = Event()
        self.strands.update(taken)
        return taken

    def _start_enqueueing(self, strand: Strand) -> None:
        self._context.run(self.group.start_soon, self._enqueue_strand, strand)

    async def _enqueue_strand(self, strand: Strand) -> None:
        if strand.freed is not None:
            await strand.freed.wait()  # the one before it, which is being enqueued
        while True:
            with self.runner._lock:
                if strand.head() is None:
                    strand.current = None
                    self.retire(strand)
                    return
                task = strand.take()
            await self.scheduler.enqueue(task)

    def retire(self, strand: Strand) -> None:
        """Let go of a strand that has nothing left to run. Under the runner's lock."""
        strand.active = False
        if not self.cancelled:
            self.strands.discard(strand)
        self.settle()

    def settle(self) -> None:
        if not self.strands and self._settled is not None:
            self._settled.set()

    def make_ready(self, strand: Strand) -> None:
        """Let a worker run what the strand has taken."""
        self.ready.append(strand)
        if self.attendant is None and not self.cancelled:
            self.summon()

    def summon(self) -> None:
        """Make an idle worker, or a new one, attend."""
        if self.idle:
            self.attendant = self.idle.pop()
            self.attendant.summons.release()
        else:
            self.attendant = Worker(self)
            # In the session's context: a worker outlives the request that happened to need it.
            self._context.run(self.group.start_soon, self.attendant.run)

    def _unfinished(self) -> list[DeferredTask]:
        tasks = [task for strand in self.strands for task in (strand.current, *strand.rest()) if task is not None]
        return [task for task in tasks if task.state in (TaskState.PENDING, TaskState.RUNNING)]

    def _close_if_idle(self) -> bool:
        with self.runner._lock:
            self.open = bool(self.strands)
            return not self.open

    def _sweep(self) -> None:
        with self.runner._lock:
            self.open = False
            self.cancelled = True
            left = self._unfinished()
            claimed = {*self.ready, *(strand for strand in self.strands if strand.hop is not None)}
        for strand in claimed:
            if strand.hop is not None and not strand.hop.abandon():
                strand.hop.discard()
            self.scheduler.release(strand)
        self.ready.clear()
        for task in left:
            self.runner._finish_outside(task, TaskState.ABANDONED)
        with self.runner._lock:
            self.strands.clear()
