"""How long the import of the package takes, in a new interpreter each time."""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter

from ._report import Comparison, Result, progress

IMPORTS = {
    "interpreter": "pass",
    "anyio": "import anyio",
    "starlette.background": "import starlette.background",
    "asgi-background": "import asgi_background",
    "ours": "import asgi_deferred",
}


def import_time(factor: float) -> Result:
    rounds = round(30 * factor)
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for index in range(-1, rounds):  # the first round fills the caches
        progress(f"import: round {index} of {rounds}")
        for name, code in IMPORTS.items():
            start = perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            if index >= 0:
                samples[name].append((perf_counter() - start) * 1e3)
    return Result(
        "import",
        "Import time, from the start of the interpreter",
        "ms",
        f"a new process each time, {rounds} interleaved rounds, medians",
        samples,
        [Comparison("ours", peer, None, "interpreter") for peer in ("asgi-background", "starlette.background")],
    )
