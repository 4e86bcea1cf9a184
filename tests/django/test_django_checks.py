"""What Django's system checks say of a project whose requests do not go through the middleware."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from django.conf import settings
from django.core.checks import run_checks
from django.core.management import get_commands
from django.test import override_settings

import django

from . import dj  # noqa: F401 - sets Django up

TASKS = {"default": {"BACKEND": "asgi_deferred.django.DeferredBackend"}} if django.VERSION >= (6, 0) else {}


@pytest.mark.parametrize(
    ("argv", "apps", "expected"),
    [
        (["manage.py", "runserver", "8000"], [], ["asgi_deferred.W005"]),
        (["manage.py", "runserver"], ["django.contrib.staticfiles"], ["asgi_deferred.W005"]),
        (["manage.py", "check"], [], []),
        (["manage.py"], [], []),
    ],
)
@override_settings(TASKS=TASKS, STATIC_URL="static/")
def test_runserver(argv: list[str], apps: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A system check warns when Django's own `runserver` is about to serve by WSGI, and says what serves by ASGI."""
    forget_commands = cast("Any", get_commands).cache_clear
    monkeypatch.setattr(sys, "argv", argv)
    with override_settings(INSTALLED_APPS=[*apps, *settings.INSTALLED_APPS]):
        forget_commands()
        messages = run_checks()
    forget_commands()
    assert [message.id for message in messages] == expected
    assert all('"daphne" first in INSTALLED_APPS' in str(message.hint) for message in messages)


@pytest.mark.parametrize(
    ("apps", "application", "expected"),
    [
        (["django.contrib.staticfiles"], "asgi", ["W005"]),
        (["daphne", "django.contrib.staticfiles"], "asgi", []),
        (["daphne", "django.contrib.staticfiles"], "bare", ["W002"] if TASKS else []),
    ],
)
def test_of_a_process(apps: list[str], application: str, expected: list[str], tmp_path: Path) -> None:
    """In a process that is `runserver`, the checks find WSGI and a bare application, and nothing wrong with daphne."""
    (tmp_path / "bare.py").write_text(
        "from django.core.asgi import get_asgi_application\napplication = get_asgi_application()\n"
    )
    path = "bare.application" if application == "bare" else "tests.django.djproject.asgi.application"
    (tmp_path / "more_settings.py").write_text(
        "from tests.django.djproject.settings import *\n"
        f"INSTALLED_APPS = {apps!r} + INSTALLED_APPS\nASGI_APPLICATION = {path!r}\nTASKS = {TASKS!r}\n"
        "STATIC_URL = 'static/'\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that it ends once it has checked
        run = subprocess.run(
            [sys.executable, "-m", "django", "runserver", "--noreload", f"127.0.0.1:{taken.getsockname()[1]}"],
            env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}.", "DJANGO_SETTINGS_MODULE": "more_settings"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    output = run.stdout + run.stderr
    assert "System check identified" in output, output
    assert re.findall(r"\(\w+\.(\w\d+)\)", output) == expected, output
