"""A Django project on real servers."""

from __future__ import annotations

from contextlib import closing
from http.client import HTTPConnection
from time import monotonic

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from . import dj  # noqa: F401 - makes the database
from .djproject.models import Entry
from .serve import COMMANDS, serve

pytestmark = pytest.mark.servers

APPLICATION = "tests.django.djproject.asgi:application"


@pytest.mark.parametrize("name", COMMANDS)
def test_sigterm(name: str) -> None:
    """G8, G9: tasks, sync and async, run to their end although the server is told to stop while they run."""
    with serve(name, APPLICATION) as server:
        with closing(HTTPConnection(server.address, timeout=30)) as client:
            client.request("GET", "/slow")
            response = client.getresponse()
            assert (response.status, response.read()) == (202, b"ok")
            deadline = monotonic() + 30
            while not Entry.objects.exists():
                assert monotonic() < deadline
        server.terminate()
    assert [entry.text for entry in Entry.objects.order_by("pk")] == ["begun", "sync", "async"]


@pytest.mark.parametrize("name", COMMANDS)
def test_websocket(name: str) -> None:
    """A websocket that Django has no answer for is refused by a 403, and the server has no error to log."""
    with serve(name, APPLICATION) as server:
        with pytest.raises(InvalidStatus) as caught:
            connect(f"ws://{server.address}/", open_timeout=30)
        assert caught.value.response.status_code == 403
        server.terminate()
    assert [line for line in server.lines if "Traceback" in line or "Error" in line] == []
