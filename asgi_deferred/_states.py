"""What the account keeps: the states of tasks, the answers it gives, and its part of tasks, lists and homes."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple


class TaskState(Enum):
    """The states of a task: PENDING, RUNNING, then exactly one of the others."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    SKIPPED = "skipped"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"

    if not TYPE_CHECKING:
        # By identity, as they compare. Enum's own is Python code, and tasks are counted by state.
        __hash__ = object.__hash__


PENDING, RUNNING = TaskState.PENDING, TaskState.RUNNING
SUCCEEDED, CANCELLED = TaskState.SUCCEEDED, TaskState.CANCELLED


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


class Answer(Enum):
    """What became of a task that was to be accepted."""

    WAITS = "accepted, for the end of its request or the tasks before it"
    DUE = "accepted, and to be queued now"
    FULL = "refused: the backlog is full"
    CLOSED = "refused: nothing is left that could run it"
    COMPLETE = "refused: it is durable, and there is no response left to hold back"
    AGAIN = "not decided: another task took the key meanwhile"


class Closed(Enum):
    """What became of an attempt to close a task."""

    LOST = "it has ended, or is not what was to be closed"
    WON = "closed; its end is yours to report"
    ANNOUNCED = "closed; who is just reporting its start reports its end as well"


class Turn(Enum):
    """What came of looking whose turn it is."""

    NOBODY = "nobody waits, or no place is free"
    SKIPPED = "what came first has ended, or lacks a thread: look again"
    TAKEN = "a task has what it needs"


# Looked up at every task.
WAITS, AGAIN = Answer.WAITS, Answer.AGAIN
LOST, WON, ANNOUNCED = Closed.LOST, Closed.WON, Closed.ANNOUNCED
NOBODY, SKIPPED, TAKEN = Turn.NOBODY, Turn.SKIPPED, Turn.TAKEN


class Waiters:
    """Who is to be told when something has become true. Each looks again after it has put itself here."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: dict[Callable[[], object], None] = {}

    def add(self, wake: Callable[[], object]) -> None:
        self.waiting[wake] = None

    def discard(self, wake: Callable[[], object]) -> None:
        self.waiting.pop(wake, None)

    def wake(self) -> None:
        for wake in self.waiting.copy():
            self.waiting.pop(wake, None)
            wake()


class Home:
    """Where tasks run and who waits for them: the lifespans of an event loop, or one ASGI call without a lifespan."""

    __slots__ = ("closed", "draining", "drains", "ending", "entered", "loop", "over", "stop", "unsettled", "waiters")

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.entered = 1
        self.unsettled = 0
        self.drains = 0  # how many wait for its drain
        self.draining = False
        self.ending = False  # the drain's deadline is over, and its grace runs
        self.over = False  # the drain has given up
        self.closed = False
        self.stop: Callable[[], object] | None = None  # cancels the drain's timer
        self.waiters = Waiters()


class Entry:
    """What the account keeps of a task."""

    __slots__ = ("_hash", "_list", "_next", "durable", "error", "state")

    _list: Any  # the task's `Line`; None after it was settled, for then nothing may lead from it to its list
    _next: Any
    _hash: int | None
    durable: bool
    error: BaseException | None
    state: TaskState
    timeout: float | None
    _async: bool

    is_line = False


class Line:
    """What the account keeps of a task list. Most requests defer nothing: half of it comes with the first task."""

    is_line = True

    _all: Any  # a list of tasks; None before the first one, as the fields below are missing then
    _loop: Any  # the native event loop of its request
    _home: Home | None
    _ended: bool  # the request has
    _complete: bool  # the response is
    _durable: bool  # it has durable tasks
    _apart: bool  # each task on its own, and not one after the other

    _count: int  # of `_all`
    _position: int  # before it no task is PENDING
    _unsettled: int
    _ended_at: float  # when the request had ended; infinite before
    _active: bool
    _next: Any
    _parked: Any  # its task that waits for a thread, in the list's turn
    _keys: dict[int, tuple[Any, ...]] | None  # by a key's hash: the unsettled tasks that have it

    @property
    def _settled(self) -> bool:
        """Whether all tasks so far are."""
        return self._all is None or not self._unsettled


class Queue:
    """First in, first out: a chain of lists, or of tasks that run apart."""

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first: Any = None
        self.last: Any = None
