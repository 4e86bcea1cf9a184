"""Tasks lost when a deploy stops the server: SIGTERM while they run."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from subprocess import TimeoutExpired
from tempfile import TemporaryDirectory
from urllib.error import HTTPError

from ._report import Comparison, Result, progress
from ._serve import SERVERS, serve

LIBRARIES = ["Starlette", "asgi-background", "ours in Starlette"]
TASKS = 20
SECONDS = 5.0


def lost(factor: float) -> Result:
    cases = list(product(SERVERS, LIBRARIES))
    samples: dict[str, list[float]] = {f"{server}, {library}": [] for server, library in cases}
    notes = []
    progress(f"lost: {len(cases)} servers")
    with ThreadPoolExecutor(3) as pool:
        for (server, library), (refused, missing) in zip(cases, pool.map(lambda case: _run(*case), cases), strict=True):
            samples[f"{server}, {library}"] = [missing]
            if refused:
                notes.append(f"{server}, {library}: {refused} of {TASKS} requests failed, for want of a lifespan")
    for library in LIBRARIES:
        samples[f"all, {library}"] = [sum(samples[f"{server}, {library}"][0] for server in SERVERS)]
    return Result(
        "lost",
        f"Tasks lost at SIGTERM, of {TASKS} for each server",
        "tasks lost",
        f"{TASKS} requests, each with an async task of {SECONDS:g} s; SIGTERM 0.5 s after the last response; "
        "each server with its default settings; a request that failed counts as a task lost",
        samples,
        [Comparison("all, ours in Starlette", f"all, {library}", 0.0) for library in LIBRARIES[:2]],
        notes,
    )


def _run(server: str, library: str) -> tuple[int, int]:
    refused = 0
    with TemporaryDirectory() as folder:
        done = Path(folder, "done")
        done.touch()
        environ = {"BENCHMARKS_SLOW": str(SECONDS), "BENCHMARKS_DONE": str(done)}
        with serve(library, server=server, **environ) as served:
            for _ in range(TASKS):
                try:
                    served.get("/slow")
                except HTTPError:
                    refused += 1
            time.sleep(0.5)
            served.process.terminate()
            try:
                served.process.wait(40)
            except TimeoutExpired:
                pass
        return refused, TASKS - len(done.read_text().splitlines())
