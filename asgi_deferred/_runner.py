"""The runner: the configuration of an application, and the start and the end of its homes."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from math import inf
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from anyio import get_cancelled_exc_class

from ._drains import abandon, bury, drain, give_up, rest
from ._loops import loop_of, running_loop
from ._outcome import without_error
from ._reports import warn_mounted
from ._scheduler import Scheduler, inside
from ._settings import Settings
from ._states import Home, Statistics, TaskState
from ._tasks import DeferredTasks, TaskEvent, current
from ._waiting import outlast, until, until_empty

if TYPE_CHECKING:
    from typing import Self


class Block:
    """One entry into a runner: its home, and the list for tasks that are deferred outside any request."""

    __slots__ = ("before", "home", "native", "tasks")

    def __init__(self, runner: Runner) -> None:
        self.native = running_loop()
        scheduler = runner._scheduler
        self.home = scheduler.account.enter(self.native, Home(loop_of(self.native)))
        self.tasks = DeferredTasks(scheduler, {"type": "lifespan"})
        self.tasks._complete = self.tasks._ended = self.tasks._apart = True
        self.tasks._outcome = without_error("lifespan", complete=True)
        self.tasks._home = self.home  # so that `draining` speaks of this runner before the first task, too
        self.before = current.get()


class Runner(Settings):
    """Runs task lists, with their limits, threads, order and shutdown. Create one for each application and process.

    The middleware starts the runner with the server's lifespan, and drains it at the end. Anywhere else, such as in a
    script, a worker or a test, `async with runner:` does the same. Inside the block, `defer()` works without a request
    and runs tasks at once. The end of the block drains. If the block is cancelled, the remaining tasks are abandoned
    at once.

    A runner can be entered more than once at a time, on one event loop or on several. Tasks run on the event loop of
    their request. Each end drains the unfinished tasks on its own event loop.

    Args:
        max_concurrency: How many tasks run at once, including those in threads.
        max_threads: How many worker threads the runner uses for sync tasks. They are its own threads.
        max_pending: How many tasks may be accepted and not yet ended; see `overflow`.
        overflow: What happens at `max_pending`. "wait" holds the request's ASGI call until there is room; its client
            already has the response. "reject" makes `add_task` raise `BacklogFull`.
        concurrent: If true, the tasks of one list run concurrently. By default they run one at a time, in order.
        when: The default of the `when` option.
        timeout: The default of the `timeout` option, in seconds; `None` means no timeout.
        enqueue_timeout: The default of the `timeout` option for engines' tasks, in seconds: the time to enqueue one.
            If the engine of a durable task hangs, the client waits this long for its 503.
        drain_timeout: How many seconds tasks have to end at shutdown. On a server without a lifespan it applies when
            a call is cancelled. Tasks that have not ended by then are cancelled, and get one more second. Keep the sum
            below the time after which your supervisor kills the process.
        observers: Functions that are called with a `TaskEvent`, in the task's context, when a task starts and when it
            ends.
        around: Functions that are called with the `DeferredTask`, in its context, and return a context manager to
            enter around the call. A sync context manager is entered in the thread that makes the call. An async one is
            entered on the event loop, around an async function or around the awaitable that a sync function returned.
            If it is both, it is entered either way.
        unavailable: An ASGI application, such as a Starlette response, that answers instead of a plain 503 when an
            engine refuses a durable task. It finds the EnqueueFailed as the `error` of its list's `outcome`. Its
            answer also gets the `access-control-*` and `vary` headers of the response it replaces, unless it sets
            them itself.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: An argument has the wrong type.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scheduler = Scheduler(self)
        self._blocks: list[Block] = []

    # Entered and left

    async def __aenter__(self) -> Self:
        self._blocks.append(self._enter())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        native, here = running_loop(), current.get()
        mine = [block for block in self._blocks if block.native is native]
        block = next((block for block in reversed(mine) if block.tasks is here), mine[-1])
        self._blocks.remove(block)
        await self._leave(block, exc)

    def _enter(self) -> Block:
        block = Block(self)
        current.set(block.tasks)
        return block

    async def _leave(self, block: Block, exc: BaseException | None = None) -> None:
        """Drain, or abandon at once if `exc` is not an Exception. Then close the home to late tasks."""
        account, home = self._scheduler.account, block.home
        if current.get() is block.tasks:
            current.set(block.before)
        try:
            if exc is None or isinstance(exc, Exception):
                await self._drain(home)
            else:
                raise exc
        except GeneratorExit:
            bury(self._scheduler, home)
            raise
        except BaseException as failure:
            home.drains += 1
            abandon(self._scheduler, home)
            try:
                await outlast(partial(until_empty, home))
            finally:
                home.drains -= 1
            if failure is not exc:
                raise
        finally:
            if home.unsettled and home.entered == 1:  # added after the deadline of another entry, which is gone
                abandon(self._scheduler, home)
                give_up(self._scheduler, home)
            rest(home)
            account.leave(block.native, home)

    async def _drain(self, home: Home) -> None:
        """Wait until a home is empty, or its drain has given up. It can be cancelled, and called again."""
        home.drains += 1
        try:
            while not self._scheduler.account.shut(home):
                drain(self._scheduler, home, self.drain_timeout)
                await until_empty(home)
        finally:
            home.drains -= 1

    # A request ends

    def _end(self, tasks: DeferredTasks) -> Awaitable[None] | None:
        """Hand over the list of a request that has ended; return an awaitable if the call has to wait."""
        account = self._scheduler.account
        home = account.homes.get(tasks._loop)
        if home is None and tasks._below_a_router and tasks._all:
            warn_mounted(tasks)
        if home is None or not self._scheduler.end(tasks, home):
            return self._run_here(tasks)
        if account.is_over_limit() and not isinstance(tasks._error, get_cancelled_exc_class()):
            return until(account.room, lambda: not account.is_over_limit())
        return None

    async def _run_here(self, tasks: DeferredTasks) -> None:
        """Run a list inside its call, because no lifespan runs."""
        scheduler, home = self._scheduler, Home(loop_of(tasks._loop))
        cancelled = isinstance(tasks._error, get_cancelled_exc_class())
        scheduler.end(tasks, home)
        try:
            if not cancelled:
                await until_empty(home)
        except GeneratorExit:
            bury(scheduler, home)
            raise
        except BaseException:
            cancelled = True
            raise
        finally:
            if cancelled:
                try:
                    await outlast(partial(self._drain_cancelled, home))
                finally:  # a call may be closed while it drains
                    scheduler.cancelled.pop(home, None)
                    home.waiters.wake()
            rest(home)
            scheduler.account.leave(None, home)

    async def _drain_cancelled(self, home: Home) -> None:
        """Drain the home of a cancelled call, and wait for the others: daphne exits once the first call has ended."""
        cancelled = self._scheduler.cancelled
        cancelled[home] = None
        await self._drain(home)  # if this is cancelled, `outlast` calls again
        del cancelled[home]
        home.waiters.wake()
        for other in tuple(cancelled):
            if other.loop.is_running_here():
                await until(other.waiters, lambda other=other: other not in cancelled)  # type: ignore[misc]

    # The account

    def statistics(self) -> Statistics:
        """Return the counts of tasks by state."""
        return self._scheduler.account.statistics()

    def tasks(self) -> list[TaskEvent]:
        """Return the unfinished tasks, in the order accepted. Safe from any thread."""
        unfinished = sorted(self._scheduler.account.unfinished(), key=lambda task: task._added)
        seen = [(task, task._list, task.state) for task in unfinished]
        return [
            TaskEvent._now(task, tasks, state)
            for task, tasks, state in seen
            if tasks is not None and state in (TaskState.PENDING, TaskState.RUNNING)  # or it has just ended
        ]

    @property
    def oldest(self) -> float:
        """How many seconds the longest-waiting task has waited for its turn; 0.0 if none waits.

        The time counts from the end of the task's request, so an open websocket raises no alarm.
        """
        now, unfinished = perf_counter(), self._scheduler.account.unfinished()
        pending = [(task, task._list) for task in unfinished if task.state is TaskState.PENDING]
        waits: list[float] = [now - max(task._added, tasks._ended_at) for task, tasks in pending if tasks is not None]
        return max([0.0, *waits])

    @property
    def running(self) -> list[str]:
        """The names of the running tasks, the longest-running first."""
        running = [task for task in self._scheduler.account.unfinished() if task.state is TaskState.RUNNING]
        return [task.name for task in sorted(running, key=lambda task: task._started or inf)]

    async def wait_idle(self) -> None:
        """Wait until no accepted task is unfinished.

        Raises:
            RuntimeError: It was called inside a task, which would wait for itself.
        """
        task, account = inside.get(), self._scheduler.account
        if task is not None and getattr(task._list, "_host", None) is self._scheduler:
            raise RuntimeError(
                f"wait_idle() was called inside the deferred task {task.name!a}, so it would wait for itself for ever. "
                "Call it outside of tasks, such as in a test."
            )
        await until(account.idle, lambda: not account.lines)
