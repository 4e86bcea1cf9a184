"""A task of Django's with the backend for tests, in the project that all tests of this process share."""

from __future__ import annotations

from typing import Any

from django.tasks import task

from tests.django import dj  # noqa: F401 - sets Django up


@task(backend="dummy")
def django_job(a: int, b: int = 0) -> Any:
    from .test_recognition import ran

    ran.append((a, b))
