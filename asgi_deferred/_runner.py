"""The runner: an app's configuration, the account of every task, and how one task runs.

1. Every accepted task is in exactly one state, and `accepted` is the sum over all states, at any moment. All
   changes of state and of these counts happen under `Runner._lock`, which is held for no callback.
2. A task enters a final state once: the first to claim it wins, all others are told so and do nothing.
3. Each final state makes one event and, where it is not the user's wish, one line in the log.
4. Whatever a task raises stays in it. Only the cancellation of the scopes around it passes through.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    nullcontext,
)
from functools import partial
from inspect import isasyncgen, isasyncgenfunction, isawaitable, isgenerator, isgeneratorfunction
from logging import getLogger
from threading import Lock, get_ident
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from anyio import CancelScope, Event, create_task_group, current_time, get_cancelled_exc_class, move_on_after
from anyio.lowlevel import RunVar, checkpoint, checkpoint_if_cancelled

from ._completion import Outcome, When, lets_through
from ._exceptions import BacklogFull, DeferredError, EnqueueFailed, RunnerClosed
from ._scheduler import Scheduler, Session, Strand, soon_here, torn_down
from ._tasks import (
    DeferredTask,
    DeferredTasks,
    TaskEvent,
    TaskState,
    check_count,
    check_positive,
    check_when,
    current,
    unwrap_partial,
)
from ._threads import Threads

if TYPE_CHECKING:
    from typing import Self

logger = getLogger("asgi_deferred")

PENDING, RUNNING, SUCCEEDED = TaskState.PENDING, TaskState.RUNNING, TaskState.SUCCEEDED

Around: TypeAlias = Callable[[DeferredTask], AbstractContextManager[object] | AbstractAsyncContextManager[object]]


class Statistics(NamedTuple):
    """Counts of a runner's tasks since it was made; `accepted` is the sum of all the others."""

    accepted: int
    pending: int
    running: int
    succeeded: int
    failed: int
    timed_out: int
    skipped: int
    cancelled: int
    abandoned: int


class _TimeUp(TimeoutError):
    """A task's own `timeout`, told apart from a TimeoutError of the user's code."""


