"""Real brokers and real workers: what the application defers, another process does."""

from __future__ import annotations

import os
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from subprocess import run

import httpx
import pytest

from .services import POSTGRES, RABBITMQ, REDIS, ROOT, database, need, process, wait_until, web

pytestmark = pytest.mark.servers

LIVE = "tests.engines.live"
BIN = Path(sys.executable).parent

WORKERS = {
    "taskiq": [f"{BIN}/taskiq", "worker", "--workers=1", "--log-level=WARNING", f"{LIVE}.on_taskiq:broker"],
    "celery": [
        sys.executable,
        "-m",
        "celery",
        f"--app={LIVE}.on_celery",
        "worker",
        "--pool=solo",
        "--loglevel=WARNING",
    ],
    "dramatiq": [f"{BIN}/dramatiq", f"{LIVE}.on_dramatiq", "--processes=1", "--threads=1"],
    "huey": [f"{BIN}/huey_consumer", f"{LIVE}.on_huey.queue", "--workers=1", "--delay=0.1"],
    "streaq": [f"{BIN}/streaq", "run", f"{LIVE}.on_streaq:worker"],
    "procrastinate": [f"{BIN}/procrastinate", f"--app={LIVE}.on_procrastinate.app", "worker"],
    "django": [sys.executable, "-m", "django", "db_worker", "--interval=0.1", "--no-startup-delay", "--no-reload"],
}
SCHEMA = {
    "procrastinate": [f"{BIN}/procrastinate", f"--app={LIVE}.on_procrastinate.app", "schema", "--apply"],
    "django": [sys.executable, "-m", "django", "migrate", "--verbosity=0"],
}


@pytest.mark.parametrize(
    ("engine", "broker"),
    [
        ("taskiq", REDIS),
        ("taskiq", RABBITMQ),
        ("celery", REDIS),
        ("celery", RABBITMQ),
        ("dramatiq", REDIS),
        ("huey", REDIS),
        ("streaq", REDIS),
        ("procrastinate", POSTGRES),
        ("django", POSTGRES),
    ],
    ids=lambda value: value.partition(":")[0],
)
def test_another_process_does_the_job(engine: str, broker: str, tmp_path: Path) -> None:
    """G1: a job deferred under uvicorn, durable or not, is done by the engine's worker, and its result is where a user looks."""
    need(REDIS)
    prefix = f"asgi-deferred-{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        url = stack.enter_context(database(prefix)) if broker == POSTGRES else need(broker)
        module = f"{LIVE}.on_django_jobs" if engine == "django" else f"{LIVE}.on_{engine}"
        env = {"ENGINE": module, "BROKER_URL": url, "REDIS_URL": REDIS, "PREFIX": prefix, "PLACE": str(tmp_path)}
        if engine == "django":
            env["DJANGO_SETTINGS_MODULE"] = f"{LIVE}.on_django"
        env["PYTHONPATH"] = str(ROOT)
        if engine in SCHEMA:
            run(SCHEMA[engine], check=True, cwd=ROOT, env={**os.environ, **env}, timeout=60)
        address, _ = stack.enter_context(web(tmp_path, **env))
        stack.enter_context(process(*WORKERS[engine], log=tmp_path / "worker.log", **env))
        client = stack.enter_context(httpx.Client(base_url=address, timeout=30))
        sent = [
            client.post("/submit?identified&token=after"),
            client.post("/submit?identified&durable&token=before"),
            client.post("/submit?durable&token=by-name&token=twice"),
        ]
        assert [response.status_code for response in sent] == [202, 202, 202]
        for token in ("after", "before", "by-name", "twice"):
            wait_until((tmp_path / token).exists, f"the job {token}")
            assert int((tmp_path / token).read_text()) != sent[0].json()["web"]
        for token in ("after", "before"):

            def has_result(token: str = token) -> bool:
                return bool(client.get("/look", params={"token": token}).json() == token.upper())

            wait_until(has_result, f"the result of {token}")
        told = client.get("/tell").json()
        assert sorted(told) == [*["job SUCCEEDED"] * 4, *["plain SUCCEEDED"] * 3]
