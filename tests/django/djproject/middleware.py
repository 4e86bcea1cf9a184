"""Middleware that defers, and one that is sync, under which Django runs async views in a sync thread."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import Any

from django.utils.decorators import sync_and_async_middleware

from asgi_deferred import defer

from .journal import journal


@sync_and_async_middleware
def defer_in_middleware(get_response: Any) -> Any:
    def note(request: Any) -> None:
        if request.path == "/middleware":
            defer(journal.append, "task")

    async def async_middleware(request: Any) -> Any:
        note(request)
        return await get_response(request)

    def sync_middleware(request: Any) -> Any:
        note(request)
        return get_response(request)

    return async_middleware if iscoroutinefunction(get_response) else sync_middleware


def sync_only(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        return get_response(request)

    return middleware
