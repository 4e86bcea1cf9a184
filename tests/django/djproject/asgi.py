"""For servers: limits from the environment."""

from __future__ import annotations

import os

from django.core.asgi import get_asgi_application

from asgi_deferred import Runner
from asgi_deferred.django import DeferredMiddleware

application = DeferredMiddleware(
    get_asgi_application(),
    runner=Runner(
        max_concurrency=int(os.environ.get("DJPROJECT_CONCURRENCY", "1000")),
        max_threads=int(os.environ.get("DJPROJECT_THREADS", "40")),
    ),
)
