"""The recipe for Prometheus in one process, the dashboard and the alert rules."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import httpx
import pytest

from asgi_deferred import TaskState
from examples import prometheus_one_process

from .metrics import DASHBOARD, QUERIES, RULES, check_names, read, selectors
from .test_examples import post, serving

STATE = "asgi_deferred_task_state"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_one_process() -> None:
    """G2: one scrape has the counts, the durations and the gauges, and all that the dashboard and the alerts ask for."""
    async with serving(prometheus_one_process.app) as host, httpx.AsyncClient(trust_env=False) as client:
        assert (await post(host, "/signup/ada")).status_code == 202
        await prometheus_one_process.runner.wait_idle()
        scrape = (await client.get(f"http://{host}/metrics")).text
    check_names(scrape)
    samples = {
        name.removeprefix("asgi_deferred_"): [
            ([text for label, text in labels.items() if not label.startswith("otel_")], value)
            for labels, value in found
        ]
        for name, found in read(scrape).items()
        if name.startswith("asgi_deferred_") and not name.endswith(("_bucket", "_sum"))
    }
    welcomed = [(["send_welcome", "SUCCEEDED"], 1.0)]
    assert samples == {
        "task_duration_seconds_count": welcomed,
        "task_queue_duration_seconds_count": welcomed,
        "tasks_ended_total": welcomed,
        "tasks_unfinished": [(["PENDING"], 0.0), (["RUNNING"], 0.0)],
        "tasks_oldest_seconds": [([], 0.0)],
        "tasks_limit": [([], 10_000.0)],
    }


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_states_in_queries_exist(query: str) -> None:
    """Every state that a query picks is one of ours."""
    states = [
        state
        for _, matchers, _ in selectors(query)
        for matcher in matchers
        if matcher.name == STATE
        for state in matcher.value.split("|")
    ]
    assert set(states) <= {state.name for state in TaskState}


def test_the_dashboard_can_be_imported() -> None:
    """Grafana finds what it needs: a schema version, a choice of the data source, and panels of their own ids that do not overlap."""
    panels = DASHBOARD["panels"]
    source, job = DASHBOARD["templating"]["list"]
    assert DASHBOARD["schemaVersion"] == 39
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (job["name"], job["query"]["query"]) == ("job", "label_values(asgi_deferred_tasks_limit, job)")
    chosen = [job["datasource"], *(each["datasource"] for panel in panels for each in (panel, *panel["targets"]))]
    assert all(each == {"type": "prometheus", "uid": "${datasource}"} for each in chosen)
    assert sorted(panel["id"] for panel in panels) == list(range(1, len(panels) + 1))
    for panel in panels:
        assert all((panel["title"], panel["description"], panel["fieldConfig"]["defaults"]["unit"]))
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    assert not [(one["id"], other["id"]) for one, other in combinations(panels, 2) if overlap(one, other)]


def overlap(one: Any, other: Any) -> bool:
    a, b = one["gridPos"], other["gridPos"]
    apart = (
        a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    )
    return not apart


def test_the_alerts() -> None:
    """There are four alerts, each with a severity and a summary."""
    assert [(rule["alert"], rule["labels"]["severity"], "summary" in rule["annotations"]) for rule in RULES] == [
        ("DeferredTasksFail", "warning", True),
        ("DeferredTasksWait", "warning", True),
        ("DeferredBacklogNearLimit", "critical", True),
        ("DeferredTasksAbandoned", "critical", True),
    ]
