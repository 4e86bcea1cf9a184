"""The examples about engines, run against real brokers and workers."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path
from subprocess import run
from typing import Any

import anyio
import httpx
import pytest
import redis

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner
from tests.support import Log, request, responder

from .services import REDIS, ROOT, database, free_port, need, redis_server, wait_until, web

done: list[Any] = []


def report(user: int) -> None:
    done.append(("report", user))


async def report_arq(ctx: dict[Any, Any], user: int) -> None:
    done.append(("arq", user))


async def report_saq(ctx: Any, *, user: int) -> None:
    done.append(("saq", user))


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    done.clear()
    name = f"asgi-deferred-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("REDIS_URL", need(REDIS))
    monkeypatch.setenv("RQ_QUEUE", name)
    monkeypatch.setenv("SAQ_QUEUE", name)
    return name


async def serve(task: Any, *args: Any, **kwargs: Any) -> Log:
    """Answer one request that defers `task` durably."""
    log = Log()

    def add(tasks: DeferredTasks) -> None:
        tasks.options(durable=True, name="job").add_task(task, *args, **kwargs)

    async with Runner(observers=[log]) as runner:
        await request(DeferredMiddleware(responder(add), runner), log)
    return log


STORED_FIRST = ["job RUNNING", "job SUCCEEDED", "http.response.start", "http.response.body", "returned"]


def test_rq(name: str) -> None:
    """G1: an RQ job by `__defer_enqueue__` is stored before the response, and RQ's worker does it."""
    import rq

    from examples.engine_rq import OnRQ, queue

    assert anyio.run(serve, OnRQ(report), 1) == STORED_FIRST
    assert done == []
    rq.SimpleWorker([queue], connection=queue.connection).work(burst=True)
    queue.connection.close()
    OnRQ(report)(2)
    assert done == [("report", 1), ("report", 2)]


@pytest.mark.filterwarnings("ignore:Call to deprecated close:DeprecationWarning")  # arq's own call
def test_arq(name: str) -> None:
    """G1: an arq job by an async `__defer_enqueue__` is stored before the response, and arq's worker does it."""
    from arq import create_pool
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    from examples.engine_arq import OnArq

    async def main() -> None:
        OnArq.pool = await create_pool(RedisSettings.from_dsn(REDIS), default_queue_name=name)
        assert await serve(OnArq(report_arq), 1) == STORED_FIRST
        assert done == []
        worker = Worker(
            [func(report_arq, name="report_arq")],
            queue_name=name,
            redis_pool=OnArq.pool,
            burst=True,
            handle_signals=False,
            poll_delay=0.05,
        )
        await worker.main()
        await worker.close()
        await OnArq(report_arq)(2)

    anyio.run(main)
    assert done == [("arq", 1), ("arq", 2)]


def test_saq(name: str) -> None:
    """G1: a SAQ job by `register()` is stored before the response, and SAQ's worker does it."""
    import saq

    from examples.engine_saq import SaqJob, queue

    async def main() -> None:
        assert await serve(SaqJob("report_saq"), user=1) == STORED_FIRST
        assert done == []
        worker = saq.Worker(queue, functions=[report_saq], burst=True, dequeue_timeout=0.1)
        await worker.start()
        await queue.disconnect()

    anyio.run(main)
    assert done == [("saq", 1)]
    with pytest.raises(NotImplementedError):
        SaqJob("report_saq")()


def test_dbos(name: str) -> None:
    """G1: a DBOS workflow by `__defer_enqueue__` is stored before the response, and DBOS does it."""
    with database(name) as url:
        out = run(
            [sys.executable, "-m", "tests.engines.live.dbos_main"],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert out.stdout.splitlines() == [*STORED_FIRST, "report 1", "report 2"], out.stderr


def test_drain_hands_over_first(tmp_path: Path) -> None:
    """G8: at SIGTERM, with a task stuck, the engine's jobs behind it are stored, and the plain ones run at the next start."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    env = {"ENGINE": "tests.engines.live.on_taskiq", "BROKER_URL": url, "REDIS_URL": url, "PREFIX": "p"}
    env |= {"PLACE": str(tmp_path), "LEFT": str(tmp_path / "left.jsonl"), "DRAIN_TIMEOUT": "0.5"}
    with redis_server(port, tmp_path), redis.Redis.from_url(url) as broker:
        with web(tmp_path, **env) as (address, server):
            httpx.post(f"{address}/stuck", params={"token": ["first", "second"]}).raise_for_status()
            assert broker.xlen("p") == 0
            server.terminate()
            assert server.wait(10) in (0, -signal.SIGTERM)
        assert broker.xlen("p") == 2
        assert not (tmp_path / "first.plain").exists()
        with web(tmp_path, **env):
            wait_until(lambda: (tmp_path / "second.plain").exists(), "what was left to run again")
        assert (tmp_path / "first.plain").exists()
        assert not (tmp_path / "left.jsonl").exists()
