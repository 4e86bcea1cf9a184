"""The account of every task: its state, the counts, the limits, and what is left to do.

1. An accepted task is in exactly one state. `pending`, `active` and `ended` have how many are in each, and their sum is
   what was accepted.
2. A task enters a final state once. The first to close it wins. Everybody else is told so, and does nothing.
3. A task is *settled* when its end has been reported. Whoever waits for tasks to end waits for that.
4. A list is *active* from the end of its request, or from a late task, until no task of it is PENDING. While it is
   active it is in the queue, or it belongs to the run that took it from there, or to a task of it that is parked. So
   its tasks run one at a time.
5. Nothing of the user's runs while the lock is held. Python runs finalisers and signal handlers where a function is
   called, where a loop jumps back and, before 3.12, where a container is made. So what is under the lock is a straight
   line: no call, no loop, no new container, and no last reference to anything of the user's is dropped.
   The lock is re-entrant, in case Python one day finds another place.
6. These are read without the lock: `state` and `_ended`, where what follows looks again under the lock or holds for
   any value; `first` of a queue, as whoever adds to a queue looks for its turn afterwards; `unsettled`, which a waiter
   reads after it has said that it waits, and whether anybody `waiting` is there, which is read after that count has
   changed; whether the limit is passed, where one task too many or too few does no harm; `closed` and `draining`;
   `_all`, as a list is opened once. Each is one attribute or item, read and written as a whole, with the GIL and
   without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from threading import RLock
from typing import Any

from ._states import (
    AGAIN,
    ANNOUNCED,
    CANCELLED,
    LOST,
    NOBODY,
    PENDING,
    RUNNING,
    SKIPPED,
    SUCCEEDED,
    TAKEN,
    WAITS,
    WON,
    Answer,
    Closed,
    Home,
    Line,
    Queue,
    Statistics,
    TaskState,
    Turn,
    Waiters,
)

KEPT = 64  # tasks that have ended and that a list still shows


class Account:
    def __init__(self, places: float, threads: float, limit: float) -> None:
        self.lock = RLock()
        self.places = places
        self.threads = threads
        self.limit = limit
        self.pending = 0
        self.active = 0  # RUNNING
        self.ended = dict.fromkeys(TaskState, 0)  # by final state
        self.unsettled = 0
        self.lines: dict[Line, None] = {}  # those with unsettled tasks
        self.running: dict[Any, Any] = {}  # tasks that run or are about to, and how each of them does
        self.announcing: dict[Any, None] = {}  # those whose start is being reported
        self.due = Queue()
        self.parked = Queue()  # tasks that came before those that are due; a thread is all they lack
        self.spare = threads  # for engines' tasks that nothing may hold up,
        self.urgent = Queue()  # and those of them that wait for one
        self.homes: dict[Any, Home] = {}  # those of lifespans, by event loop
        self.idle = Waiters()
        self.room = Waiters()

    # A task is accepted

    def accept(self, task: Any, limit: int | None, rival: Any, seen: tuple[Any, ...]) -> tuple[Answer, bool]:
        """Enter a task, and close `rival`, the PENDING one of the same key; return also whether that was so.

        `seen` are the tasks whose key had the same hash when the rival was looked for.
        """
        line: Line = task._list
        live = self.homes.get(line._loop)
        tasks: list[Any] = []
        one = (task,)
        keys: dict[int, tuple[Any, ...]] = {}
        key, replaces = task._hash, False
        bucket = one if key is None else (*(other for other in seen if other is not rival), task)
        before: Home | None = None  # which the list has left
        answer = WAITS
        with self.lock:
            if line._all is None:
                line._count = line._position = line._unsettled = 0
                line._ended_at = 0.0 if line._ended else inf
                line._active = False
                line._next = line._parked = line._keys = None
                line._all = tasks  # last, as it is looked at without the lock
            if key is not None:
                if line._keys is None:
                    line._keys = keys
                keys = line._keys
                if (keys[key] if key in keys else ()) is not seen:  # noqa: SIM401
                    return AGAIN, False
                replaces = rival is not None and rival.state is PENDING
            if limit is not None and self.pending + self.active - replaces >= limit:
                return Answer.FULL, False
            line._all += one
            line._count += 1
            ended = line._ended  # looked at after that: a request without tasks ends without taking the lock
            home = line._home
            if home is None or home.closed:
                home = live if live is not None and not live.closed else None
            if (ended and home is None) or (task.durable and (ended or line._complete)):
                del line._all[-1]
                line._count -= 1
                return Answer.COMPLETE if task.durable else Answer.CLOSED, False
            if home is not line._home:
                before = line._home
                if before is not None:
                    before.unsettled -= line._unsettled
                if home is not None:
                    home.unsettled += line._unsettled
                line._home = home
            if rival is not None and replaces:
                rival.state = CANCELLED
                if rival in self.running:  # it was about to run
                    run = self.running[rival]  # noqa: F841 - as in `close`
                    del self.running[rival]
                self.pending -= 1
                self.ended[CANCELLED] += 1
            if key is not None:
                keys[key] = bucket
            self.pending += 1
            self.unsettled += 1
            self.lines[line] = None
            line._unsettled += 1
            if home is not None:
                home.unsettled += 1
            if task.durable:
                line._durable = True
            if ended and (line._apart or not line._active):
                line._active = True
                answer = Answer.DUE
        if before is not None:
            before.waiters.wake()
        return answer, replaces

    def rival(self, task: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the task of the same key in the task's list, and all tasks with that hash. Raises what `==` raises."""
        line: Line = task._list
        keys = None if line._all is None else line._keys
        seen = keys.get(task._hash, ()) if keys is not None else ()
        return next((other for other in seen if other.key == task.key), None), seen

    # Turns and places

    def end(self, line: Line, home: Home) -> Sequence[Any] | None:
        """Let a list's tasks run in `home`, and queue the list; return None if that is closed.

        Tasks that run apart are returned, for the caller to queue. Those added later are DUE, and not among them.
        """
        queue = self.due
        with self.lock:
            if home.closed:
                return None
            line._ended = True
            if line._all is None:
                return ()
            apart, tasks, count = line._apart, line._all, line._count
            before = line._home
            if before is not home:
                if before is not None:
                    before.unsettled -= line._unsettled
                home.unsettled += line._unsettled
                line._home = home
            if not line._active and not apart:
                line._active = True
                if queue.last is None:
                    queue.first = line
                else:
                    queue.last._next = line
                queue.last = line
        if before is not None and before is not home:
            before.waiters.wake()
        return tasks[:count] if apart else ()

    def go(self, line: Line, home: Home, run: Any) -> bool:
        """Do what `end` and then `take` would do for a list's first task, if that is async and nothing waits.

        It is what most requests need. Return False, with nothing done, if more is to be considered.
        """
        with self.lock:
            if line._all is None or line._position == line._count or line._home is not home:
                return False
            if line._apart or line._active or home.closed or home.draining:
                return False
            task = line._all[line._position]
            if not task._async or task.state is not PENDING or task in self.running:
                return False
            if not self.places or self.due.first is not None or self.parked.first is not None:
                return False
            line._ended = line._active = True
            self.places -= 1
            self.running[task] = run
            run.task = task
            run.line = line
            run.home = home
            return True

    def push(self, queue: Queue, entry: Any) -> None:
        with self.lock:
            if queue.last is None:
                queue.first = entry
            else:
                queue.last._next = entry
            queue.last = entry

    def take(self, run: Any) -> Turn:
        """Give a place, and to a sync task a thread, to the task whose turn it is, and say that `run` runs it."""
        with self.lock:
            parked = self.threads > 0 and self.parked.first is not None
            queue = self.parked if parked else self.due
            entry = queue.first
            if entry is None or not self.places:
                return NOBODY
            line = task = None
            if entry.is_line:
                line = entry
                if line._position < line._count:
                    task = line._all[line._position]
                    if task.state is not PENDING or task in self.running:
                        line._position += 1
                        return SKIPPED
            elif entry.state is PENDING and entry not in self.running:
                task = entry
            queue.first = entry._next
            entry._next = None
            if queue.first is None:
                queue.last = None
            if task is None:
                if line is not None:
                    line._active = False
                return SKIPPED
            tasks = task._list
            if not task._async:
                if not self.threads:
                    if line is not None:
                        line._parked = task
                    if self.parked.last is None:
                        self.parked.first = task
                    else:
                        self.parked.last._next = task
                    self.parked.last = task
                    return SKIPPED
                self.threads -= 1
                if parked and tasks._parked is task:
                    tasks._parked = None
                    line = tasks
            self.places -= 1
            self.running[task] = run
            run.task = task
            run.line = line
            run.home = tasks._home
            return TAKEN

    def unpark(self, task: Any) -> None:
        """Queue the list of a task that has ended without the thread it waited for."""
        line: Line = task._list
        line._parked = None  # nobody else looks at it: the list has its turn until it is queued
        self.push(self.due, line)

    def follow(self, run: Any) -> bool:
        """Let a run that keeps its place and thread go on to the next task of its list, if that is like its last."""
        line = run.line
        with self.lock:
            position = line._position
            if position < line._count and line._all[position] is run.task:
                position += 1
                line._position = position
            if position == line._count:
                return False
            task = line._all[position]
            if task.state is not PENDING or task in self.running or task._async or task.timeout is not None:
                return False
            self.running[task] = run
            run.task = task
            return True

    def claim(self, run: Any) -> bool:
        """Say that `run` runs its task; return False if that has ended, or another does."""
        task = run.task
        with self.lock:
            if task.state is not PENDING or task in self.running:
                return False
            self.running[task] = run
            return True

    def release(self, run: Any) -> bool:
        """Give back a run's place, and queue the rest of its list; return whether it had not been released before."""
        line, queue = run.line, self.due
        with self.lock:
            if run.released:
                return False
            run.released = True
            if run.placed:
                self.places += 1
            if line is not None:
                if line._position < line._count and line._all[line._position] is run.task:
                    line._position += 1
                if line._position == line._count:
                    line._active = False
                elif queue.last is None:
                    queue.first = queue.last = line
                else:
                    queue.last._next = line
                    queue.last = line
            return True

    def take_urgent(self) -> Any:
        """Give a spare thread to the run whose turn it is."""
        with self.lock:
            run = self.urgent.first
            if run is None or not self.spare:
                return None
            self.urgent.first = run._next
            run._next = None
            if self.urgent.first is None:
                self.urgent.last = None
            self.spare -= 1
            return run

    def free_thread(self, *, spare: bool) -> None:
        with self.lock:
            if spare:
                self.spare += 1
            else:
                self.threads += 1

    # A task runs, and ends

    def begin(self, run: Any, *, announce: bool) -> bool:
        """Enter RUNNING, if a claimed task is PENDING and its home open. With `announce`, `announced` has to follow."""
        task = run.task
        with self.lock:
            if task.state is not PENDING or (run.home is not None and run.home.closed):
                return False
            task.state = RUNNING
            self.pending -= 1
            self.active += 1
            if announce:
                self.announcing[task] = None
            return True

    def announced(self, task: Any) -> bool:
        """Note that the start was reported; return whether the task still runs. If not, its end is to be reported."""
        with self.lock:
            del self.announcing[task]
            return task.state is RUNNING

    def close(
        self, task: Any, state: TaskState, error: BaseException | None = None, *, waiting: bool = False
    ) -> Closed:
        """Enter a final state, unless the task has one (with `waiting`: unless it is not PENDING)."""
        with self.lock:
            before = task.state
            if before is not PENDING and (waiting or before is not RUNNING):
                return LOST
            if task in self.running:
                run = self.running[task]  # noqa: F841 - its last reference is dropped after the lock
                del self.running[task]
            if before is PENDING:
                self.pending -= 1
            else:
                self.active -= 1
            self.ended[state] += 1
            task.state = state
            task.error = error
            return ANNOUNCED if task in self.announcing else WON

    def settle(self, task: Any) -> bool:
        """Note that the end of a task was reported; return whether that was the last of its list."""
        line: Line = task._list
        with self.lock:
            self.unsettled -= 1
            line._unsettled -= 1
            home = line._home
            if home is not None:
                home.unsettled -= 1
            last = not line._unsettled
            if last:
                del self.lines[line]
        self.settled(task, line, home)
        return last

    def retire(self, run: Any) -> bool | None:
        """Do what `close`, `settle` and `release` would do for a task that has succeeded; `settled` has to follow.

        It is for tasks of whose end nobody is told. Return whether it was the last of its list; None, with nothing
        done, if somebody has given up on it.
        """
        task, line, queue = run.task, run.line, self.due
        with self.lock:
            if (line is None or line._position == line._count or line._all[line._position] is not task) or (
                task.state is not RUNNING or run.released or run.then is not None
            ):
                return None
            task.state = SUCCEEDED
            del self.running[task]
            self.active -= 1
            self.ended[SUCCEEDED] += 1
            self.unsettled -= 1
            line._unsettled -= 1
            home: Any = line._home
            home.unsettled -= 1
            last = not line._unsettled
            if last:
                del self.lines[line]
            run.released = True
            self.places += 1
            line._position += 1
            if line._position == line._count:
                line._active = False
            elif queue.last is None:
                queue.first = queue.last = line
            else:
                queue.last._next = line
                queue.last = line
            return last

    def settled(self, task: Any, line: Line, home: Home | None) -> None:
        """Let go of a task that was settled, and wake who waited for that."""
        if task._hash is not None:
            self._forget_key(line, task)
        task._list = None
        if home is not None and home.waiters.waiting and not home.unsettled:
            home.waiters.wake()
        if self.idle.waiting and not self.unsettled:
            self.idle.wake()
        if self.room.waiting and not self.is_over_limit():
            self.room.wake()

    def _forget_key(self, line: Line, task: Any) -> None:
        keys: Any = line._keys
        while True:
            seen = keys.get(task._hash, ())
            bucket = tuple(other for other in seen if other is not task)
            with self.lock:
                if (keys[task._hash] if task._hash in keys else ()) is seen:  # noqa: SIM401
                    if bucket:
                        keys[task._hash] = bucket
                    elif seen:
                        del keys[task._hash]
                    return

    # A list's tasks

    def rearrange(self, line: Line, arrange: Callable[[list[Any]], list[Any]]) -> None:
        """Replace the tasks that a list has not come to by what `arrange` makes of them."""
        while True:
            with self.lock:
                tasks, count, position = line._all, line._count, line._position
            done = tasks[:position]
            new = arrange(tasks[position:count])
            done += new
            size = len(new) + position
            with self.lock:
                if line._all is tasks and line._count == count and line._position == position:
                    line._all, line._count = done, size
                    return

    def prune(self, line: Line) -> None:
        """Let a list forget tasks that have ended, but for the last few."""
        if line._count <= KEPT + 2 * line._unsettled:
            return
        with self.lock:
            tasks, count, position = line._all, line._count, line._position
        seen = tasks[:count]
        ended = [index for index, task in enumerate(seen) if task.state not in (PENDING, RUNNING)]
        dropped = {*ended[: -KEPT // 2]}
        kept = [task for index, task in enumerate(seen) if index not in dropped]
        size = len(kept)
        passed = position - sum(index < position for index in dropped)
        with self.lock:
            if line._all is tasks and line._count == count and line._position == position:
                line._all, line._count, line._position = kept, size, passed

    # Homes

    def enter(self, loop: Any, home: Home) -> Home:
        """Enter the home of an event loop's lifespans; make it `home` if there is none, or only one that ends."""
        with self.lock:
            if loop in self.homes and not self.homes[loop].closed:
                home = self.homes[loop]
                home.entered += 1
            else:
                self.homes[loop] = home
            return home

    def shut(self, home: Home) -> bool:
        """Return whether a home is empty or given up; if nobody else has entered it, it takes no more tasks then."""
        with self.lock:
            if home.unsettled and not home.over:
                return False
            home.closed |= home.entered == 1
            return True

    def leave(self, loop: Any, home: Home) -> None:
        with self.lock:
            home.entered -= 1
            if not home.entered:
                home.closed = True
                if loop in self.homes and self.homes[loop] is home:
                    del self.homes[loop]

    def unfinished(self, home: Home | None = None) -> list[Any]:
        """Return what is PENDING or RUNNING in a home, or in all."""
        lines = [line for line in tuple(self.lines) if home is None or line._home is home]
        return [task for line in lines for task in tuple(line._all) if task.state in (PENDING, RUNNING)]

    def is_over_limit(self) -> bool:
        return self.pending + self.active > self.limit

    def statistics(self) -> Statistics:
        ended = self.ended
        with self.lock:
            pending, running, succeeded = self.pending, self.active, ended[TaskState.SUCCEEDED]
            failed, timed_out = ended[TaskState.FAILED], ended[TaskState.TIMED_OUT]
            skipped, cancelled, abandoned = ended[TaskState.SKIPPED], ended[CANCELLED], ended[TaskState.ABANDONED]
        states = (pending, running, succeeded, failed, timed_out, skipped, cancelled, abandoned)
        return Statistics(sum(states), *states)
