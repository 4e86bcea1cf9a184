"""Which task runs when and where, and how it ends.

1. Lists wait in one queue for a place (`max_concurrency`), and so do tasks that run independently of their list. The
   queue is first come, first served, across all event loops. A sync task needs a thread as well (`max_threads`). While
   it waits for the thread, it takes no place.
2. A `Run` takes one task from its turn to its end. Once a run is *released*, its place is free and its list queues for
   its next turn. A run is released once, either by the code that runs the task or by the code that gives up on it.
3. An async task runs in a native task of its own, in the context of the line that added it. Consecutive sync tasks
   of a list share one hop to a thread if they have no timeout. If a sync task returns an awaitable, a native task
   awaits it.
4. Engines' tasks take no place and no pooled thread while a response waits for them, or once a drain has begun.
5. `add`, `cancel` and `end` run no code of the user's, except reports of tasks that these calls end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from time import perf_counter
from typing import Any
from weakref import WeakSet

from ._account import KEPT, Account
from ._calls import call_async, call_sync, close_unawaited, timed_out
from ._engines import recognise
from ._exceptions import BacklogFull, DeferredError, RunnerClosed, TaskTimedOut
from ._outcome import SUCCESS, lets_through, why_skipped
from ._reports import is_quiet, report
from ._settings import Settings
from ._states import AGAIN, LOST, NOBODY, SKIPPED, WAITS, WON, Answer, Home, Line, TaskState
from ._tasks import DeferredTask, DeferredTasks
from ._threads import Threads

PENDING, RUNNING, SUCCEEDED, FAILED = TaskState.PENDING, TaskState.RUNNING, TaskState.SUCCEEDED, TaskState.FAILED

inside: ContextVar[DeferredTask | None] = ContextVar("asgi_deferred_task", default=None)


class Run:
    """One task from its turn to its end (rule 2), and the job of its native task."""

    task: DeferredTask
    loop: Any
    # Most runs need none of these.
    stop: Callable[[], object] | None = None  # cancels the timer of a sync task
    placed = True
    given_up = False  # other code closed the task while it ran
    abandoned = False  # a drain has cancelled it
    _next: Run | None = None

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.line: Line | None = None  # the list whose turn this is; None for a task that runs independently
        self.home: Any = None
        self.native: Any = None
        self.returned: Awaitable[Any] | None = None  # the awaitable that a sync task returned
        self.then: Callable[[], object] | None = None  # called on release
        self.released = False

    async def main(self) -> None:
        scheduler, task, returned = self.scheduler, self.task, self.returned
        if self.native is not None and not self.loop.only_by_us:
            self.native.remove_done_callback(self.lost)
        try:
            if task.state is not RUNNING:
                if returned is not None or not scheduler.begin(self):
                    close_unawaited(returned)  # its task was given up in the meantime
                    return
            elif returned is None:  # it has entered RUNNING as its request ended
                task._started = perf_counter()
                inside.set(task)
            seconds, around = task.timeout, scheduler.settings.around
            if seconds is None and not around:
                await (task._call(*task.args, **task.kwargs) if returned is None else returned)
            else:
                if returned is not None and seconds is not None:
                    seconds = max(0.0, task._started + seconds - perf_counter())
                await call_async(task, around, self.loop, seconds, returned)
        except BaseException as exc:
            scheduler.finish(self, self.state_after(exc), exc)
        else:
            scheduler.succeed(self)
        finally:
            scheduler.release(self)
            del self, scheduler, task, returned  # or a cycle: the error's traceback keeps this frame alive

    def state_after(self, error: BaseException) -> TaskState:
        """Return the final state of a task whose native task raised `error`."""
        if isinstance(error, TaskTimedOut):
            return TaskState.TIMED_OUT
        if self.abandoned or (isinstance(error, GeneratorExit) and not self.loop.is_running_here()):
            return TaskState.ABANDONED
        if isinstance(error, self.loop.Cancelled):
            return self._state_if_cancelled()
        return FAILED

    def _state_if_cancelled(self) -> TaskState:
        """Tell a drain's cancellation from any other: an event loop that ends in a drain cancels tasks in any order."""
        drains = self.home is not None and self.home.draining
        if self.abandoned or self.loop.only_by_us or (drains and self.native.cancelling()):
            return TaskState.ABANDONED
        return TaskState.CANCELLED

    def lost(self, _: Any = None) -> None:
        """End a run whose native task was cancelled before its first step, so that `main` never ran."""
        if not self.released:
            self.scheduler.close_outside(self.task, self._state_if_cancelled())
            close_unawaited(self.returned)
            self.scheduler.release(self)


