"""Try schedules, and print what was found: `python -m tests.explorer --help`."""

from __future__ import annotations

import argparse
import sys
from time import perf_counter

from .explore import explore
from .loops import BACKENDS
from .scenarios import SCENARIOS


def main(arguments: list[str] | None = None) -> int:
    """Return 1 if a guarantee was broken."""
    parser = argparse.ArgumentParser("python -m tests.explorer", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, metavar="N", help="so many schedules of each scenario")
    parser.add_argument("--seed", type=int, help="this one alone, again and again: the order of a set may differ")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--scenario", choices=SCENARIOS)
    chosen = parser.parse_args(arguments)
    backends = [chosen.backend] if chosen.backend else list(BACKENDS)
    scenarios = [chosen.scenario] if chosen.scenario else list(SCENARIOS)
    seeds = range(chosen.seeds) if chosen.seed is None else [chosen.seed] * 20
    start, tried, hangs, breaches = perf_counter(), 0, 0, 0
    for finding in explore(scenarios, backends, seeds):
        tried += 1
        hangs += finding.hang
        breaches += bool(finding.breaches) and not finding.hang
        if finding.breaches:
            print(f"--scenario {finding.scenario} --backend {finding.backend} --seed {finding.seed}")
            for breach in finding.breaches:
                print(f"    {breach}")
    print(f"{tried} schedules in {perf_counter() - start:.1f} s: {hangs} hangs, {breaches} breaches")
    return 1 if hangs or breaches else 0


if __name__ == "__main__":
    sys.exit(main())
