"""What becomes of a job whose worker is killed (SIGKILL), each engine as it comes: `python -m benchmarks.worker_dies`.

A job is begun, its worker killed, and another worker started at once: is the job done within two minutes?
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import httpx

from benchmarks.engines import ENGINES
from tests.engines.services import POSTGRES, REDIS, ROOT, database, process, wait_until, web
from tests.engines.test_live import LIVE, SCHEMA, WORKERS

PATIENCE = 120.0


def fate(engine: str, broker: str) -> str:
    with ExitStack() as stack:
        prefix = f"asgi-deferred-{uuid.uuid4().hex[:8]}"
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(database(prefix)) if broker == POSTGRES else broker
        module = f"{LIVE}.on_django_jobs" if engine == "django" else f"{LIVE}.on_{engine}"
        env = {"ENGINE": module, "BROKER_URL": url, "REDIS_URL": REDIS, "PREFIX": prefix, "PLACE": str(place)}
        env["PYTHONPATH"] = str(ROOT)
        if engine == "django":
            env["DJANGO_SETTINGS_MODULE"] = f"{LIVE}.on_django"
        if engine in SCHEMA:
            subprocess.run(SCHEMA[engine], check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
        address, _ = stack.enter_context(web(place, **env))
        with process(*WORKERS[engine], log=place / "worker.log", **env) as worker:
            httpx.post(f"{address}/submit?durable&token=hang").raise_for_status()
            wait_until((place / "hanging").exists, "the job to begin")
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        killed = monotonic()
        with process(*WORKERS[engine], log=place / "worker.log", **env):
            while monotonic() - killed < PATIENCE:
                if (place / "hang").exists():
                    return f"done again, {monotonic() - killed:.0f} s after the kill"
                sleep(0.1)
    return f"not done again within {PATIENCE:.0f} s"


if __name__ == "__main__":
    for engine, broker in ENGINES:
        print(f"{engine + ' on ' + broker.partition(':')[0]:28}{fate(engine, broker)}", flush=True)
