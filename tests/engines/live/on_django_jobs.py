from __future__ import annotations

import sys
from typing import Any

import django

django.setup()  # before what imports models

if sys.version_info >= (3, 12):
    from django.tasks import task
else:  # pragma: no cover - Django 6 needs Python 3.12
    from django_tasks import task

from django_tasks_db.models import DBTaskResult  # noqa: E402

from .common import nothing_to_open, save  # noqa: E402


@task
def job(token: str) -> str:
    return save(token)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    found = DBTaskResult.objects.filter(args_kwargs__args=[token], status="SUCCESSFUL")
    return [result.return_value async for result in found] == [token.upper()] and token.upper()


opened = nothing_to_open
