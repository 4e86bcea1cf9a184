"""The recipe for Prometheus with several workers, under gunicorn with two; and the alert rules, in Prometheus itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.metrics import ALERTS, EXAMPLES, Samples, check_names, read

from .harness import DEADLINE, Kind, Server, serve, until

pytestmark = pytest.mark.servers

SETTINGS = ("-c", str(EXAMPLES / "prometheus_gunicorn.py"), "-b", "127.0.0.1:{port}", "--no-control-socket")
PROMTOOL = shutil.which("promtool")
UNIT_TESTS = Path(__file__).with_name("prometheus_alerts_test.yml")
WORKERS = Kind("gunicorn-prometheus", ("gunicorn", "{app}", *SETTINGS), workers=2)


@dataclass
class Workers:
    server: Server

    def post(self, path: str) -> httpx.Response:
        return httpx.post(self.server.url + path, timeout=DEADLINE, trust_env=False)

    def metrics(self) -> str:
        answer = httpx.get(f"{self.server.url}/metrics", timeout=DEADLINE, trust_env=False)
        assert answer.status_code == 200
        return answer.text

    def wait_for(self, condition: Callable[[Samples], Any], what: str) -> Samples:
        """Scrape, from whichever worker answers, until the scrape has something."""

        def scrape() -> Samples | None:
            try:
                samples = read(self.metrics())
            except httpx.TransportError:  # a worker that ends drops the connection it has just accepted
                return None
            return samples if condition(samples) else None

        found = until(scrape, what)
        assert isinstance(found, dict)
        return found

    def pids(self) -> set[int]:
        return pids(self.wait_for(lambda samples: len(pids(samples)) == 2, "two workers in one scrape"))

    @contextmanager
    def alone(self, pid: int) -> Iterator[None]:
        """Let one worker take all requests, as the other one is stopped."""
        (other,) = self.pids() - {pid}
        os.kill(other, signal.SIGSTOP)
        yield
        os.kill(other, signal.SIGCONT)


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "metrics"))
    with serve(WORKERS, tmp_path, app="prometheus_app:app", drain_timeout=0.1) as server:
        yield Workers(server)


def pids(samples: Samples) -> set[int]:
    """The workers that have gauges."""
    return {int(labels["pid"]) for labels, _ in samples.get("asgi_deferred_tasks_limit", [])}


def ended(samples: Samples) -> dict[tuple[str, str], float]:
    found = samples.get("asgi_deferred_tasks_ended_total", [])
    return {(labels["asgi_deferred_task_name"], labels["asgi_deferred_task_state"]): value for labels, value in found}


def gauge(samples: Samples, name: str, pid: int) -> list[float]:
    found = samples.get(f"asgi_deferred_tasks_{name}", [])
    return [value for labels, value in found if labels["pid"] == str(pid)]


def test_both_workers_in_one_scrape(workers: Workers) -> None:
    """One scrape counts the tasks of both workers; a killed worker's gauges go, and what it has counted stays."""
    one, other = workers.pids()
    for pid, requests in ((one, 2), (other, 3)):
        with workers.alone(pid):
            assert [workers.post("/signup/ada").status_code for _ in range(requests)] == [202] * requests
    welcomed = ("send_welcome", "SUCCEEDED")
    samples = workers.wait_for(lambda samples: ended(samples).get(welcomed) == 5, "the tasks of both workers")
    assert ended(samples) == {welcomed: 5}

    os.kill(one, signal.SIGKILL)
    samples = workers.wait_for(lambda samples: one not in pids(samples) and len(pids(samples)) == 2, "a new worker")
    gauges = {name for name, found in samples.items() for labels, _ in found if labels.get("pid") == str(one)}
    assert (other in pids(samples), gauges) == (True, set())
    assert ended(samples) == {welcomed: 5}
    for histogram in ("duration", "queue_duration"):
        ((labels, count),) = samples[f"asgi_deferred_task_{histogram}_seconds_count"]
        assert (tuple(labels.values()), count) == (welcomed, 5)


def test_a_stuck_worker_is_seen(workers: Workers) -> None:
    """G7: while a task blocks a worker's event loop, the other worker's scrape shows that its next task waits longer and longer."""
    stuck = workers.post("/block/gate").json()
    samples = workers.wait_for(lambda samples: gauge(samples, "oldest_seconds", stuck) > [0.0], "a task that waits")
    first = gauge(samples, "oldest_seconds", stuck)
    samples = workers.wait_for(lambda samples: gauge(samples, "oldest_seconds", stuck) > first, "it to wait longer")
    assert gauge(samples, "unfinished", stuck) == [1, 1]  # PENDING and RUNNING
    assert ended(samples) == {}
    workers.server.open_gate("gate")
    both = {("block", "SUCCEEDED"): 1, ("after", "SUCCEEDED"): 1}
    workers.wait_for(lambda samples: ended(samples) == both, "both tasks to end")
    workers.wait_for(lambda samples: gauge(samples, "unfinished", stuck) == [0, 0], "the gauges of that")


def test_what_a_reload_abandons_is_counted(workers: Workers) -> None:
    """G8: the task that a worker abandons as it is replaced is in the next one's scrape."""
    assert workers.post("/hang").status_code == 200
    workers.wait_for(lambda samples: any(1 in gauge(samples, "unfinished", pid) for pid in pids(samples)), "it")
    workers.server.send_signal(signal.SIGHUP)
    samples = workers.wait_for(lambda samples: ended(samples), "the old worker to abandon its task")
    assert ended(samples) == {("hang", "ABANDONED"): 1}


def test_queries_name_what_workers_export(workers: Workers) -> None:
    """Every query of the dashboard and of the alerts names metrics and labels that the recipe exports."""
    workers.post("/signup/ada")
    workers.wait_for(lambda samples: ended(samples) and pids(samples), "the task and the gauges")
    check_names(workers.metrics())


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: Debian's package `prometheus` has it")
@pytest.mark.parametrize("command", [("check", ALERTS), ("test", UNIT_TESTS)], ids=["check", "test"])
def test_prometheus_takes_the_rules(command: tuple[str, Path]) -> None:
    """Prometheus reads the rules, and they fire when they should and not before."""
    verb, file = command
    run = subprocess.run([str(PROMTOOL), verb, "rules", str(file)], capture_output=True, text=True)
    assert (run.returncode, "SUCCESS" in run.stdout) == (0, True), run.stdout + run.stderr
