"""Run the benchmarks that were named, or all; print a table, and write figures and plots to `benchmarks/results/`."""

from __future__ import annotations

import argparse

from . import counting, growth, processes, profiling, requests, serving, shutdown, telemetry
from ._report import RESULTS, heading, progress, save, save_index, summary, table

BENCHMARKS = {
    "no-tasks": requests.no_tasks,
    "no-tasks-loops": requests.no_tasks_loops,
    "one-task": requests.one_task,
    "one-task-loops": requests.one_task_loops,
    "sync-tasks": requests.sync_tasks,
    "instructions": counting.instructions,
    "profile": profiling.profile,
    "throughput": serving.throughput,
    "processor": serving.processor,
    "latency": serving.latency,
    "endpoints": serving.endpoints,
    "memory": serving.memory,
    "growth": growth.growth,
    "lost": shutdown.lost,
    "telemetry": telemetry.telemetry,
    "import": processes.import_time,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=float, default=1.0, help="times as many rounds, 1.0 if left out")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    print(heading())
    results = []
    for name in arguments.names or BENCHMARKS:
        progress(f"{name} ...")
        results.append(BENCHMARKS[name](arguments.rounds))
        save(results[-1])
        save_index()
        progress("")
        print(f"\n{table(results[-1])}")
    print(f"\n{summary(results)}\n\nFigures and plots: {RESULTS}")


if __name__ == "__main__":
    main()
