"""Tasks in Django's sense."""

from __future__ import annotations

from typing import Any

from anyio import sleep_forever
from django.tasks import TaskContext, TaskResultStatus, task

from .journal import journal
from .models import Entry


@task
def add(a: int, b: int) -> int:
    journal.append(f"add {a} {b}")
    return a + b


@task
async def aadd(a: int, b: int) -> int:
    journal.append(f"aadd {a} {b} of {await Entry.objects.acount()}")
    return a + b


@task(backend="careful")
def careful(a: int) -> int:
    journal.append(f"careful {a}")
    return a


@task(takes_context=True)
def attempt(context: TaskContext[..., Any], text: str) -> list[Any]:
    assert context.task_result.status == TaskResultStatus.RUNNING
    return [text, context.attempt, context.task_result.id]


@task(takes_context=True)
async def aattempt(context: TaskContext[..., Any], text: str) -> list[Any]:
    assert context.task_result.status == TaskResultStatus.RUNNING
    return [text, context.attempt, context.task_result.id]


@task
def fail() -> None:
    raise LookupError("as told")


@task
async def afail() -> None:
    raise LookupError("as told")


@task
def odd_result() -> object:
    return object()


@task
async def hang() -> None:
    journal.append("hangs")
    await sleep_forever()


@task
def nested() -> None:
    add.enqueue(1, 1)
    journal.append("nested")
