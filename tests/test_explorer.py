"""Hundreds of schedules of small scenarios, and whether the explorer finds what is broken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from asgi_deferred import _account as accounts
from asgi_deferred import _drains as drains
from asgi_deferred import _scheduler as schedulers
from asgi_deferred._account import Account, Answer, TaskState, Turn, Waiters
from asgi_deferred._scheduler import Run, Scheduler

from .explorer.__main__ import main
from .explorer.baton import STEPS, Baton, Hang
from .explorer.explore import Finding, explore, run
from .explorer.loops import BACKENDS
from .explorer.scenarios import SCENARIOS

SEEDS = 15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_schedule_breaks_a_guarantee(scenario: str, backend: str) -> None:
    """G1, G2, G4, G7, G8, G9: under any order of the event loop and of threads, each scenario ends, and keeps them."""
    assert [finding for finding in explore([scenario], [backend], range(SEEDS)) if finding.breaches] == []


# What the explorer has to find


def first(scenario: str, backend: str = "asyncio", seeds: int = 60) -> Finding:
    """Return the first finding."""
    return next(finding for finding in explore([scenario], [backend], range(seeds)) if finding.breaches)


Broken = Callable[[pytest.MonkeyPatch], None]
BROKEN: dict[str, tuple[str, str, Broken]] = {}


def finds(scenario: str, promise: str) -> Callable[[Broken], Broken]:
    def note(broken: Broken) -> Broken:
        BROKEN[broken.__name__] = scenario, promise, broken
        return broken

    return note


@finds("loop_only", "Everybody waits")
def nobody_is_woken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Waiters, "wake", lambda self: None)


@finds("loop_only", "G7")
def a_place_is_lost(patch: pytest.MonkeyPatch) -> None:
    release = Account.release

    def broken(self: Account, run: Any) -> bool:
        self.places -= self.places > 0 and run.task.state is TaskState.FAILED
        return release(self, run)

    patch.setattr(Account, "release", broken)


@finds("loop_only", "G7")
def a_place_is_given_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, run: Any) -> Turn:
        self.places += 1
        return take(self, run)

    take = Account.take
    patch.setattr(Account, "take", broken)


@finds("threads", "G7")
def a_thread_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Account, "free_thread", lambda self, *, spare: None)


@finds("threads", "G7")
def a_thread_is_given_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, run: Any) -> Turn:
        self.threads += 1
        return take(self, run)

    take = Account.take
    patch.setattr(Account, "take", broken)


@finds("loop_only", "G7")
def nobody_pumps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "release", lambda self, run: self._pass_on(run))


@finds("loop_only", "G4")
def a_list_is_queued_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, line: Any, home: Any) -> Any:
        line._apart = True
        return end(self, line, home)

    end = Account.end
    patch.setattr(Account, "end", broken)


@finds("loop_only", "G2")
def an_end_is_reported_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(task: Any, state: TaskState, observers: Any) -> None:
        report(task, state, observers)
        report(task, state, observers)

    report = schedulers.report
    patch.setattr(schedulers, "report", broken)


@finds("loop_only", "G2")
def an_end_is_not_reported(patch: pytest.MonkeyPatch) -> None:
    report = schedulers.report
    patch.setattr(
        schedulers, "report", lambda task, state, all_: state is TaskState.CANCELLED or report(task, state, all_)
    )


@finds("requests", "G8")
def nobody_is_given_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drains, "GRACE", 20.0)


@finds("loop_only", "G1")
def a_task_starts_at_once(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Scheduler, task: Any) -> None:
        add(self, task)
        task._list._home = self.account.homes.get(task._list._loop)
        self.account.push(self.account.due, task)
        self.pump()

    add = Scheduler.add
    patch.setattr(Scheduler, "add", broken)


@finds("reject", "G7")
def the_backlog_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, task: Any, limit: float, *rest: Any) -> tuple[Answer, bool]:
        return accept(self, task, limit + 1, *rest)

    accept = Account.accept
    patch.setattr(Account, "accept", broken)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1, G2, G4, G7, G8: the explorer finds what breaks each of them, among other things."""
    scenario, promise, broken = BROKEN[name]
    broken(monkeypatch)
    assert promise in "\n".join(first(scenario).breaches)
