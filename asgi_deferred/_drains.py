"""How unfinished tasks come to an end: at shutdown, and when a call on a server without a lifespan is cancelled.

1. A drain is a flag, a deadline, and a step at the deadline, all on the event loop of the home. Code that waits for a
   drain can be cancelled, and can wait again.
2. A drain first enqueues the tasks of engines, without a place and in the order of each list. Nothing holds them up.
3. At the deadline, PENDING tasks and tasks in threads are ABANDONED at once. Native tasks are cancelled.
4. A native task that has not ended `GRACE` seconds later is given up: it is ABANDONED, although it still runs.
"""

from __future__ import annotations

from ._reports import log_abandoned
from ._scheduler import Scheduler, schedulers
from ._states import Home, TaskState
from ._tasks import DeferredTasks, current

GRACE = 1.0


def drain(scheduler: Scheduler, home: Home, seconds: float) -> None:
    """Begin to drain a home, unless its drain has begun. Call this and all of these on the home's event loop."""
    if home.draining:
        return
    home.draining = True
    if not home.ending:
        home.stop = home.loop.call_later(seconds, abandon, scheduler, home, seconds)
    for line in tuple(scheduler.account.lines):
        if line._home is home and line._ended and isinstance(line, DeferredTasks):
            scheduler.expedite(line)


def abandon(scheduler: Scheduler, home: Home, seconds: float | None = None) -> None:
    """End every unfinished task of a home. With `seconds`, log that this time is over."""
    account = scheduler.account
    if home.entered <= max(1, home.drains):
        home.closed = True
    left = account.unfinished(home)
    if seconds is not None and left:
        log_abandoned(seconds, left)
    for task in left:
        if scheduler.close_outside(task, TaskState.ABANDONED, waiting=True):
            continue
        run = task._run
        if run is None:
            continue
        if run.native is None:
            if scheduler.close_outside(task, TaskState.ABANDONED):
                scheduler.release(run)
        else:
            run.abandoned = True
            run.native.cancel()
    if not home.ending:  # or another caller already waits for the end of the grace period
        home.ending = True
        if home.stop is not None:
            home.stop()
        home.stop = home.loop.call_later(GRACE, give_up, scheduler, home)


def give_up(scheduler: Scheduler, home: Home) -> None:
    """Give up on native tasks that were cancelled and have not ended."""
    for task in scheduler.account.unfinished():
        run, tasks = task._run, task._list
        if run is None or not run.abandoned:
            continue
        here = run.home is home or (tasks is not None and tasks._home is home)  # a late task can move its list
        if here and scheduler.close_outside(task, TaskState.ABANDONED):
            scheduler.release(run)
    home.over = True
    home.waiters.wake()


def bury(scheduler: Scheduler, home: Home) -> None:
    """End every unfinished task of a home whose event loop has ended, so that nobody can wait for them."""
    home.closed = True
    for task in scheduler.account.unfinished(home):
        run = task._run
        if scheduler.close_outside(task, TaskState.ABANDONED) and run is not None:
            scheduler.release(run)


def rest(home: Home) -> None:
    """End a drain, unless other callers wait for it. Another drain can follow."""
    if home.drains:
        return
    if home.stop is not None:
        home.stop()
    home.stop = None
    home.draining = home.ending = home.over = False


def draining() -> bool:
    """Whether a shutdown has begun, so that a long loop should stop early.

    It is True from the start of the shutdown. On a server without a lifespan, it is True once the ASGI call was
    cancelled. Tasks are cancelled `drain_timeout` seconds later. You can call it in any thread. Without a current
    request, it is True if any runner in this process is draining.

    Example:
        ```python
        def reindex(documents: list[Document]) -> None:
            for document in documents:
                if draining():
                    break
                index(document)
        ```
    """
    home: Home | None = getattr(current.get(), "_home", None)  # a list has none before its first task
    if home is not None:
        return home.draining
    return any(home.draining for each in tuple(schedulers) for home in tuple(each.account.homes.values()))
