"""A broker that is paused, killed, away and back again, under a durable 202."""

from __future__ import annotations

import signal
import uuid
from pathlib import Path

import httpx
import pytest
import redis

from .services import free_port, redis_server, wait_until, web

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("engine", ["taskiq", "celery", "dramatiq", "huey"])
def test_what_the_client_is_told(engine: str, tmp_path: Path) -> None:
    """G2, G11: 202 only if every durable job was stored, else 503: through a pause, a kill between two, an outage, a restart."""
    port, prefix = free_port(), uuid.uuid4().hex[:8]
    url = f"redis://127.0.0.1:{port}"
    env = {"ENGINE": f"tests.engines.live.on_{engine}", "BROKER_URL": url, "REDIS_URL": url, "PREFIX": prefix}
    env |= {"PLACE": str(tmp_path), "ENQUEUE_TIMEOUT": "1.5"}

    def submit(query: str) -> tuple[int, list[str]]:
        response = client.post(f"/submit?{query}")
        assert (response.status_code == 503) == ("retry-after" in response.headers)
        told: list[str] = []

        def all_told() -> bool:
            told.extend(client.get("/tell").json())
            return len(told) > query.count("token")

        wait_until(all_told, "the tasks' ends")
        return response.status_code, told

    def back_again() -> bool:
        return submit("durable&token=1") == (202, ["job SUCCEEDED", "plain SUCCEEDED"])

    def stored() -> int:
        key = {"taskiq": prefix, "celery": prefix, "dramatiq": f"{prefix}:default", "huey": f"huey.redis.{prefix}"}[
            engine
        ]
        with redis.Redis.from_url(url) as broker:
            return int(broker.xlen(key) if engine == "taskiq" else broker.llen(key))

    with redis_server(port, tmp_path) as broker, web(tmp_path, **env) as (address, _):
        with httpx.Client(base_url=address, timeout=30) as client:
            assert submit("durable&token=1&token=2") == (202, ["job SUCCEEDED"] * 2 + ["plain SUCCEEDED"])
            assert stored() == 2

            broker.send_signal(signal.SIGSTOP)
            assert submit("durable&token=1") == (503, ["job TIMED_OUT", "plain SKIPPED"])
            broker.send_signal(signal.SIGCONT)
            wait_until(back_again, "the broker to answer again")
            assert stored() >= 4  # the outcome of the one that timed out was unknown, and it is stored after all

            status, lines = submit(f"durable&token=1&token=kill-{broker.pid}&token=2&token=3")
            broker.wait()
            assert (status, lines[:2], lines[3:]) == (
                503,
                ["job SUCCEEDED", "kill SUCCEEDED"],
                ["plain SKIPPED", "job SKIPPED"],
            )
            assert lines[2] in ("job FAILED", "job TIMED_OUT")

            status, lines = submit("durable&token=1")
            assert (status, lines[0][:4], lines[1:]) == (503, "job ", ["plain SKIPPED"])
            status, lines = submit("token=1")
            assert (status, lines[0]) == (202, "plain SUCCEEDED")
            assert lines[1] in ("job FAILED", "job TIMED_OUT")

            with redis_server(port, tmp_path):
                wait_until(back_again, "the broker to be used again")
                assert stored() >= 1
