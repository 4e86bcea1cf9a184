"""One run of a scenario, and many."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from random import Random
from typing import NamedTuple

from .baton import Baton, Hang
from .loops import BACKENDS
from .scenarios import SCENARIOS
from .world import World


class Finding(NamedTuple):
    scenario: str
    backend: str
    seed: int
    hang: bool
    breaches: list[str]


def run(scenario: str, backend: str, seed: int) -> Finding:
    """Run a scenario under the schedule of a seed."""
    finding = attempt(scenario, backend, seed)
    if finding.breaches:
        collect()
    return finding


def attempt(scenario: str, backend: str, seed: int) -> Finding:
    random = Random(f"{scenario} {backend} {seed}")
    baton = Baton(random)
    world = World(random, baton)
    hang = False

    async def main() -> None:
        await SCENARIOS[scenario](world)
        await world.finish()

    def died(args: threading.ExceptHookArgs) -> None:
        world.breaches.append(f"G3: a thread died of {args.exc_value!r}")

    hook, threading.excepthook = threading.excepthook, died
    logging.disable()
    gc.disable()  # as a finaliser would run anywhere
    try:
        with baton.in_hand():
            try:
                BACKENDS[backend](main, random, baton, world.breaches.append)
            except Hang as exc:
                hang = True
                world.breaches.append(str(exc))
            except BaseException as exc:
                world.breaches.append(f"It ended with {exc!r}")
            breaches = list(dict.fromkeys(world.breaches))
            world.opened = True
    finally:
        gc.enable()
        threading.excepthook = hook
        logging.disable(logging.NOTSET)
    return Finding(scenario, backend, seed, hang, breaches)


def collect() -> None:
    """Let what a hang left behind die quietly, before the next run."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


def explore(scenarios: Iterable[str], backends: Iterable[str], seeds: Iterable[int]) -> Iterator[Finding]:
    """Run scenarios under many schedules."""
    for seed in seeds:
        for scenario in scenarios:
            for backend in backends:
                yield run(scenario, backend, seed)
