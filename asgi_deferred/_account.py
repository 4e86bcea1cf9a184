"""The account of every task: its state, the counts, the limits, and what is left to do.

1. An accepted task is in exactly one state. `pending`, `active` and `ended` count the tasks in each state. Their sum
   is the number of accepted tasks.
2. A task enters a final state once. The first caller to close it wins. Every other caller learns that it lost, and
   does nothing.
3. A task is *settled* once its end has been reported. Code that waits for tasks to end waits until they are settled.
4. A list is *active* from the end of its request, or from a late task on, until none of its tasks is PENDING. An
   active list is in the queue, or belongs to the run that took it from the queue, or to one of its tasks that is
   parked. So the tasks of a list run one at a time.
5. No code of the user's runs while the lock is held. Python can run finalisers and signal handlers at a function call,
   at the end of a loop's round and, before 3.12, when it creates a container. So code under the lock is a straight
   line: no call, no loop, no new container. It never drops the last reference to an object of the user's.
   The lock is re-entrant all the same, in case a future Python adds another such place.
6. Some fields are read without the lock. Each is one attribute or item, which Python reads and writes as a whole, with
   the GIL and without:
   - `state` and `_ended`: the code that follows checks again under the lock, or is right for any value;
   - `first` of a queue: whoever adds to a queue looks for its turn afterwards;
   - `lines` and `unsettled`: a waiter reads them after it has added itself to the waiters;
   - `waiting` of the waiters: it is read after the count has changed;
   - the limit: one task too many or too few does no harm;
   - `closed` and `draining`: they are flags, and a caller that reads one too early could have come earlier;
   - `_all`: it is set once, as the last field of a list that is opened.
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

KEPT = 64  # how many ended tasks a list still shows


class Account:
    def __init__(self, places: float, threads: float, limit: float) -> None:
        self.lock = RLock()
        self.places = places
        self.threads = threads
        self.limit = limit
        self.pending = 0
        self.active = 0  # RUNNING
        self.ended = dict.fromkeys(TaskState, 0)  # by final state
        self.lines: dict[Line, None] = {}  # those with unsettled tasks
        self.announcing: dict[Any, None] = {}  # tasks whose start is being reported
        self.due = Queue()
        self.parked = Queue()  # tasks that came before those in `due`, and lack only a thread
        self.spare = threads  # free threads for engines' tasks that nothing may hold up
        self.urgent = Queue()  # the engines' tasks that wait for one of those threads
        self.homes: dict[Any, Home] = {}  # the homes of lifespans, by event loop
        self.idle = Waiters()
        self.room = Waiters()

    # A task is accepted

    def accept(
        self,
        task: Any,
        limit: int | None,
        rival: Any = None,
        seen: tuple[Any, ...] | None = None,
        keys: dict[int, Any] | None = None,
    ) -> tuple[Answer, bool]:
        """Enter a task, and return whether its rival was cancelled.

        If the task has a key, `rival`, `seen` and `keys` are from the method `rival`. A rival that is PENDING is
        cancelled, and the caller reports its end.
        """
        line: Line = task._list
        live = self.homes.get(line._loop)
        tasks = [task]
        before: Home | None = None  # the home that the list leaves
        answer, replaces = WAITS, False
        with self.lock:
            if seen is not None:
                known = line._keys
                if (() if known is None or task._hash not in known else known[task._hash]) is not seen:
                    return AGAIN, False
                replaces = rival is not None and rival.state is PENDING
            if limit is not None and self.pending + self.active - replaces >= limit:
                return Answer.FULL, False
            # The task is in its list before `_ended` is read: a request without tasks ends without taking the lock.
            if line._all is None:
                line._home = live
                line._count = 1
                line._position = line._unsettled = 0
                line._active = False
                line._ended_at = inf
                line._all = tasks  # last, because it is read without the lock
            else:
                line._all += tasks
                line._count += 1
            home = line._home
            if home is None or home.closed:
                home = live if live is not None and not live.closed else None
            if task.durable:
                if line._ended or line._complete:
                    del line._all[-1]
                    line._count -= 1
                    return Answer.COMPLETE, False
                line._durable = True
            if line._ended:
                if home is None:
                    del line._all[-1]
                    line._count -= 1
                    return Answer.CLOSED, False
                if line._ended_at == inf:  # it ended without a task
                    line._ended_at = 0.0
                if line._apart or not line._active:
                    line._active = True
                    answer = Answer.DUE
            if home is not line._home:
                before = line._home
                if before is not None:
                    before.unsettled -= line._unsettled
                if home is not None:
                    home.unsettled += line._unsettled
                line._home = home
            if keys is not None:
                if line._keys is None:
                    line._keys = keys
                else:
                    line._keys[task._hash] = keys[task._hash]
                if rival is not None and replaces:
                    run = rival._run  # noqa: F841 - as in `close`
                    rival._run = None
                    rival.state = CANCELLED
                    self.pending -= 1
                    self.ended[CANCELLED] += 1
            self.pending += 1
            self.lines[line] = None
            line._unsettled += 1
            if home is not None:
                home.unsettled += 1
        if before is not None:
            before.waiters.wake()
        return answer, replaces

    def rival(self, task: Any) -> tuple[Any, tuple[Any, ...], dict[int, Any]]:
        """Look for the task in the same list that has the same key; return it, and what `accept` needs.

        Raises what the `==` of a key raises.
        """
        line: Line = task._list
        keys = line._keys
        seen: tuple[Any, ...] = keys.get(task._hash, ()) if keys is not None else ()
        rival = next((other for other in seen if other.key == task.key), None)
        return rival, seen, {task._hash: (*(other for other in seen if other is not rival), task)}

    # Turns and places

    def end(self, line: Line, home: Home) -> Sequence[Any] | None:
        """Let a list's tasks run in `home`, and queue the list; return None if the home is closed.

        Return the tasks that run independently, for the caller to queue. Later ones are DUE when they are added.
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

    def go(self, run: Any, rule: str | None) -> bool:
        """Do `end` and `take` in one step for a list whose first task is async, and `begin` if its `when` is `rule`.

        Most requests end this way. If anything else waits, or the home has changed or drains, do nothing and return
        False. `rule` is compared by identity, as the `==` of a `when` may be code of the user's.
        """
        line, home = run.line, run.home
        with self.lock:
            if line._all is None or not line._count or line._home is not home or home.closed or home.draining:
                return False
            task = line._all[0]
            if line._apart or not task._async or task.state is not PENDING or task._run is not None:
                return False
            if not self.places or self.due.first is not None or self.parked.first is not None:
                return False
            line._ended = line._active = True
            line._position = 1
            self.places -= 1
            run.task = task
            task._run = run
            if task.when is rule:
                task.state = RUNNING
                self.pending -= 1
                self.active += 1
            return True

    def push(self, queue: Queue, entry: Any) -> None:
        with self.lock:
            if queue.last is None:
                queue.first = entry
            else:
                queue.last._next = entry
            queue.last = entry

    def take(self, run: Any) -> Turn:
        """Give a place, and a thread if it is sync, to the task whose turn it is, and let `run` run it."""
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
                    line._position += 1
                    if task.state is not PENDING or task._run is not None:
                        return SKIPPED
            elif entry.state is PENDING and entry._run is None:
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
            task._run = run
            run.task = task
            run.line = line
            run.home = tasks._home
            return TAKEN

    def unpark(self, task: Any) -> None:
        """Queue the list of a task that ended while it waited for a thread."""
        line: Line = task._list
        line._parked = None  # no lock is needed: the list keeps its turn until it is queued
        self.push(self.due, line)

    def follow(self, run: Any) -> bool:
        """Let a run keep its place and thread for the next task of its list, if that is a sync task without timeout."""
        line = run.line
        with self.lock:
            if line._position == line._count:
                return False
            task = line._all[line._position]
            if task.state is not PENDING or task._run is not None or task._async or task.timeout is not None:
                return False
            line._position += 1
            task._run = run
            run.task = task
            return True

    def claim(self, run: Any) -> bool:
        """Note that `run` runs its task; return False if the task has ended, or another run has it."""
        task = run.task
        with self.lock:
            if task.state is not PENDING or task._run is not None:
                return False
            task._run = run
            return True

    def release(self, run: Any) -> bool:
        """Free a run's place, and queue the rest of its list; return False if that has been done before."""
        line, queue = run.line, self.due
        with self.lock:
            if run.released:
                return False
            run.released = True
            if run.placed:
                self.places += 1
            if line is not None:
                if line._position == line._count:
                    line._active = False
                elif queue.last is None:
                    queue.first = queue.last = line
                else:
                    queue.last._next = line
                    queue.last = line
            return True

    def take_urgent(self) -> Any:
        """Give a spare thread to the first run that waits for one."""
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
        """Enter RUNNING if a claimed task is PENDING and its home is open. With `announce`, call `announced` later."""
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
        """Note that the start was reported; return whether the task still runs. If it does not, report its end."""
        with self.lock:
            del self.announcing[task]
            return task.state is RUNNING

    def close(
        self, task: Any, state: TaskState, error: BaseException | None = None, *, waiting: bool = False
    ) -> Closed:
        """Enter a final state, unless the task is in one. With `waiting`, only a PENDING task is closed."""
        with self.lock:
            before = task.state
            if before is not PENDING and (waiting or before is not RUNNING):
                return LOST
            run = task._run  # noqa: F841 - its last reference is dropped after the lock
            task._run = None
            if before is PENDING:
                self.pending -= 1
            else:
                self.active -= 1
            self.ended[state] += 1
            task.state = state
            task.error = error
            return ANNOUNCED if task in self.announcing else WON

    def settle(self, task: Any) -> int:
        """Note that the end of a task was reported; return how many tasks of its list are unsettled."""
        line: Line = task._list
        with self.lock:
            line._unsettled -= 1
            home = line._home
            if home is not None:
                home.unsettled -= 1
            left = line._unsettled
            if not left:
                del self.lines[line]
        self.settled(task, left)
        return left

    def retire(self, run: Any) -> int | None:
        """Do `close` and `settle` in one step for a task that has succeeded. Call `settled` afterwards.

        If the task has a native task, do `release` as well. A thread may have more tasks to run in the same place.

        It is for a task whose end nobody observes. Return how many tasks of its list are unsettled. If the task was
        given up in the meantime, do nothing and return None.
        """
        task, queue = run.task, self.due
        line: Line = task._list
        with self.lock:
            if task.state is not RUNNING or run.then is not None:  # then it has no place, or another run waits for it
                return None
            task.state = SUCCEEDED
            task._run = None
            self.active -= 1
            self.ended[SUCCEEDED] += 1
            line._unsettled -= 1
            home = line._home
            if home is not None:
                home.unsettled -= 1
            left = line._unsettled
            if not left:
                del self.lines[line]
            if run.native is None:
                return left
            run.released = True
            self.places += 1
            if run.line is not None:
                if line._position == line._count:
                    line._active = False
                elif queue.last is None:
                    queue.first = queue.last = line
                else:
                    queue.last._next = line
                    queue.last = line
            return left

    def settled(self, task: Any, left: int) -> None:
        """Detach a settled task from its list, and wake the waiters whose condition is now true."""
        line: Line = task._list
        if task._hash is not None:
            self._forget_key(line, task)
        task._list = None
        if not left:
            home = line._home
            if home is not None and home.waiters.waiting and not home.unsettled:
                home.waiters.wake()
            if self.idle.waiting and not self.lines:
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
        """Replace the tasks that a list has not reached by what `arrange` returns for them."""
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
        """Let a list forget its ended tasks, except for the last few."""
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
        """Enter the home of an event loop's lifespans; it becomes `home` if the loop has no open one."""
        with self.lock:
            if loop in self.homes and not self.homes[loop].closed:
                home = self.homes[loop]
                home.entered += 1
            else:
                self.homes[loop] = home
            return home

    def shut(self, home: Home) -> bool:
        """Return whether a home is empty or given up; close it then, unless another entry still uses it."""
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
        """Return the PENDING and RUNNING tasks of a home, or of all homes."""
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
