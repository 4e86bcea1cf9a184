"""A Django without a project: its task framework with the backend for tests."""

from __future__ import annotations

from typing import Any

from django.conf import settings

if not settings.configured:
    settings.configure(
        TASKS={"default": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"}},
        DATABASES={},
    )

from django.tasks import task  # noqa: E402


@task
def django_job(a: int, b: int = 0) -> Any:
    from .test_recognition import ran

    ran.append((a, b))