class Runner:
    """Runs task lists: limits, threads, order, shutdown. One for each application and process.

    The middleware starts and drains it with the server's lifespan. `async with runner:` does the same anywhere
    else: in a script, a worker, a test. Inside the block `defer()` works without a request and runs tasks at
    once; the end of the block drains.

    Args:
        max_concurrency: Tasks that run at once, those in threads included.
        max_threads: Worker threads for sync tasks. They are the runner's own.
        max_pending: Tasks accepted and not yet ended; see `overflow`.
        overflow: What happens at `max_pending`. "wait" holds the request's ASGI call (its client has the
            response already) until there is room; "reject" makes `add_task` raise `BacklogFull`.
        concurrent: Let the tasks of one list run concurrently, not one at a time in the order added.
        when: The default of the `when` option.
        timeout: The default of the `timeout` option, in seconds; `None` for none.
        enqueue_timeout: The same for engines' tasks, where it is the time to enqueue one. A client waits that long
            for its 503 when the engine of a durable task hangs.
        drain_timeout: Seconds that tasks have to end at shutdown, and after the cancellation of a call on a
            server without lifespan. Keep it below the time after which your supervisor kills the process.
        observers: Called with a `TaskEvent`, in the task's context, when a task starts and when it ends.
        around: Called with the `DeferredTask`, in its context, to make the context manager that is entered
            around the call, in the thread that makes it. An async one is entered around what is awaited, on the
            event loop: an async function, or what a sync one returned. One that is both is entered as either.

    Raises:
        ValueError, TypeError: An argument is out of its range or not of its type.
    """

    def __init__(
        self,
        *,
        max_concurrency: int = 1000,
        max_threads: int = 40,
        max_pending: int = 10_000,
        overflow: Literal["wait", "reject"] = "wait",
        concurrent: bool = False,
        when: When = "success",
        timeout: float | None = None,
        enqueue_timeout: float = 5.0,
        drain_timeout: float = 20.0,
        observers: Sequence[Callable[[TaskEvent], object]] = (),
        around: Sequence[Around] = (),
    ) -> None:
        check_count("max_concurrency", max_concurrency)
        check_count("max_threads", max_threads)
        check_count("max_pending", max_pending)
        check_positive("enqueue_timeout", enqueue_timeout)
        check_positive("drain_timeout", drain_timeout)
        if timeout is not None:
            check_positive("timeout", timeout)
        if overflow not in ("wait", "reject"):
            raise ValueError(f"overflow={overflow!r} is unknown: use 'wait' or 'reject'")
        check_when(when)
        self.max_concurrency = max_concurrency
        self.max_threads = max_threads
        self.max_pending = max_pending
        self.overflow = overflow
        self.concurrent = concurrent
        self.when: When = when
        self.timeout = timeout
        self.enqueue_timeout = enqueue_timeout
        self.drain_timeout = drain_timeout
        self.observers: tuple[Callable[[TaskEvent], object], ...] = tuple(observers)
        self.around: tuple[Around, ...] = tuple(around)
        self._lock = Lock()
        self._threads = Threads()
        self._accepted = 0
        self._running: dict[DeferredTask, None] = {}
        self._ended = dict.fromkeys(TaskState, 0)
        self._unfinished = 0
        self._waiters: dict[int, list[Callable[[], None]]] = {}
        self._live: Session | None = None
        self._schedulers: RunVar[Scheduler] = RunVar("asgi_deferred")

    # Started and drained

    async def __aenter__(self) -> Self:
        block = self._run()
        await block.__aenter__()
        self._block = block
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._block.__aexit__(exc_type, exc, traceback)

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[DeferredTasks]:
        session = Session(self._scheduler())
        with self._lock:
            if self._live is not None:
                raise RuntimeError(
                    "This Runner runs already: it was given to two applications, or one application's lifespan "
                    "was started twice. Give each DeferredMiddleware a Runner of its own."
                )
            self._live = session
        tasks = DeferredTasks(self, "lifespan")
        tasks._complete, tasks._ended, tasks._strand = True, True, Strand(session, tasks._tasks)
        before = current.get()
        error: Exception | None = None
        try:
            async with create_task_group() as group:
                await group.start(session.keep)
                current.set(tasks)
                try:
                    yield tasks
                except Exception as exc:  # the task group would wrap it
                    error = exc
                await session.drain(self.drain_timeout)
        finally:
            current.set(before)
            self._live = None
        if error is not None:
            raise error

    async def _drain(self) -> None:
        await cast("Session", self._live).drain(self.drain_timeout)

    def _scheduler(self) -> Scheduler:
        try:
            return self._schedulers.get()
        except LookupError:
            scheduler = Scheduler(self)
            self._schedulers.set(scheduler)
            return scheduler

    # A request ends

    def _end(self, tasks: DeferredTasks) -> Awaitable[None] | None:
        """Have run what the request deferred, in the background; return what the call has to await, if anything."""
        session = tasks._strand.session if tasks._strand is not None else self._live
        if session is None or not session.open or session.thread != get_ident():
            return self._run_here(tasks)
        session.hand_over(tasks)
        if self._unfinished > self.max_pending and not isinstance(tasks._error, get_cancelled_exc_class()):
            return self._until(self.max_pending)
        return None

    async def _run_here(self, tasks: DeferredTasks) -> None:
        """Run a list where there is no lifespan to do so."""
        scheduler = self._scheduler()
        session = Session(scheduler, shield=True)
        session.draining.set()

        def limit() -> None:
            session.scope.deadline = current_time() + self.drain_timeout
            scheduler.cancelled_calls.add(session)

        try:
            async with create_task_group() as group:
                group.start_soon(session.keep, tasks)
                try:
                    if isinstance(tasks._error, get_cancelled_exc_class()):
                        limit()
                    await session.ended.wait()
                except BaseException:
                    limit()
                    raise
        finally:
            if session in scheduler.cancelled_calls:
                scheduler.cancelled_calls.remove(session)
                with CancelScope(shield=True):  # daphne exits as soon as the first of the calls it cancelled has ended
                    for other in tuple(scheduler.cancelled_calls):
                        await other.ended.wait()

    # The account

    def statistics(self) -> Statistics:
        """Return the counts of tasks by state."""
        with self._lock:
            ended = self._ended
            running = len(self._running)
            return Statistics(
                self._accepted,
                self._unfinished - running,
                running,
                *(ended[state] for state in TaskState if state not in (PENDING, RUNNING)),
            )

    @property
    def running(self) -> list[str]:
        """The names of the tasks that run now, the longest-running first."""
        with self._lock:
            return [task.name for task in self._running]

    async def wait_idle(self) -> None:
        """Wait until no accepted task is unfinished."""
        await self._until(0)

    async def _until(self, limit: int) -> None:
        soon = soon_here()
        while True:
            event = Event()
            with self._lock:
                if self._unfinished <= limit:
                    return
                self._waiters.setdefault(limit, []).append(partial(soon, event.set))
            await event.wait()

    def _accept(self, tasks: DeferredTasks, task: DeferredTask) -> None:
        replaced = None
        with self._lock:
            if self.overflow == "reject" and self._unfinished >= self.max_pending:
                raise BacklogFull(
                    f"{task.name!a} was not accepted: max_pending={self.max_pending} tasks are unfinished, and the "
                    "runner has overflow='reject'. Answer 503, or raise max_pending."
                )
            if task.durable:
                _check_durable(tasks, task)
                tasks._durable = True
            tasks._tasks.append(task)
            if tasks._ended:  # looked at last: a request without tasks ends without taking the lock
                tasks._tasks.pop()
                self._accept_late(tasks, task)
            elif tasks._strand is None and self._live is not None and self._live.open:
                self._live.expect(tasks)
            self._accepted += 1
            self._unfinished += 1
            if task.key is not None:
                if tasks._keys is None:
                    tasks._keys = {}
                replaced = tasks._keys.get(task.key)
                tasks._keys[task.key] = task
        if replaced is not None:
            self._cancel(replaced)

    def _accept_late(self, tasks: DeferredTasks, task: DeferredTask) -> None:
        strand = tasks._strand
        session = strand.session if strand is not None else None
        if session is None or not session.open:
            session = self._live
        if session is None or not session.open:
            raise RunnerClosed(
                f"{task.name!a} was not accepted: its request is over, and its runner is closed or never ran. "
                "Add tasks before the response ends, or run the application with a lifespan."
            )
        if strand is not None and strand.session is session and strand.active and strand.queue is not tasks._tasks:
            tasks._tasks.append(task)
        session.add_late(tasks, task)

    async def _enqueue_durable(self, tasks: DeferredTasks, expected: Outcome) -> None:
        """Give a response's durable tasks to their engines, in order, up to the first refusal.

        The enqueue itself is not cancelled with the request: whether the engine has the job would be unknown then.
        """
        scheduler = self._scheduler()
        for task in tasks:
            if not task.durable or task.state is not PENDING:
                continue
            try:
                wanted = task._context.copy().run(lets_through, task.when, expected)
            except BaseException as exc:
                self._finish_outside(task, TaskState.FAILED, exc)
            else:
                if not wanted:
                    continue
                async with create_task_group() as group:
                    group.start_soon(scheduler.enqueue_shielded, task)
                await checkpoint_if_cancelled()  # trio's nursery leaves that to the next checkpoint
            if task.error is not None:
                raise EnqueueFailed(
                    f"{task.name!a} was not enqueued ({task.state.name}), so the response was not sent: its engine "
                    "refused it or did not answer in time. Is the broker up?"
                ) from task.error

    def _begin(self, task: DeferredTask) -> bool:
        """Claim a task that is about to run, in its context; return whether it shall."""
        try:
            outcome = task._tasks.outcome
            wanted = outcome is None or lets_through(task.when, outcome)  # None: the barrier has decided
        except BaseException as exc:
            self._finish(task, TaskState.FAILED, exc)
            return False
        if not wanted:
            self._finish(task, TaskState.SKIPPED)
            return False
        with self._lock:
            if task.state is not PENDING:
                return False
            task.state = RUNNING
            self._running[task] = None
        task._started = perf_counter()
        if self.observers:
            self._notify(task, RUNNING)
        return True

    def _finish(
        self, task: DeferredTask, state: TaskState, error: BaseException | None = None, *, only_pending: bool = False
    ) -> bool:
        """Enter a final state, in the task's context; return whether the task was unfinished until now."""
        with self._lock:
            if task.state is RUNNING and not only_pending:
                del self._running[task]
            elif task.state is not PENDING:
                return False
            task.state = state
            task.error = error
            self._ended[state] += 1
            self._unfinished -= 1
            if self._waiters:
                for limit in [limit for limit in self._waiters if self._unfinished <= limit]:
                    for wake in self._waiters.pop(limit):
                        wake()
        if state is not SUCCEEDED:
            self._log(task)
        if self.observers:
            self._notify(task, state)
        return True

    def _finish_outside(self, task: DeferredTask, state: TaskState, error: BaseException | None = None) -> bool:
        return task._context.copy().run(self._finish, task, state, error)

    def _cancel(self, task: DeferredTask) -> bool:
        return task._context.copy().run(partial(self._finish, task, TaskState.CANCELLED, only_pending=True))

    def _notify(self, task: DeferredTask, state: TaskState) -> None:
        now = perf_counter()
        started = task._started or now
        event = TaskEvent(task, state, task._tasks.outcome, started - task._added, now - started, task.error)
        for observer in self.observers:
            try:
                observer(event)
            except BaseException:
                logger.exception("Observer %r failed on %s", observer, describe(task))

    def _log(self, task: DeferredTask) -> None:
        error = task.error
        if task.state is TaskState.FAILED:
            logger.error("Failed: %s", describe(task), exc_info=error)
        elif task.state is TaskState.TIMED_OUT:
            still = "" if task._async else "; it is a sync function, so its thread still runs"
            if task._call is not task.func:
                still = "; whether its engine has it is unknown"
            logger.error("Timed out after %s s: %s%s", task.timeout, describe(task), still)
        elif task.state is TaskState.ABANDONED:
            logger.error("Abandoned at shutdown: %s", describe(task), exc_info=error)
        elif error is not None:
            logger.error("Cancelled, and not by the runner: %s", describe(task), exc_info=error)
        else:
            logger.debug("%s: %s", task.state.value.capitalize(), describe(task))

    # One task runs

    async def _run_async(
        self, task: DeferredTask, timeout: float | None, returned: Awaitable[Any] | None = None
    ) -> None:
        """Run an async task; or await what a sync one `returned`, which began in a thread."""
        if returned is None and not self._begin(task):
            return
        try:
            if timeout is None and not self.around:
                await (task._call(*task.args, **task.kwargs) if returned is None else returned)
            else:
                async with self._entered_async(task, called=returned is not None) if self.around else _NOTHING:
                    with move_on_after(timeout) as scope:
                        await (task._call(*task.args, **task.kwargs) if returned is None else returned)
                    if scope.cancelled_caught:
                        raise _TimeUp(f"timeout={task.timeout} s is over")
        except BaseException as exc:
            if torn_down():
                self._finish(task, TaskState.ABANDONED, exc)
                if type(exc) is GeneratorExit or isinstance(exc, get_cancelled_exc_class()):
                    raise
                await checkpoint()  # the cancellation that the task's own error hid
            elif isinstance(exc, _TimeUp):
                self._finish(task, TaskState.TIMED_OUT, exc)
            elif isinstance(exc, get_cancelled_exc_class()):
                self._finish(task, TaskState.CANCELLED, exc)
            else:
                self._finish(task, TaskState.FAILED, exc)
        else:
            self._finish(task, SUCCEEDED)

    def _run_sync(self, task: DeferredTask) -> Awaitable[Any] | None:
        """Run a sync task, in its context and a thread; return what is to be awaited before it has ended."""
        if sniffio := sys.modules.get("sniffio"):  # as anyio's own threads do: there is no event loop here
            sniffio.current_async_library_cvar.set(None)
        if not self._begin(task):
            return None
        try:
            result = self._call_around(task) if self.around else task._call(*task.args, **task.kwargs)
            if result is not None:
                if isawaitable(result):
                    return result
                _refuse_generator(task.func, result)
        except BaseException as exc:
            self._finish(task, TaskState.FAILED, exc)
        else:
            self._finish(task, SUCCEEDED)
        return None

    def _time_out(self, task: DeferredTask) -> None:
        """Give up on a sync task whose thread goes on."""
        self._finish_outside(task, TaskState.TIMED_OUT, _TimeUp(f"timeout={task.timeout} s is over"))

    def _call_around(self, task: DeferredTask) -> Any:
        with ExitStack() as stack:
            for around in self.around:
                manager = around(task)
                if isinstance(manager, AbstractContextManager):
                    stack.enter_context(manager)
            return task._call(*task.args, **task.kwargs)

    @asynccontextmanager
    async def _entered_async(self, task: DeferredTask, *, called: bool) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for around in self.around:
                manager = around(task)
                if isinstance(manager, AbstractAsyncContextManager):
                    await stack.enter_async_context(manager)
                elif not called:
                    stack.enter_context(manager)
            yield


def _check_durable(tasks: DeferredTasks, task: DeferredTask) -> None:
    if task._call is task.func:
        raise TypeError(
            f"durable=True stores a job with an engine, and {task.name!a} is a function that would run here. "
            "Make it a task of an engine, or leave durable out."
        )
    if tasks._type != "http" or tasks._complete or tasks._ended:
        raise DeferredError(
            f"durable=True holds a response back until {task.name!a} is stored, and here is none to hold back: this is "
            "no HTTP request, or its response is complete. Leave durable out, or await the engine's own enqueue."
        )


_NOTHING: nullcontext[None] = nullcontext()


def describe(task: DeferredTask) -> str:
    """Name a task for the log, on one line whatever the request's path holds, and without its arguments."""
    request = f", request {task._tasks._request!a}" if task._tasks._request else ""
    return f"deferred task {task.name!a}, added at {task.added_at}{request}"


def _refuse_generator(func: Callable[..., Any], result: object) -> None:
    inner = unwrap_partial(func)
    if (isgenerator(result) and isgeneratorfunction(inner)) or (isasyncgen(result) and isasyncgenfunction(inner)):
        raise TypeError(
            "This is a generator function: calling it runs none of its code. "
            "Pass a function that consumes it, or one without `yield`."
        )
