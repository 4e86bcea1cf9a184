"""Settings of gunicorn for `examples.prometheus_workers`."""

from __future__ import annotations

from typing import Any

from prometheus_client.multiprocess import mark_process_dead

workers = 2
worker_class = "uvicorn_worker.UvicornWorker"
graceful_timeout = 30  # for requests, then the runner's drain_timeout and a second more


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid)  # its gauges go; what it has counted stays