class Scheduler:
    """The host of task lists: see `Host`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.told: dict[str, object] = {}
        self.reset()
        schedulers.add(self)

    def reset(self) -> None:
        """Start with an empty account and no threads."""
        settings = self.settings
        self.account = Account(settings.max_concurrency, settings.max_threads, settings.max_pending)
        self.limit = settings.max_pending if settings.overflow == "reject" else None
        self.threads = Threads()
        self.cancelled: dict[Home, None] = {}  # the homes of cancelled calls, while they drain

    # Tasks and lists come in

    def add(self, task: DeferredTask) -> None:
        tasks, account = task._list, self.account
        if self.settings.concurrent:
            tasks._apart = True
        if task.durable:
            check_durable(task)
        if tasks._all is not None and tasks._count > KEPT:
            account.prune(tasks)
        limit = self.limit
        if limit is not None and tasks._unbounded:
            limit = None
        rival: Any = None
        replaced, answer = False, AGAIN
        while answer is AGAIN:  # until no other thread has taken the key in the meantime
            if task._hash is None:
                answer, _ = account.accept(task, limit)
            else:
                rival, seen, keys = account.rival(task)
                answer, replaced = account.accept(task, limit, rival, seen, keys)
        if replaced:
            rival._context.copy().run(self.report_end, rival)
        if answer is WAITS:
            return
        if answer is Answer.FULL:
            raise BacklogFull(
                f"{task.name!a} was not accepted: max_pending={self.settings.max_pending} tasks are unfinished, and "
                "the runner has overflow='reject'. Answer 503, or raise max_pending."
            )
        if answer is Answer.CLOSED:
            raise RunnerClosed(
                f"{task.name!a} was not accepted: its request is over, and its runner is closed or never ran. "
                "Add tasks before the response ends, or run the application with a lifespan."
            )
        if answer is Answer.COMPLETE:
            raise _nothing_to_hold_back(task)
        account.push(account.due, task if tasks._apart else tasks)
        if not tasks._home.loop.call_soon(self.pump):  # the loop has ended
            self.close_outside(task, TaskState.ABANDONED)
            self.pump()

    def cancel(self, task: DeferredTask) -> bool:
        return self.close_outside(task, TaskState.CANCELLED, waiting=True)

    def end(self, tasks: DeferredTasks, home: Home) -> bool:
        """Run the list of a request that has ended; return False if the home is closed."""
        tasks._ended_at = perf_counter()
        run, outcome = Run(self), tasks._outcome
        run.line, run.home, run.loop = tasks, home, home.loop
        clear = outcome is not None and outcome.success and not self.settings.observers
        if self.account.go(run, SUCCESS if clear else None):
            self._spawn(run)
            return True
        apart = self.account.end(tasks, home)
        if apart is None:
            return False
        if tasks._settled:  # all have ended already
            tasks._wind_up()
        if home.draining:
            self.expedite(tasks)
        for task in apart:
            self.account.push(self.account.due, task)
        self.pump()
        return True

    # Places, threads and native tasks

    def pump(self) -> None:
        """Start the tasks whose turn it is, as long as places are free. Safe from any thread."""
        account = self.account
        while account.due.first is not None or account.parked.first is not None:
            run = Run(self)
            while (turn := account.take(run)) is SKIPPED:
                continue
            if turn is NOBODY:
                return
            run.loop = run.home.loop
            if run.task._async:
                self._spawn(run)
            else:
                self._start_thread(run)

    def _spawn(self, run: Run) -> None:
        """Run a task in a native task of its event loop."""
        context = run.task._context
        if context is None:  # the task has just ended
            self._pass_on(run)
            return
        if run.loop.is_running_here():
            spawned = run.loop.spawn(run, context, run.task.name)
        else:
            spawned = run.loop.call_soon(self._arrive, run)
        if not spawned:
            self.close_outside(run.task, TaskState.ABANDONED)
            close_unawaited(run.returned)
            self._pass_on(run)

    def _arrive(self, run: Run) -> None:
        self._spawn(run)
        self.pump()

    def _start_thread(self, run: Run) -> None:
        """Run a task in a thread, and after it the tasks that may share its hop."""
        spare = not run.placed
        hop = [run]

        def job() -> None:
            self._run_hop(hop)

        def done() -> None:
            self.account.free_thread(spare=spare)
            while hop:
                self._pass_on(hop.pop())
            self.pump_urgent()
            self.pump()

        if run.task.timeout is not None and not spare:
            self._watch(run)
        try:
            self.threads.start(job, done)
        except RuntimeError as exc:  # the operating system allows fewer threads than we do
            self.account.free_thread(spare=spare)
            self.close_outside(run.task, FAILED, exc)
            self._pass_on(run)

    def _run_hop(self, hop: list[Run]) -> None:
        """In the thread: run the tasks of a hop, and leave in `hop` the run to release."""
        run = hop[0]
        try:
            while True:
                context = run.task._context
                if context is not None:
                    run.returned = context.run(self.call, run)
                if run.stop is not None:
                    run.loop.call_soon(run.stop)
                if run.returned is not None:
                    if not run.loop.call_soon(self._await, run):
                        close_unawaited(run.returned)
                        self.close_outside(run.task, TaskState.ABANDONED)
                        return
                    hop.clear()
                    return
                if run.line is None or run.given_up or run.task.timeout is not None or not self.account.follow(run):
                    return
        finally:
            del run, context  # see `Run.main`

    def call(self, run: Run) -> Awaitable[Any] | None:
        """In the thread and the task's context: run a sync task; return the awaitable it returned, if any."""
        if sniffio := sys.modules.get("sniffio"):  # the context names an event loop, and none runs in this thread
            sniffio.current_async_library_cvar.set(None)
        try:
            if not self.begin(run):
                return None
            returned = call_sync(run.task, self.settings.around)
        except BaseException as exc:
            self.finish(run, FAILED, exc)
        else:
            if returned is not None:
                return returned
            self.succeed(run)
        finally:
            del run  # see `Run.main`
        return None

    def _await(self, run: Run) -> None:
        """Await the awaitable that a sync task returned."""
        if run.task.state is RUNNING:
            self._spawn(run)
        else:
            close_unawaited(run.returned)
            self.release(run)

    def _watch(self, run: Run) -> None:
        """Start the timer of a sync task's timeout."""
        if not run.loop.is_running_here():
            run.loop.call_soon(self._watch, run)
        elif not run.released:
            run.stop = run.loop.call_later(run.task.timeout, self._expire, run)

    def _expire(self, run: Run) -> None:
        if run.native is None and self.close_outside(run.task, TaskState.TIMED_OUT, timed_out(run.task)):
            self.release(run)

    def release(self, run: Run) -> None:
        """End a run, and start the tasks whose turn it is now."""
        if not run.released:
            self._pass_on(run)
        self.pump()

    def _pass_on(self, run: Run) -> None:
        """Free a run's place, and queue the rest of its list."""
        if self.account.release(run) and run.then is not None:
            run.then()

    # Engines' tasks that nothing may hold up

    def enqueue(self, task: DeferredTask, home: Home | None, loop: Any, then: Callable[[], object]) -> None:
        """Run an engine's task ahead of everything that waits, then call `then`. Call it on the task's loop."""
        run = Run(self)
        run.task, run.home, run.loop, run.then = task, home, loop, then
        run.placed = False
        if not self.account.claim(run):
            self._pass_on(run)
        elif task._async:
            self._spawn(run)
        else:
            if task.timeout is not None:
                self._watch(run)
            self.account.push(self.account.urgent, run)
            self.pump_urgent()

    def pump_urgent(self) -> None:
        while (run := self.account.take_urgent()) is not None:
            self._start_thread(run)

    def expedite(self, tasks: DeferredTasks) -> None:
        """Enqueue a list's engine tasks now, one after the other. Call it on the list's loop."""
        waiting = iter([task for task in tasks if task.state is PENDING and task._enqueues])

        def following() -> None:
            task = next(waiting, None)
            home = tasks._home
            if task is not None and home is not None:
                self.enqueue(task, home, home.loop, following)

        runs = [task._run for task in tasks if task._enqueues]
        busy = [run for run in runs if run is not None and not run.released]
        if busy:
            busy[0].then = following  # the one that is being enqueued comes first
        else:
            following()

    # A task begins, and ends

    def begin(self, run: Run) -> bool:
        """In the task's context: start a task, or end it; return whether to call its function."""
        task = run.task
        tasks = task._list
        try:
            outcome = None if tasks is None else tasks._outcome
            wanted = outcome is None or lets_through(task.when, outcome)  # None: the durable barrier has decided
            if not wanted and outcome is not None:
                task._why = why_skipped(task.when, outcome)
        except BaseException as exc:
            self.finish(run, FAILED, exc)
            del run, task, tasks
            return False
        if not wanted:
            self.finish(run, TaskState.SKIPPED)
            return False
        observers = self.settings.observers
        if not self.account.begin(run, announce=bool(observers)):
            self._close(task, TaskState.ABANDONED, None, waiting=True)  # its home is closed, or the task has ended
            return False
        task._started = perf_counter()
        inside.set(task)
        if observers:
            report(task, RUNNING, observers)
            if not self.account.announced(task):
                run.given_up = True
                self.report_end(task)
                return False
        return True

    def finish(self, run: Run, state: TaskState, error: BaseException | None = None) -> None:
        """In the task's context: enter a final state, unless the task was given up in the meantime."""
        if self.account.close(run.task, state, error) is WON:
            self.report_end(run.task)
        else:
            run.given_up = True

    def succeed(self, run: Run) -> None:
        """In the task's context: enter SUCCEEDED, in one step if neither an observer nor the log wants to know."""
        task, left = run.task, None
        if is_quiet(self.settings.observers):
            task._let_go()  # first, as the task is settled then
            left = self.account.retire(run)
        if left is None:
            self.finish(run, SUCCEEDED)
            return
        tasks = task._list
        self.account.settled(task, left)
        if not left and tasks._ended:
            tasks._wind_up()

    def close_outside(
        self, task: DeferredTask, state: TaskState, error: BaseException | None = None, *, waiting: bool = False
    ) -> bool:
        """Outside the task's context: enter a final state, and return whether the task did. See `Account.close`."""
        context = task._context
        return context is not None and context.copy().run(self._close, task, state, error, waiting=waiting)

    def _close(
        self, task: DeferredTask, state: TaskState, error: BaseException | None, *, waiting: bool = False
    ) -> bool:
        closed = self.account.close(task, state, error, waiting=waiting)
        if closed is WON:
            self.report_end(task)
        return closed is not LOST

    def report_end(self, task: DeferredTask) -> None:
        """Report a task's end, settle the task, and release what it needed to run."""
        report(task, task.state, self.settings.observers)
        tasks = task._list
        if tasks._parked is task:
            self.account.unpark(task)
            if not tasks._home.loop.call_soon(self.pump):
                self.pump()
        task._let_go()
        if not self.account.settle(task) and tasks._ended:
            tasks._wind_up()


