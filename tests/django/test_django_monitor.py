"""The live page in Django, as its guide mounts it."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from django.contrib.auth import login
from django.contrib.auth.models import User
from django.http import HttpRequest
from django.test import override_settings
from starlette.testclient import TestClient

from tests.test_docs import shown

from . import dj  # noqa: F401 - sets Django up

COOKIES = override_settings(SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies")


def session(user: User) -> str:
    """Log a user in; return the session's cookie."""
    request: Any = HttpRequest()
    request.session = import_module("django.contrib.sessions.backends.signed_cookies").SessionStore()
    login(request, user)
    request.session.save()
    return str(request.session.session_key)


@COOKIES
def test_staff_alone_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member of the staff who has logged in sees the page, and nobody else does."""
    module = ModuleType("asgi")
    monkeypatch.setitem(sys.modules, "asgi", module)
    exec(shown("def is_staff"), vars(module))
    client = TestClient(module.application)
    assert client.get("/deferred").status_code == 403
    users = [User.objects.create_user(name, is_staff=name == "ada") for name in ("ada", "eve")]
    statuses = []
    for user in users:
        client.cookies.set("sessionid", session(user))
        statuses.append(client.get("/deferred/").status_code)
        user.delete()
    assert statuses == [200, 403]
    client.cookies.set("sessionid", "made up")
    assert client.get("/deferred").status_code == 403
