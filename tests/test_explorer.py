"""Hundreds of schedules of small scenarios, and whether the explorer finds what is broken."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from asgi_deferred import _drains as drains
from asgi_deferred import _scheduler as schedulers
from asgi_deferred._account import Account
from asgi_deferred._reports import report
from asgi_deferred._scheduler import Scheduler
from asgi_deferred._states import Answer, TaskState, Turn, Waiters

from .explorer import baton as batons
from .explorer.__main__ import main
from .explorer.baton import STEPS, Baton, Hang
from .explorer.explore import Finding, explore, run
from .explorer.loops import BACKENDS
from .explorer.scenarios import SCENARIOS
from .explorer.world import World

SEEDS = 50


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

    def broken(self: Account, way: Any) -> bool:
        self.places -= self.places > 0
        return release(self, way)

    patch.setattr(Account, "release", broken)


@finds("loop_only", "G7")
def a_place_is_given_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, way: Any) -> Turn:
        self.places += 1
        return take(self, way)

    take = Account.take
    patch.setattr(Account, "take", broken)


@finds("threads", "G7")
def a_thread_is_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Account, "free_thread", lambda self, *, spare: None)


@finds("threads", "G7")
def a_thread_is_given_twice(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Account, way: Any) -> Turn:
        self.threads += 1
        return take(self, way)

    take = Account.take
    patch.setattr(Account, "take", broken)


@finds("loop_only", "G7")
def nobody_pumps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "release", lambda self, way: self._pass_on(way))


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

    patch.setattr(schedulers, "report", broken)


@finds("loop_only", "G2")
def an_end_is_not_reported(patch: pytest.MonkeyPatch) -> None:
    def broken(task: Any, state: TaskState, observers: Any) -> None:
        if state is not TaskState.CANCELLED:
            report(task, state, observers)

    patch.setattr(schedulers, "report", broken)


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
    def broken(self: Account, task: Any, limit: int | None, *rest: Any) -> tuple[Answer, bool]:
        return accept(self, task, limit and limit + 1, *rest)

    accept = Account.accept
    patch.setattr(Account, "accept", broken)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G1, G2, G4, G7, G8: the explorer finds what breaks each of them, among other things."""
    scenario, promise, broken = BROKEN[name]
    broken(monkeypatch)
    assert promise in "\n".join(first(scenario).breaches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hang_is_found(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: where everybody waits for ever, that is found at once, and in no real time."""
    nobody_is_woken(monkeypatch)
    assert first("loop_only", backend).hang


# The explorer itself


async def dies(world: World) -> None:
    def thread() -> None:
        raise ArithmeticError("in a thread")

    world.configure()
    world.thread(thread)
    raise ArithmeticError("in the event loop")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_dies(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G3: an error that comes out of a thread or of the event loop is a finding."""
    monkeypatch.setitem(SCENARIOS, "dies", dies)
    assert set(run("dies", backend, 1).breaches) >= {"It ended with ArithmeticError('in the event loop')"}


def test_a_run_that_goes_round_in_circles() -> None:
    """G8: a run that makes too many steps is a hang."""
    baton = Baton(Random(0))
    baton.steps = STEPS
    with pytest.raises(Hang, match="for ever"):
        baton.step()


def test_a_thread_that_keeps_the_baton(monkeypatch: pytest.MonkeyPatch) -> None:
    """G13: where a thread does not hand on the baton, as one that waits for a lock that another holds, that is a hang."""
    monkeypatch.setattr(batons, "PATIENCE", 0.01)
    baton = Baton(Random(0))
    thread = threading.Thread(target=baton.join)
    thread.start()
    baton.started(thread)
    with pytest.raises(Hang, match="did not get its turn"):
        baton.hand_on(lambda: False)
    thread.join()


def test_a_thread_that_joins_late() -> None:
    """G8: when a run is over, nobody waits for the baton."""
    baton = Baton(Random(0))
    baton.closed = True
    baton.hand_on()
    threads = [threading.Thread(target=baton.join), baton.thread(baton.join)]
    for thread in threads:
        thread.start()
        thread.join(30)
        assert not thread.is_alive()


def test_the_same_seed_is_the_same_schedule() -> None:
    """G2: what a seed finds can be replayed."""
    draws = []

    async def play(world: World) -> None:
        await SCENARIOS["requests"](world)
        draws.append(world.random.random())

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCENARIOS, "play", play)
        for _ in range(3):
            run("play", "asyncio", 3)
    assert draws[1] == draws[2]


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: the command tells what was tried and found, and how to replay it, and fails if a guarantee was broken."""
    chosen = ["--backend", "asyncio", "--scenario", "loop_only"]
    assert main([*chosen, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 schedules in ")
    an_end_is_reported_twice(monkeypatch)
    assert main([*chosen, "--seed", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--scenario loop_only --backend asyncio --seed 1"
    assert lines[-1].endswith(": 0 hangs, 20 breaches")


def test_the_program() -> None:
    """G2: every scenario runs on every backend from the command line."""
    done = subprocess.run([sys.executable, "-m", "tests.explorer", "--seeds", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(SCENARIOS) * len(BACKENDS)} schedules" in done.stdout
