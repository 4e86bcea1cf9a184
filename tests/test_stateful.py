"""G2 as a state machine: whatever is done in whatever order, every accepted task ends exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.from_thread
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asgi_deferred import (
    BacklogFull,
    DeferredMiddleware,
    DeferredTask,
    DeferredTasks,
    Runner,
    RunnerClosed,
    TaskEvent,
    TaskState,
    tasks_from,
)
from asgi_deferred._outcome import WHEN

from .conftest import BACKENDS
from .support import OK, http_scope, no_more_messages

KINDS = ["note", "note_sync", "wait", "fail", "fail_sync", "nest", "nest_sync", "yield_forever", "returns_awaitable"]


class Request:
    """A request that stays open until it is told to end."""

    def __init__(self) -> None:
        self.tasks: DeferredTasks | None = None
        self.end = anyio.Event()
        self.how = ""
        self.scope = anyio.CancelScope()
        self.ended = False


class Machine(RuleBasedStateMachine):
    """Requests, tasks, lifespans, cancellations and threads in any order, on one event loop in another thread."""

    backend: tuple[str, dict[str, Any]]

    @initialize(
        live=st.booleans(),
        concurrent=st.booleans(),
        limits=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        overflow=st.sampled_from(["wait", "reject"]),
    )
    def start(self, *, live: bool, concurrent: bool, limits: tuple[int, int], overflow: Any) -> None:
        self.events: list[tuple[DeferredTask, TaskState]] = []
        self.accepted: list[DeferredTask] = []
        self.requests: list[Request] = []
        self.called: Counter[str] = Counter()
        self.runner = Runner(
            max_concurrency=limits[0],
            max_threads=limits[1],
            max_pending=12,
            overflow=overflow,
            concurrent=concurrent,
            drain_timeout=0.05,
            observers=[self.observe],
        )
        self.app = DeferredMiddleware(self.serve, self.runner)
        self.go: anyio.Event | None = None
        self.loop = portal(*self.backend)
        self.portal = self.loop.__enter__()
        self.group = self.portal.wrap_async_context_manager(self.portal.call(anyio.create_task_group))
        self.spawn = self.group.__enter__().start_soon
        self.lifespan: Any = None
        self.portal.call(self.renew)
        if live:
            self.enter_lifespan()

    async def renew(self) -> None:
        self.go = anyio.Event()

    def observe(self, event: TaskEvent) -> None:
        self.events.append((event.task, event.state))

    # The application

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        request = scope["request"]
        request.tasks = tasks_from(scope)
        await request.end.wait()
        if request.how == "fail":
            raise ValueError(request.how)
        for message in OK:
            await send(message)

    async def call(self, request: Request) -> None:
        with request.scope:
            try:
                await self.app(http_scope(request=request), no_more_messages, self.discard)
            except ValueError:
                pass
        request.ended = True

    async def discard(self, message: Any) -> None: ...

    # The tasks

    def function(self, kind: str, tasks: Any) -> Callable[..., Any]:
        async def note() -> None:
            self.called[kind] += 1

        def note_sync() -> None:
            self.called[kind] += 1

        async def wait() -> None:
            assert self.go is not None
            await self.go.wait()

        async def fail() -> None:
            raise SystemExit(kind)

        def fail_sync() -> None:
            raise SystemExit(kind)

        async def nest() -> None:
            self.add(tasks, "note", "always", None)

        def nest_sync() -> None:
            self.add(tasks, "note_sync", "always", None)

        async def yield_forever() -> None:
            while True:
                await anyio.sleep(0.001)

        def returns_awaitable() -> Any:
            return note()

        functions: dict[str, Callable[..., Any]] = {
            function.__name__: function
            for function in (note, note_sync, wait, fail, fail_sync, nest, nest_sync, yield_forever, returns_awaitable)
        }
        return functions[kind]

    def add(self, tasks: Any, kind: str, when: Any, key: str | None) -> None:
        timeout = 0.01 if kind == "yield_forever" else None
        try:
            task = tasks.options(when=when, key=key, timeout=timeout).add_task(self.function(kind, tasks))
        except (BacklogFull, RunnerClosed):
            return
        self.accepted.append(task)

    # The rules

    @precondition(lambda self: len(self.requests) < 6)
    @rule()
    def begin(self) -> None:
        async def begin() -> None:
            request = Request()
            self.requests.append(request)
            self.spawn(self.call, request)
            await anyio.wait_all_tasks_blocked()

        self.portal.call(begin)

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(),
        kind=st.sampled_from(KINDS),
        when=st.sampled_from(WHEN),
        key=st.none() | st.just("k"),
        thread=st.booleans(),
    )
    def defer(self, data: Any, kind: str, when: str, key: str | None, *, thread: bool) -> None:
        """Add to a request's list while it is open, while its tasks run, or long after."""
        tasks = data.draw(st.sampled_from(self.requests)).tasks
        if thread:
            self.add(tasks, kind, when, key)
        else:
            self.portal.call(self.add, tasks, kind, when, key)

    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        # How many there are depends on threads; that must not change what is drawn.
        if self.accepted:
            self.accepted[which % len(self.accepted)].cancel()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), how=st.sampled_from(["ok", "fail", "cancel"]))
    def end(self, data: Any, how: str) -> None:
        request = data.draw(st.sampled_from(self.requests))

        def end() -> None:
            request.how = how
            if how == "cancel":
                request.scope.cancel()
            request.end.set()

        self.portal.call(end)

    @rule()
    def let_waiting_tasks_go(self) -> None:
        def let_go() -> None:
            assert self.go is not None
            self.go.set()
            self.go = anyio.Event()

        self.portal.call(let_go)

    @precondition(lambda self: self.lifespan is None)
    @rule()
    def enter_lifespan(self) -> None:
        self.lifespan = self.portal.wrap_async_context_manager(self.runner)
        self.lifespan.__enter__()

    @precondition(lambda self: self.lifespan is not None)
    @rule()
    def shut_down(self) -> None:
        lifespan, self.lifespan = self.lifespan, None
        lifespan.__exit__(None, None, None)

    # What holds

    @invariant()
    def conserved(self) -> None:
        """G2: accepted is the sum over all states, at any moment, also while threads run."""
        counts = self.runner.statistics()
        assert counts.accepted == sum(counts[1:])
        assert min(counts) >= 0

    @invariant()
    def watched(self) -> None:
        """G2: what is unfinished is listed once, and as it is counted."""
        counts, events = self.runner.statistics(), self.runner.tasks()
        states = Counter(event.state for event in events)
        by_state = (states[TaskState.PENDING], states[TaskState.RUNNING])
        gone_on = counts != self.runner.statistics()  # a thread has, meanwhile
        assert gone_on or (by_state == (counts.pending, counts.running) and sum(by_state) == states.total())
        assert len({id(event.task) for event in events}) == len(events)
        assert all(0 <= event.waited <= event.queued for event in events)

    def teardown(self) -> None:
        if self.lifespan is not None:
            self.shut_down()
        for request in self.requests:
            self.portal.call(request.scope.cancel)
        self.group.__exit__(None, None, None)
        self.loop.__exit__(None, None, None)
        self.check_the_end()

    def check_the_end(self) -> None:
        """G2: each accepted task has exactly one final event, which is its state; nothing else has any."""
        counts = self.runner.statistics()
        assert (counts.accepted, counts.pending, counts.running) == (len(self.accepted), 0, 0)
        final = [(task, state) for task, state in self.events if state is not TaskState.RUNNING]
        assert Counter(map(id, self.accepted)) == Counter(id(task) for task, _ in final)
        assert all(task.state is state for task, state in final)
        started = Counter(id(task) for task, state in self.events if state is TaskState.RUNNING)
        assert all(count == 1 for count in started.values())
        by_state = Counter(state.value.replace(" ", "_") for _, state in final)
        assert {name: count for name, count in counts._asdict().items() if count and name != "accepted"} == by_state


@contextmanager
def portal(backend: str, options: dict[str, Any]) -> Iterator[anyio.from_thread.BlockingPortal]:
    with anyio.from_thread.start_blocking_portal(backend, options) as running:
        yield running


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_task_ends_exactly_once(backend: str) -> None:
    """G2: in any order of requests, adds, cancellations, threads and lifespans, every task ends exactly once."""
    case = type("Case", (Machine,), {"backend": BACKENDS[backend]})
    case.TestCase.settings = settings(  # type: ignore[attr-defined]
        max_examples=40,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    case.TestCase("runTest").runTest()  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_kind_of_task(backend: str) -> None:
    """G2: each kind of task that the machine knows ends exactly once in a plain run."""
    machine = type("Each", (Machine,), {"backend": BACKENDS[backend]})()
    machine.start(live=True, concurrent=False, limits=(3, 2), overflow="wait")
    machine.begin()
    for kind in KINDS:
        if kind != "wait":
            machine.add(machine.requests[0].tasks, kind, "always", None)
    machine.portal.call(machine.requests[0].end.set)
    machine.portal.call(machine.runner.wait_idle)
    machine.teardown()
    assert machine.called == {"note": 2, "note_sync": 2, "returns_awaitable": 1}
