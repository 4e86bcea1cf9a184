"""Where a request with one async task spends its time: instructions of CPython's virtual machine, by package and function.

Counted and not timed, so that two runs agree; what C code does within an instruction is not in it.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import anyio

from ._asgi import scope
from ._report import Comparison, Result, progress
from .requests import Ended, raw_apps, started, to_its_end, woken

REQUESTS = 200
PACKAGES = ["asgi_deferred", "asgi_background", "anyio", "asyncio", "benchmarks"]


def profile(factor: float) -> Result:
    """Count, one round: the figures are the same each time."""
    if sys.version_info < (3, 12):
        raise SystemExit("The benchmark 'profile' needs sys.monitoring: Python 3.12 or newer")
    counts = {name: anyio.run(_count, name) for name in ["a woken task", "asgi-background", "ours"]}
    samples: dict[str, list[float]] = {name: [counted.total() / REQUESTS] for name, counted in counts.items()}
    notes = []
    for name, counted in counts.items():
        by_package: Counter[str] = Counter()
        for (package, _), count in counted.items():
            by_package[package] += count
        notes.append(
            f"{name}: " + ", ".join(f"{key} {count / REQUESTS:.0f}" for key, count in by_package.most_common())
        )
    functions = [
        (function, count) for (package, function), count in counts["ours"].most_common() if package == PACKAGES[0]
    ]
    notes.append("asgi_deferred: " + ", ".join(f"{function} {count / REQUESTS:.0f}" for function, count in functions))
    return Result(
        "profile",
        "A request with one async no-op task, in bytecode",
        "bytecode instructions for each request",
        f"sys.monitoring, over {REQUESTS} requests after a warm-up, on asyncio",
        samples,
        [Comparison("ours", "asgi-background"), Comparison("a woken task", "asgi-background")],
        notes,
    )


async def _count(name: str) -> Counter[tuple[str, str]]:
    progress(f"profile: {name}")
    ended = Ended()
    counted: Counter[tuple[str, str]] = Counter()

    def count(code: CodeType, offset: int) -> None:
        parts = Path(code.co_filename).parts
        package = next((package for package in PACKAGES if package in parts), "the rest")
        counted[package, code.co_qualname] += 1

    monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    monitoring.use_tool_id(monitoring.PROFILER_ID, "benchmarks")
    monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION, count)
    try:
        async with woken(ended) as by_hand, started(raw_apps(ended)) as apps:
            run = to_its_end({**apps, "a woken task": by_hand}[name], ended)
            await run([scope() for _ in range(REQUESTS)])
            scopes = [scope() for _ in range(REQUESTS)]
            monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.INSTRUCTION)
            await run(scopes)
            monitoring.set_events(monitoring.PROFILER_ID, 0)
    finally:
        monitoring.free_tool_id(monitoring.PROFILER_ID)
    return counted
