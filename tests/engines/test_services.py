"""The tests' own helpers: a missing service and a process that misbehaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from . import services
from .services import free_port, need, process, wait_until


def test_missing_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing service skips a test, and fails it in CI."""
    url = f"redis://127.0.0.1:{free_port()}"
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no redis service"):
        need(url)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no redis service"):
        need(url)


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
