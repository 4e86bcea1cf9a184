"""What a benchmark gives back, and how it is printed, saved and drawn.

1. A *round* measures every contender once, one after the other, and each round starts with the next contender.
2. A figure is the median over the rounds. A ratio is taken within each round, and its median is held against the bar.
3. The spread is the tenth to the ninetieth percentile over the rounds.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

RESULTS = Path(__file__).parent / "results"

PACKAGES = [
    "asgi-deferred",
    "anyio",
    "asgi-background",
    "daphne",
    "fastapi",
    "granian",
    "gunicorn",
    "httptools",
    "hypercorn",
    "litestar",
    "opentelemetry-sdk",
    "starlette",
    "trio",
    "uvicorn",
    "uvloop",
]


@dataclass
class Comparison:
    """Ours against a peer. With a `baseline`, that is taken off both first."""

    ours: str
    peer: str
    bar: float | None = None
    baseline: str | None = None
    at_least: bool = False
    ratios: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool:
        if self.bar is None:
            return True
        return self.ratio >= self.bar if self.at_least else self.ratio <= self.bar


@dataclass
class Result:
    """One benchmark's figures: for each contender, one for each round."""

    name: str
    title: str
    unit: str
    method: str
    samples: dict[str, list[float]]
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    x: str | None = None  # contenders are then named "name @ x", and drawn as lines over x

    def __post_init__(self) -> None:
        for comparison in self.comparisons:
            base = self.samples[comparison.baseline] if comparison.baseline else None
            for index, ours in enumerate(self.samples[comparison.ours]):
                off = base[index] if base else 0.0
                peer = self.samples[comparison.peer][index] - off
                if peer > 0:
                    comparison.ratios.append((ours - off) / peer)


def spread(figures: list[float]) -> tuple[float, float]:
    if len(figures) < 2:
        return figures[0], figures[0]
    deciles = quantiles(figures, n=10, method="inclusive")
    return deciles[0], deciles[-1]


def environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "versions": versions,
    }


def progress(text: str) -> None:
    print(f"\r\033[K{text}" if sys.stderr.isatty() else text, end="", file=sys.stderr, flush=True)
    print(end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def heading() -> str:
    return _run(environment())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(result: Result) -> str:
    lines = [f"{result.name}: {result.title} ({result.unit})", f"  {result.method}"]
    width = max(map(len, result.samples))
    for contender, figures in result.samples.items():
        low, high = spread(figures)
        lines.append(f"  {contender:{width}}  {_number(median(figures)):>10}  [{_number(low)} .. {_number(high)}]")
    lines += [f"  {line}" for line in _comparisons([result])[1:]]
    lines += [f"  {note}" for note in result.notes]
    return "\n".join(lines)


def summary(results: list[Result]) -> str:
    return "\n".join(_comparisons(results))


def _comparisons(results: list[Result]) -> list[str]:
    rows = [("row", "ours", "peer", "ratio", "spread", "bar", "")]
    for result in results:
        for one in result.comparisons:
            base = median(result.samples[one.baseline]) if one.baseline else 0.0
            low, high = spread(one.ratios)
            rows.append(
                (
                    result.name,
                    f"{one.ours} {_number(median(result.samples[one.ours]) - base)}",
                    f"{one.peer} {_number(median(result.samples[one.peer]) - base)}",
                    f"{one.ratio:.3g}",
                    f"[{low:.3g} .. {high:.3g}]",
                    "" if one.bar is None else f"{'>=' if one.at_least else '<='} {one.bar:g}",
                    "" if one.bar is None else "met" if one.met else "NOT MET",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def save(result: Result) -> None:
    """Write the figures and the plot to `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    data = {"environment": environment(), **asdict(result)}
    data["medians"] = {contender: median(figures) for contender, figures in result.samples.items()}
    data["samples"] = {name: [float(f"{value:.5g}") for value in values] for name, values in result.samples.items()}
    for comparison, one in zip(data["comparisons"], result.comparisons, strict=True):
        del comparison["ratios"]
        comparison |= {"ratio": one.ratio, "spread": spread(one.ratios), "met": one.met}
    (RESULTS / f"{result.name}.json").write_text(json.dumps(data, indent=1) + "\n")
    _plot(result)


def save_index() -> None:
    """Write a table of all that was ever saved, each row with its date."""
    lines = ["# Results", "", "Written by `python -m benchmarks`; the ratio is ours to the peer's.", ""]
    lines += ["| row | ours | peer | ratio | spread | bar | |", "|---|---|---|---|---|---|---|"]
    runs: dict[str, list[str]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        runs.setdefault(_run(data["environment"]), []).append(data["name"])
        for one in data["comparisons"]:
            low, high = one["spread"]
            bar = "" if one["bar"] is None else f"{'≥' if one['at_least'] else '≤'} {one['bar']:g}"
            met = "" if one["bar"] is None else "met" if one["met"] else "**not met**"
            cells = [
                data["name"],
                one["ours"],
                one["peer"],
                f"{one['ratio']:.3g}",
                f"{low:.3g} to {high:.3g}",
                bar,
                met,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {', '.join(names)}: {run}" for run, names in runs.items())]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def _run(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"{about['date']}, {about['python']}, {about['system']}, {about['cores']} cores; {packages}"


def _plot(result: Result) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "asgi-deferred"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        figsize=(7, 0.7 + 0.36 * (8 if result.x else len(result.samples))), layout="constrained"
    )
    if result.x:
        _lines(axes, result)
    else:
        _bars(axes, result)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(result.title, fontsize=10, loc="left")
    figure.savefig(RESULTS / f"{result.name}.svg", metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, result: Result) -> None:
    names = list(result.samples)
    for row, name in enumerate(names):
        figures = result.samples[name]
        middle = median(figures)
        low, high = spread(figures)
        axes.barh(row, middle, color="#2a6f97" if "ours" in name else "#b8c4cc")
        axes.plot([low, high], [row, row], color="#333333", linewidth=1)
        axes.annotate(
            _number(middle),
            (max(middle, high), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(result.unit, fontsize=8)


def _lines(axes: Any, result: Result) -> None:
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for name, figures in result.samples.items():
        contender, _, x = name.partition(" @ ")
        lines.setdefault(contender, []).append((float(x), figures))
    for contender, points in lines.items():
        xs = [x for x, _ in points]
        axes.plot(xs, [median(figures) for _, figures in points], marker="o", label=contender)
        axes.fill_between(xs, *zip(*(spread(figures) for _, figures in points), strict=True), alpha=0.2)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(result.x, fontsize=8)
    axes.set_ylabel(result.unit, fontsize=8)
    axes.legend(fontsize=8)