def check_durable(task: DeferredTask, *, kept: bool = False) -> None:
    """Refuse a task that cannot be durable. With `kept`, its job may stay in this process, as a test wants it."""
    if not task._enqueues:
        raise TypeError(
            f"durable=True stores a job with an engine, and {task.name!a} is a function that would run here. "
            "Make it a task of an engine, or leave durable out."
        )
    engine = recognise(task.func)
    if not kept and engine is not None and engine.keeps is not None and engine.keeps(task.func):
        raise TypeError(
            f"durable=True stores a job with an engine, and the backend of {task.name!a} keeps it in this process. "
            "Give the task a backend that stores, or leave durable out. In a test, use asgi_deferred.testing."
        )
    if task._list._scope.get("type") != "http":
        raise _nothing_to_hold_back(task)


def _nothing_to_hold_back(task: DeferredTask) -> DeferredError:
    return DeferredError(
        f"durable=True holds a response back until {task.name!a} is stored, and there is no response to hold back: "
        "it is not in an HTTP request, or the response is complete. Leave durable out, or await the engine's enqueue."
    )


schedulers: WeakSet[Scheduler] = WeakSet()


def _after_fork() -> None:
    """Reset every scheduler in a forked child: it has no threads, and a thread of the parent may hold the lock."""
    for scheduler in tuple(schedulers):
        for home in scheduler.account.homes.values():
            home.closed = True
        scheduler.reset()


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)
