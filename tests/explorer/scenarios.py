"""The scenarios: each is small, and leaves the details to the seed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from .world import World

Scenario = Callable[[World], Awaitable[None]]

SCENARIOS: dict[str, Scenario] = {}


def scenario(play: Scenario) -> Scenario:
    SCENARIOS[play.__name__] = play
    return play


async def live(world: World, play: Callable[[], Awaitable[object]], before: float = 0.0) -> None:
    """Enter the runner for a while, and judge how long its drain takes."""
    await anyio.sleep(before)
    try:
        async with world.runner:
            try:
                await play()
            finally:
                start = anyio.current_time()
    finally:
        world.judge_drain(start, "G8")


async def traffic(world: World, calls: int = 3, *, held: bool = False) -> None:
    """Make requests at once, and meddle with them from here and from other threads."""

    async def one() -> None:
        await world.pause()
        await world.call(world.random.randint(1, 3))

    async with anyio.create_task_group() as group:
        for _ in range(calls):
            group.start_soon(one)
        for _ in range(world.random.randint(0, 3)):
            await world.pause()
            if world.random.random() < 0.5:
                world.meddle()
            else:
                world.thread(world.meddle)
    if not held:
        await world.watch()
    for _ in range(world.random.randint(0, 2)):
        world.meddle()
        await world.watch()


def limits(world: World) -> dict[str, Any]:
    choice = world.random.choice
    return {
        "max_concurrency": choice([1, 2, 100]),
        "max_threads": choice([1, 1, 2, 40]),
        "drain_timeout": choice([0.5, 4.0]),
    }


@scenario
async def requests(world: World) -> None:
    """Requests and a lifespan, with any limits."""
    world.configure(**limits(world))
    await live(world, lambda: traffic(world))


@scenario
async def loop_only(world: World) -> None:
    """The same, with nothing in a thread."""
    world.synchronous = []
    world.configure(**limits(world))
    await live(world, lambda: traffic(world))


@scenario
async def threads(world: World) -> None:
    """A thread is what everybody waits for."""
    world.asynchronous = ["quick", "pauses"]
    world.configure(max_threads=1, max_concurrency=world.random.choice([1, 2, 100]), drain_timeout=2.0)
    await live(world, lambda: traffic(world, 4))


@scenario
async def apart(world: World) -> None:
    """The tasks of a list run at once."""
    world.configure(concurrent=True, **limits(world))
    await live(world, lambda: traffic(world))


@scenario
async def reject(world: World) -> None:
    """The backlog is full, and tasks are refused."""
    world.configure(overflow="reject", max_pending=2, **limits(world))
    await live(world, lambda: traffic(world))


@scenario
async def wait(world: World) -> None:
    """The backlog is full, and calls are held until there is room."""
    world.asynchronous = ["quick", "pauses", "sleeps", "fails"]
    world.synchronous = ["quick", "pauses", "fails"]
    world.configure(max_pending=1, **limits(world))
    await live(world, lambda: traffic(world, 4, held=True))


@scenario
async def two_entries(world: World) -> None:
    """The runner is entered twice at a time, and left at any moment, by some because they are cancelled."""
    world.configure(**limits(world))
    scopes = [anyio.CancelScope() for _ in range(2)]

    async def one(scope: anyio.CancelScope) -> None:
        before = world.random.uniform(0, 2)
        with scope:
            await live(world, lambda: traffic(world, 2), before)

    async def visit() -> None:
        await anyio.sleep(world.random.uniform(0, 6))
        await world.call(1)

    async with anyio.create_task_group() as visitors:
        for _ in range(4):
            visitors.start_soon(visit)
        async with anyio.create_task_group() as group:
            for scope in scopes:
                group.start_soon(one, scope)
            for scope in scopes:
                if world.random.random() < 0.3:
                    await anyio.sleep(world.random.uniform(0, 3))
                    scope.cancel()
        await anyio.sleep(6)
        for request in world.requests:
            request.scope.cancel()


@scenario
async def cut(world: World) -> None:
    """A lifespan is cancelled as its tasks begin."""
    world.configure(**limits(world))

    async def play() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(world.call)
        await world.pause()
        scope.cancel()
        await anyio.sleep(1)

    with anyio.CancelScope() as scope:
        await live(world, play)


@scenario
async def calls(world: World) -> None:
    """No lifespan, and calls that are cancelled."""
    await without_lifespan(world)


@scenario
async def calls_and_lifespan(world: World) -> None:
    """Calls without a lifespan, and one that begins later."""
    async with anyio.create_task_group() as group:
        group.start_soon(without_lifespan, world)
        await anyio.sleep(world.random.uniform(0, 3))
        await live(world, lambda: traffic(world, 2))


async def without_lifespan(world: World) -> None:
    world.asynchronous = ["quick", "pauses", "sleeps", "fails", "stubborn", "defers"]
    world.configure(**limits(world))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(world.call, 2)
        for _ in range(3):
            await anyio.sleep(world.random.choice([0.0, world.random.uniform(0, 2)]))
            world.meddle()
        await anyio.sleep(world.random.uniform(0, 3))
        start = anyio.current_time()
        for request in world.requests:
            request.scope.cancel()
    world.judge_drain(start, "G9")
