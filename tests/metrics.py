"""What the examples' dashboard and alert rules ask Prometheus for, and what a scrape gives it."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

EXAMPLES = Path(__file__).parents[1] / "examples"
DASHBOARD: dict[str, Any] = json.loads((EXAMPLES / "grafana_dashboard.json").read_text(encoding="utf-8"))
ALERTS = EXAMPLES / "prometheus_alerts.yml"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
QUERIES: dict[str, str] = {
    **{f"{panel['title']} {target['refId']}": target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]},
    **{rule["alert"]: rule["expr"] for rule in RULES},
}  # fmt: skip
OF_PROMETHEUS = {"job", "instance"}  # labels that it adds to each sample
TASK = {"asgi_deferred_task_name", "asgi_deferred_task_state"}
EXPORTED: dict[str, set[str]] = {
    "asgi_deferred_task_duration_seconds_bucket": {*TASK, "le"},
    "asgi_deferred_task_duration_seconds_count": TASK,
    "asgi_deferred_task_duration_seconds_sum": TASK,
    "asgi_deferred_task_queue_duration_seconds_bucket": {*TASK, "le"},
    "asgi_deferred_task_queue_duration_seconds_count": TASK,
    "asgi_deferred_task_queue_duration_seconds_sum": TASK,
    "asgi_deferred_tasks_ended_total": TASK,
    "asgi_deferred_tasks_limit": set(),
    "asgi_deferred_tasks_oldest_seconds": set(),
    "asgi_deferred_tasks_unfinished": {"asgi_deferred_task_state"},
}
BOUNDS = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, inf}  # of histograms, in seconds

Samples = dict[str, list[tuple[dict[str, str], float]]]


def read(scrape: str) -> Samples:
    """A scrape's samples by name: their labels and values."""
    samples: Samples = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def ours(samples: Samples) -> dict[str, set[str]]:
    """The labels of each metric of ours, without those that tell processes apart."""
    return {
        name: {label for labels, _ in found for label in labels if label != "pid" and not label.startswith("otel_")}
        for name, found in samples.items()
        if name.startswith("asgi_deferred_") and not name.endswith("_created")
    }


def selectors(query: str) -> list[tuple[str, list[promql_parser.Matcher], set[str]]]:
    """The metrics that a query names, how each is filtered, and the labels it is grouped by."""
    found: list[tuple[str, list[promql_parser.Matcher], set[str]]] = []
    labels: set[str] = set()

    def visit(expression: Any) -> None:
        if isinstance(expression, promql_parser.AggregateExpr):
            assert expression.modifier is not None
            labels.update(expression.modifier.labels)
        elif isinstance(expression, promql_parser.MatrixSelector):
            visit(expression.vector_selector)
        elif isinstance(expression, promql_parser.VectorSelector):
            assert expression.name is not None
            found.append((expression.name, expression.matchers.matchers, labels))

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "5m")), visit)
    return found


def unknown(query: str, exported: dict[str, set[str]]) -> set[str]:
    """What a query names and a scrape lacks: metrics, and labels of metrics."""
    missing = set()
    for name, matchers, grouped in selectors(query):
        labels = {*grouped, *(matcher.name for matcher in matchers)}
        missing |= labels - exported[name] - OF_PROMETHEUS - {"pid"} if name in exported else {name}
    return missing


def check_names(scrape: str) -> None:
    """A scrape has what is documented, in buckets of seconds, and all that the queries name."""
    samples = read(scrape)
    exported = ours(samples)
    assert exported == EXPORTED
    for histogram in ("duration", "queue_duration"):
        buckets = samples[f"asgi_deferred_task_{histogram}_seconds_bucket"]
        assert {float(labels["le"]) for labels, _ in buckets} == BOUNDS
    assert {title: names for title, query in QUERIES.items() if (names := unknown(query, exported))} == {}
