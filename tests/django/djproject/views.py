"""Views that defer, one way each."""

from __future__ import annotations

from asyncio import sleep as asleep
from collections.abc import AsyncIterator
from functools import partial
from time import sleep
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import BadRequest
from django.core.signals import request_started
from django.db import transaction
from django.db.models.signals import post_save
from django.dispatch import receiver
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.views import View

from asgi_deferred import current_tasks, defer, tasks_from

from .journal import journal
from .models import Entry


async def async_task() -> None:
    journal.append("task")


async def async_orm_task() -> None:
    journal.append(f"{await Entry.objects.acount()} entries")


def count_task() -> None:
    journal.append(f"{Entry.objects.count()} entries")


def sync_view(request: HttpRequest) -> HttpResponse:
    defer(journal.append, "task")
    return HttpResponse("ok")


async def async_view(request: HttpRequest) -> HttpResponse:
    defer(async_task)
    return HttpResponse("ok")


def from_request(request: HttpRequest) -> HttpResponse:
    tasks_from(request).add_task(journal.append, "task")
    return HttpResponse("ok")


async def async_from_request(request: HttpRequest) -> HttpResponse:
    tasks_from(request).add_task(journal.append, "task")
    return HttpResponse("ok")


class SyncClass(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        defer(journal.append, "task")
        return HttpResponse("ok")


class AsyncClass(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        tasks_from(self.request).add_task(async_task)
        return HttpResponse("ok")


def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok")


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        yield b"o"
        defer(journal.append, "task")
        yield b"k"

    return StreamingHttpResponse(parts())


@receiver(request_started)
def on_request_started(scope: Any = None, **_: Any) -> None:
    if scope is not None and scope["path"] == "/signal":
        defer(journal.append, "task")


@receiver(post_save, sender=Entry)
def on_saved(instance: Entry, **_: Any) -> None:
    if instance.text == "signalled":
        defer(journal.append, "task")


def saves(request: HttpRequest) -> HttpResponse:
    Entry.objects.create(text="signalled")
    return HttpResponse("ok")


async def asaves(request: HttpRequest) -> HttpResponse:
    await Entry.objects.acreate(text="signalled")
    return HttpResponse("ok")


def bridged(request: HttpRequest) -> HttpResponse:
    async def inner() -> None:
        defer(async_orm_task)

    async_to_sync(inner)()
    return HttpResponse("ok")


async def async_orm(request: HttpRequest) -> HttpResponse:
    defer(async_orm_task)
    return HttpResponse("ok")


def write(request: HttpRequest) -> HttpResponse:
    Entry.objects.create(text="written")
    defer(count_task)
    defer(async_orm_task)
    transaction.on_commit(partial(defer, journal.append, "committed"))  # pyright: ignore[reportArgumentType]
    if "fail" in request.GET:
        raise ValueError("after the write")
    if "bad" in request.GET:
        raise BadRequest("after the write")
    return HttpResponse("ok")


@transaction.non_atomic_requests
async def async_write(request: HttpRequest) -> HttpResponse:
    @sync_to_async
    @transaction.atomic
    def in_transaction() -> None:
        Entry.objects.create(text="written")
        defer(count_task)
        defer(async_orm_task)
        transaction.on_commit(partial(defer, journal.append, "committed"))  # pyright: ignore[reportArgumentType]
        if "fail" in request.GET:
            raise ValueError("after the write")

    await in_transaction()
    return HttpResponse("ok")


def write_later(text: str) -> None:
    Entry.objects.create(text=text)


async def awrite_later(text: str) -> None:
    await Entry.objects.acreate(text=text)


def load(request: HttpRequest) -> HttpResponse:
    if "database" in request.GET:
        Entry.objects.exists()
    defer(write_later, "sync")
    defer(awrite_later, "async")
    return HttpResponse("ok", status=202)


def slow(request: HttpRequest) -> HttpResponse:
    defer(write_later, "begun")
    defer(sleep, 0.3)
    defer(write_later, "sync")
    defer(asleep, 0.3)
    defer(awrite_later, "async")
    return HttpResponse("ok", status=202)


async def aload(request: HttpRequest) -> HttpResponse:
    if "database" in request.GET:
        await Entry.objects.aexists()
    defer(write_later, "sync")
    defer(awrite_later, "async")
    return HttpResponse("ok", status=202)


hooked: list[Any] = []


def hook(request: HttpRequest) -> HttpResponseBase:
    """Call what a test put there."""
    result = hooked.pop()(request)
    return result if isinstance(result, HttpResponseBase) else HttpResponse("ok")


async def ahook(request: HttpRequest) -> HttpResponseBase:
    result = await hooked.pop()(request)
    return result if isinstance(result, HttpResponseBase) else HttpResponse("ok")


async def statistics(request: HttpRequest) -> HttpResponse:
    host: Any = current_tasks()._host
    return JsonResponse(host.account.statistics()._asdict())
