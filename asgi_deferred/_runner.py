"""The runner: an app's configuration, and the beginning and the end of its homes."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
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
    """One entry of a runner: the home that it is in, and the list of what is deferred in it outside of any request."""

    __slots__ = ("before", "home", "native", "tasks")

    def __init__(self, runner: Runner) -> None:
        self.native = running_loop()
        scheduler = runner._scheduler
        self.home = scheduler.account.enter(self.native, Home(loop_of(self.native)))
        self.tasks = DeferredTasks(scheduler, {"type": "lifespan"})
        self.tasks._complete = self.tasks._ended = self.tasks._apart = True
        self.tasks._outcome = without_error("lifespan", complete=True)
        self.tasks._home = self.home
        self.before = current.get()


class Runner(Settings):
    """Runs task lists: limits, threads, order, shutdown. One for each application and process.

    The middleware starts and drains it with the server's lifespan. `async with runner:` does the same anywhere
    else: in a script, a worker, a test. Inside the block `defer()` works without a request and runs tasks at
    once; the end of the block drains. If the block is cancelled, what is left is abandoned at once. A runner may be
    entered more than once at a time, on one event loop or on several. Tasks run on the loop of their request, and
    each end drains what is unfinished on its loop.

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
            server without lifespan. One second more is given to those that are cancelled then. Keep it below the time
            after which your supervisor kills the process.
        observers: Called with a `TaskEvent`, in the task's context, when a task starts and when it ends.
        around: Called with the `DeferredTask`, in its context, to make the context manager that is entered
            around the call, in the thread that makes it. An async one is entered around what is awaited, on the
            event loop: an async function, or what a sync one returned. One that is both is entered as either.
        unavailable: An ASGI application, such as a Starlette response, which answers in place of a plain 503 when an
            engine refuses a durable task; the `error` of its list's `outcome` is the EnqueueFailed then. It is sent
            with the `access-control-*` and `vary` headers of the response it replaces, where it has none of its own.

    Raises:
        ValueError, TypeError: An argument is out of its range or not of its type.
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
        """Drain, or abandon at once if `exc` is more than an Exception; then close the home to late tasks."""
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
            if home.unsettled and home.entered == 1:  # added after the deadline of another entry, which has left
                abandon(self._scheduler, home)
                give_up(self._scheduler, home)
            rest(home)
            account.leave(block.native, home)

    async def _drain(self, home: Home) -> None:
        """Wait until a home is empty, or its drain has given up. May be cut, and called again."""
        home.drains += 1
        try:
            while not self._scheduler.account.shut(home):
                drain(self._scheduler, home, self.drain_timeout)
                await until_empty(home)
        finally:
            home.drains -= 1

    # A request ends

    def _end(self, tasks: DeferredTasks) -> Awaitable[None] | None:
        """Have run what the request deferred, in the background; return what the call has to await, if anything."""
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
        """Run a list where there is no lifespan to do so."""
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
                finally:  # a call may be closed as it drains
                    scheduler.cancelled.pop(home, None)
                    home.waiters.wake()
            rest(home)
            scheduler.account.leave(None, home)

    async def _drain_cancelled(self, home: Home) -> None:
        """Drain the home of a call that was cancelled, and wait for others: daphne exits when the first has ended."""
        cancelled = self._scheduler.cancelled
        cancelled[home] = None
        await self._drain(home)  # if it is cut, `outlast` comes back
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
        """Return what is unfinished now, in the order accepted. Safe from any thread."""
        unfinished = sorted(self._scheduler.account.unfinished(), key=lambda task: task._added)
        seen = [(task, task._list, task.state) for task in unfinished]
        return [
            TaskEvent._now(task, tasks, state)
            for task, tasks, state in seen
            if tasks is not None and state in (TaskState.PENDING, TaskState.RUNNING)  # else it has ended just now
        ]

    @property
    def oldest(self) -> float:
        """For how many seconds the longest-waiting task could have started; 0.0 if none waits.

        It counts from the end of the task's request, so that an open websocket raises no alarm.
        """
        return max((event.waited for event in self.tasks() if event.state is TaskState.PENDING), default=0.0)

    @property
    def running(self) -> list[str]:
        """The names of the tasks that run now, the longest-running first."""
        return [task.name for task in tuple(self._scheduler.account.running) if task.state is TaskState.RUNNING]

    async def wait_idle(self) -> None:
        """Wait until no accepted task is unfinished.

        Raises:
            RuntimeError: This is called inside a task, which would wait for itself.
        """
        task, account = inside.get(), self._scheduler.account
        if task is not None and task.state is TaskState.RUNNING and task in account.running:
            raise RuntimeError(
                f"wait_idle() was called inside the deferred task {task.name!a}, and would wait for its end for ever. "
                "Call it outside, as in a test."
            )
        await until(account.idle, lambda: not account.unsettled)
