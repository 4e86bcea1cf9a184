"""Django: defer work in a project that runs on ASGI.

In `asgi.py`:

    from asgi_deferred.django import DeferredMiddleware

    application = DeferredMiddleware(get_asgi_application())

From Django 6.0 on, in `settings.py`:

    TASKS = {"default": {"BACKEND": "asgi_deferred.django.DeferredBackend"}}

If you add this module to INSTALLED_APPS, Django's system checks warn you about a set-up in which nothing is deferred.
"""

from __future__ import annotations

import django

from ._django import DeferredMiddleware, capture_deferred

__all__ = ["DeferredBackend", "DeferredMiddleware", "capture_deferred"]

if django.VERSION >= (6, 0):
    from ._django_tasks import DeferredBackend
else:  # pragma: no cover
    __all__.remove("DeferredBackend")  # noqa: PYI056 - mypy and pyright both know it
