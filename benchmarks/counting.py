"""Instructions for each request, counted by valgrind: the figure that no noise of the machine moves.

`python -m benchmarks.counting CONTENDER REQUESTS` is what valgrind runs; two runs that differ in their number of
requests leave the start of the interpreter out.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ._report import Comparison, Result, progress

CONTENDERS = ["bare app", "wraps send", "the least needed", "asgi-background", "ours"]
WITH_A_TASK = ["one task: asgi-background", "one task: ours"]


def instructions(factor: float) -> Result:
    """Count, if valgrind is there. One round: the figures are the same each time."""
    if shutil.which("valgrind") is None:
        raise SystemExit("The benchmark 'instructions' needs valgrind on the PATH: apt install valgrind")
    samples = {}
    for name in CONTENDERS + WITH_A_TASK:
        progress(f"instructions: {name}")
        few, many = _count(name, 500), _count(name, 1500)
        samples[name] = [(many - few) / 1000]
    return Result(
        "instructions",
        "A request without tasks, and one with an async no-op task on asyncio, in CPU instructions",
        "instructions for each request",
        "valgrind --tool=callgrind, 1500 requests less 500, a fixed hash seed, garbage collector off",
        samples,
        [
            Comparison("ours", "wraps send", 2.5, "bare app"),
            Comparison("ours", "asgi-background", 1.6, "bare app"),
            Comparison("the least needed", "wraps send", None, "bare app"),
            Comparison("one task: ours", "one task: asgi-background", 0.8),
        ],
    )


def _count(contender: str, requests: int) -> int:
    with TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable, "-m", __name__]
        subprocess.run(
            [*command, contender, str(requests)],
            check=True,
            capture_output=True,
            env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        )
        total = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])


async def drive_to_its_end(contender: str, requests: int) -> None:
    from ._asgi import scope
    from .requests import Ended, raw_apps, started, to_its_end

    ended = Ended()
    app = raw_apps(ended)[contender]
    async with started({contender: app}):
        gc.disable()
        await to_its_end(app, ended)([scope() for _ in range(requests)])


def drive(contender: str, requests: int) -> None:
    """Step the requests by hand, without an event loop: nothing on this path waits."""
    from asgi_background import BackgroundTaskMiddleware

    from asgi_deferred import DeferredMiddleware

    from ._asgi import Needed, PassThrough, bare, receive, scope, send

    background = BackgroundTaskMiddleware(bare)
    background._tg = True  # type: ignore[assignment]  # stands for its lifespan, which takes no part in a request
    apps: dict[str, Any] = {
        "bare app": bare,
        "wraps send": PassThrough(bare),
        "the least needed": Needed(bare),
        "asgi-background": background,
        "ours": DeferredMiddleware(bare),
    }
    app = apps[contender]
    gc.disable()
    for _ in range(requests):
        call: Coroutine[Any, Any, None] = app(scope(), receive, send)
        try:
            call.send(None)
        except StopIteration:
            continue
        raise AssertionError("a request without tasks waited")


if __name__ == "__main__":
    if sys.argv[1] in WITH_A_TASK:
        asyncio.run(drive_to_its_end(sys.argv[1].removeprefix("one task: "), int(sys.argv[2])))
    else:
        drive(sys.argv[1], int(sys.argv[2]))
