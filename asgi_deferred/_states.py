"""The records of the account: task states, the answers it gives, and its share of each task, list and home."""

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
        # States compare by identity, so they can hash by identity. Enum's own hash is Python code, and slow.
        __hash__ = object.__hash__


PENDING, RUNNING = TaskState.PENDING, TaskState.RUNNING
SUCCEEDED, CANCELLED = TaskState.SUCCEEDED, TaskState.CANCELLED


class Statistics(NamedTuple):
    """Counts of a runner's tasks since it was created; `accepted` is the sum of all the others."""

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
    """The account's answer to a new task."""

    WAITS = "accepted: it waits for the end of its request, or for the tasks before it"
    DUE = "accepted: queue it now"
    FULL = "refused: the backlog is full"
    CLOSED = "refused: nothing is left that could run it"
    COMPLETE = "refused: it is durable, and no response is left to hold back"
    AGAIN = "undecided: another task took the key in the meantime, so ask again"


class Closed(Enum):
    """The account's answer to an attempt to close a task."""

    LOST = "it has already ended, or it is in another state than you asked for"
    WON = "closed: you report its end"
    ANNOUNCED = "closed: another thread is reporting its start, and will report its end too"


class Turn(Enum):
    """The account's answer to the question whose turn it is."""

    NOBODY = "nobody waits, or no place is free"
    SKIPPED = "the first in the queue has ended or lacks a thread: ask again"
    TAKEN = "a task has everything it needs"


# Module globals are faster than attributes of an Enum, and every task looks these up.
WAITS, AGAIN = Answer.WAITS, Answer.AGAIN
LOST, WON, ANNOUNCED = Closed.LOST, Closed.WON, Closed.ANNOUNCED
NOBODY, SKIPPED, TAKEN = Turn.NOBODY, Turn.SKIPPED, Turn.TAKEN


class Waiters:
    """Callbacks to call once a condition has become true. A waiter adds itself first, and then checks the condition."""

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
    """The place where tasks run: all lifespans of one event loop, or one ASGI call on a server without a lifespan."""

    __slots__ = ("closed", "draining", "drains", "ending", "entered", "loop", "over", "stop", "unsettled", "waiters")

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.entered = 1
        self.unsettled = 0
        self.drains = 0  # how many callers wait for its drain
        self.draining = False
        self.ending = False  # the deadline of the drain has passed, and the grace period runs
        self.over = False  # the drain has given up
        self.closed = False
        self.stop: Callable[[], object] | None = None  # cancels the drain's timer
        self.waiters = Waiters()


class Entry:
    """The account's share of a task."""

    __slots__ = ("_hash", "_list", "_next", "_run", "durable", "error", "state")

    _list: Any  # the task's `Line`; None once the task is settled, so that an ended task keeps nothing alive
    _next: Any
    _run: Any  # the run that has the task, from its turn to its end
    _hash: int | None
    durable: bool
    error: BaseException | None
    state: TaskState
    timeout: float | None
    when: Any
    _async: bool

    is_line = False


class Line:
    """The account's share of a task list. Most requests defer nothing, so half of it appears with the first task."""

    is_line = True

    _all: Any  # a list of tasks; None before the first task
    _loop: Any  # the native event loop of its request
    _ended: bool  # the request has ended
    _complete: bool  # the response is complete
    _durable: bool  # the list has durable tasks
    _apart: bool  # its tasks run independently, not one after the other

    # These are missing until the first task comes.
    _home: Home | None
    _count: int  # the length of `_all`
    _position: int  # the index of the task whose turn comes next
    _unsettled: int
    _active: bool
    _ended_at: float  # when the request ended; infinite until then

    # Few lists have these. CPython reads and writes a field faster if its class has no default for it.
    _next: Any = None
    _parked: Any = None  # the task that has the list's turn, and waits for a thread
    _keys: dict[int, tuple[Any, ...]] | None = None  # the unsettled tasks with a key, by the key's hash

    @property
    def _settled(self) -> bool:
        """Whether every task so far is settled."""
        return self._all is None or not self._unsettled


class Queue:
    """First in, first out: a chain of lists, and of tasks that run independently of their list."""

    __slots__ = ("first", "last")

    def __init__(self) -> None:
        self.first: Any = None
        self.last: Any = None
