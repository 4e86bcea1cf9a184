"""Django: deferred work in a project that runs on ASGI.

In `asgi.py`:

    from asgi_deferred.django import DeferredMiddleware

    application = DeferredMiddleware(get_asgi_application())

and, from Django 6.0 on, in `settings.py`:

    TASKS = {"default": {"BACKEND": "asgi_deferred.django.DeferredBackend"}}
"""

from __future__ import annotations

import django

from ._django import DeferredMiddleware, capture_deferred

__all__ = ["DeferredMiddleware", "capture_deferred"]

if django.VERSION >= (6, 0):
    from ._django_tasks import DeferredBackend as DeferredBackend  # noqa: PLC0414 - type checkers see no change of __all__

    __all__ = ["DeferredBackend", *__all__]
