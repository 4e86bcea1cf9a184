"""The tests' own helpers: a missing service and a process that misbehaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from . import services
from .services import (
    RABBITMQ,
    free_port,
    need,
    need_program,
    process,
    redis_server,
    wait_until,
    what_is_wrong,
)


@pytest.mark.parametrize("url", ["redis://{}", "amqp://guest:guest@{}", "postgresql://postgres@{}"])
def test_missing_service(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing service skips a test with its name and address, and fails it in CI."""
    address = f"127.0.0.1:{free_port()}"
    url = url.format(address)
    missing = f"no (Redis|RabbitMQ|PostgreSQL) at {address}, see docs/contributing.md "
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=missing):
        need(url)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=missing):
        need(url)


def test_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not on the path skips a test, and fails it in CI."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no redis-server on PATH"):
        redis_server(free_port(), tmp_path).__enter__()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no redis-server on PATH"):
        need_program("redis-server")


def test_refused_login() -> None:
    """A service that does not let the tests in is as good as none."""
    wrong = urlsplit(need(RABBITMQ))
    url = wrong._replace(netloc=f"nobody:wrong@{wrong.hostname}:{wrong.port}").geturl()
    assert "no RabbitMQ at " in str(what_is_wrong(url))


def test_process_that_ignores_sigterm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends with its block, and what it wrote is shown if the block failed."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    log = tmp_path / "log"
    monkeypatch.setattr(services, "PATIENCE", 0.1)
    with pytest.raises(KeyError), process(sys.executable, "-c", code, log=log) as child:
        wait_until(lambda: log.read_text() == "up\n", "the process")
        raise KeyError
    assert child.returncode == -signal.SIGKILL
    assert capsys.readouterr().out.endswith("\nup\n\n")
