"""Servers as processes of their own, on a port that they choose."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).parent.parent.parent


class Server:
    """A running server: its address, and the lines it has written."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        assert process.stderr is not None
        address = None
        while address is None:
            line = process.stderr.readline()
            assert line, f"the server ended: {self.lines}"
            self.lines.append(line.rstrip("\n"))
            address = re.search(r"(?:running on http://|on TCP address )(127\.0\.0\.1:\d+)", line)
        self.address = address[1]
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stderr)

    def terminate(self) -> int:
        """End it as a deploy does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self._reader.join(30)
        return code


COMMANDS = {
    "uvicorn": ("uvicorn", "--host", "127.0.0.1", "--port", "0", "--no-access-log"),
    "daphne": ("daphne", "-b", "127.0.0.1", "-p", "0"),
}


@contextmanager
def serve(
    name: str, application: str, environ: dict[str, str] | None = None, folder: Path = ROOT, *, migrate: bool = False
) -> Iterator[Server]:
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}
    if migrate:
        subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], cwd=folder, env=environ, check=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *COMMANDS[name], application],
        cwd=folder,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
