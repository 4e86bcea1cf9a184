"""A path for each view, by its name."""

from __future__ import annotations

from django.urls import path

from . import views

urlpatterns = [
    *[
        path(view.__name__, view)
        for view in (
            views.sync_view,
            views.async_view,
            views.from_request,
            views.async_from_request,
            views.stream,
            views.saves,
            views.asaves,
            views.bridged,
            views.async_orm,
            views.write,
            views.async_write,
            views.load,
            views.aload,
            views.slow,
            views.hook,
            views.ahook,
            views.statistics,
        )
    ],
    path("sync_class", views.SyncClass.as_view()),
    path("async_class", views.AsyncClass.as_view()),
    path("middleware", views.plain),
    path("signal", views.plain),
    path("plain", views.plain),
]
