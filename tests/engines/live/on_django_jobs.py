from __future__ import annotations

from typing import Any

import django

django.setup()

from django.tasks import task  # noqa: E402
from django_tasks_db.models import DBTaskResult  # noqa: E402

from .common import nothing_to_open, save  # noqa: E402


@task
def job(token: str) -> str:
    return save(token)


def identified(token: str) -> Any:
    return job


async def look(token: str) -> Any:
    async for result in DBTaskResult.objects.filter(args_kwargs__args=[token], status="SUCCESSFUL"):
        return result.return_value
    return None


opened = nothing_to_open
