"""How what is left comes to an end: at shutdown, and when a call on a server without a lifespan is cancelled.

1. A drain is a flag, a deadline, and what follows at the deadline, all on the event loop of the home. Whoever waits
   for it may be cancelled, and may come back.
2. First the tasks of engines are enqueued, each list's in order, without a place. Nothing may hold those up.
3. At the deadline what is PENDING, and what is in a thread, is ABANDONED at once. Native tasks are cancelled.
4. What has not ended `GRACE` seconds after that is given up: it is ABANDONED, though it still runs.
"""

from __future__ import annotations

from ._reports import log_abandoned
from ._scheduler import Scheduler, schedulers
from ._states import Home, TaskState
from ._tasks import DeferredTasks, current

GRACE = 1.0


def drain(scheduler: Scheduler, home: Home, seconds: float) -> None:
    """Begin to drain a home, unless that has begun. On its loop, as all of these."""
    if home.draining:
        return
    home.draining = True
    if not home.ending:
        home.stop = home.loop.call_later(seconds, abandon, scheduler, home, seconds)
    for line in tuple(scheduler.account.lines):
        if line._home is home and line._ended and isinstance(line, DeferredTasks):
            scheduler.expedite(line)


def abandon(scheduler: Scheduler, home: Home, seconds: float | None = None) -> None:
    """End all that is unfinished in a home; with `seconds`, log that these are over."""
    account = scheduler.account
    if home.entered <= max(1, home.drains):
        home.closed = True
    left = account.unfinished(home)
    if seconds is not None and left:
        log_abandoned(seconds, left)
    for task in left:
        if scheduler.close_outside(task, TaskState.ABANDONED, waiting=True):
            continue
        run = account.running.get(task)
        if run is None:
            continue
        if run.native is None:
            if scheduler.close_outside(task, TaskState.ABANDONED):
                scheduler.release(run)
        else:
            run.abandoned = True
            run.native.cancel()
    if not home.ending:  # or others wait for the end of that grace
        home.ending = True
        if home.stop is not None:
            home.stop()
        home.stop = home.loop.call_later(GRACE, give_up, scheduler, home)


def give_up(scheduler: Scheduler, home: Home) -> None:
    """Give up on native tasks that were cancelled and have not ended."""
    for task, run in tuple(scheduler.account.running.items()):
        tasks = task._list
        here = run.home is home or (tasks is not None and tasks._home is home)  # a late task may have moved the list
        if here and run.abandoned and scheduler.close_outside(task, TaskState.ABANDONED):
            scheduler.release(run)
    home.over = True
    home.waiters.wake()


def bury(scheduler: Scheduler, home: Home) -> None:
    """End all that is unfinished in a home whose event loop is gone, so that nothing can be waited for."""
    home.closed = True
    for task in scheduler.account.unfinished(home):
        run = scheduler.account.running.get(task)
        if scheduler.close_outside(task, TaskState.ABANDONED) and run is not None:
            scheduler.release(run)


def rest(home: Home) -> None:
    """End a drain, unless others wait for it. Another may follow."""
    if home.drains:
        return
    if home.stop is not None:
        home.stop()
    home.stop = None
    home.draining = home.ending = home.over = False


def draining() -> bool:
    """Whether what runs this code is about to be stopped, so that a long loop had better end.

    It is True from the beginning of the shutdown, or, on a server without a lifespan, from the cancellation of the
    call. `drain_timeout` seconds later tasks are cancelled. You may call it in any thread. Where there is no current
    request, it speaks of all runners in this process.

    Example:
        ```python
        def reindex(documents: list[Document]) -> None:
            for document in documents:
                if draining():
                    break
                index(document)
        ```
    """
    tasks = current.get()
    if tasks is not None and tasks._home is not None:
        return tasks._home.draining
    return any(home.draining for each in tuple(schedulers) for home in tuple(each.account.homes.values()))
