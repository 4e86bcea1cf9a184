"""Django's tasks in a process without a project: on the backend for tests, and on one that runs them in the process."""

from __future__ import annotations

import sys
from typing import Any

import anyio
from django.conf import settings

if sys.version_info >= (3, 12):
    PACKAGE = "django.tasks"
else:  # pragma: no cover - Django 6 needs Python 3.12
    PACKAGE = "django_tasks"

settings.configure(
    TASKS={
        "default": {"BACKEND": f"{PACKAGE}.backends.dummy.DummyBackend"},
        "here": {"BACKEND": "asgi_deferred.django.DeferredBackend"},
    }
)

if sys.version_info >= (3, 12):
    from django.tasks import task
    from django.tasks.signals import task_enqueued
else:  # pragma: no cover
    from django_tasks import task
    from django_tasks.signals import task_enqueued

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner  # noqa: E402
from asgi_deferred.testing import inline  # noqa: E402
from tests.support import Log, request, responder  # noqa: E402

log = Log()


@task
def job(a: int, b: int = 0) -> None:
    log.append(f"ran {a} {b}")


def note(task_result: Any, **_: Any) -> None:
    log.append(f"enqueued {task_result.args} {task_result.kwargs}")


def add(tasks: DeferredTasks) -> None:
    tasks.options(durable=True).add_task(job, 1, b=2)
    tasks.add_task(job, 3)
    if sys.version_info >= (3, 12):
        try:
            tasks.options(durable=True).add_task(job.using(backend="here"), 5)
        except TypeError as exc:
            log.append(f"{exc}")


async def main() -> None:
    async with Runner(observers=[log]) as runner:
        await request(DeferredMiddleware(responder(add), runner), log)
    with inline():
        await request(DeferredMiddleware(responder(lambda tasks: tasks.add_task(job, 4))), log)


task_enqueued.connect(note)
anyio.run(main, backend=sys.argv[1])
print(callable(job), *log, sep="\n")
