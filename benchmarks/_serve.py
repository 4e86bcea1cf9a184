"""Servers as processes on a free loopback port, and the load generator beside them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

APP = "benchmarks.served:app"
SERVERS: dict[str, list[str]] = {
    "uvicorn": ["-m", "uvicorn", APP, "--no-access-log", "--log-level", "critical", "--port", "{port}"],
    "gunicorn": [
        "-m",
        "gunicorn",
        APP,
        "-k",
        "uvicorn_worker.UvicornWorker",
        "--log-level",
        "critical",
        "-b",
        ":{port}",
    ],
    "hypercorn": ["-m", "hypercorn", APP, "--log-level", "critical", "-b", "127.0.0.1:{port}"],
    "daphne": ["-m", "daphne", "-v", "0", "-p", "{port}", APP],
    "granian": [
        "-m",
        "granian",
        APP,
        "--interface",
        "asgi",
        "--no-access-log",
        "--log-level",
        "critical",
        "--port",
        "{port}",
    ],
}
FAST = ["--loop", "uvloop", "--http", "httptools"]


@dataclass
class Served:
    """A server that accepts connections."""

    process: subprocess.Popen[bytes]
    port: int

    def get(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            text: str = response.read().decode()
        return text

    def cpu_seconds(self) -> float:
        """Return the processor time that the server has used: what other processes take does not count in it."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, path: str, **options: Any) -> dict[str, Any]:
        return finish(self.start_load(path, **options))

    def start_load(self, path: str, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.load", f"http://127.0.0.1:{self.port}{path}"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)


def finish(load: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, _ = load.communicate()
    figures: dict[str, Any] = json.loads(out)
    return figures


@contextmanager
def serve(app: str, *extra: str, server: str = "uvicorn", **environ: str) -> Iterator[Served]:
    """Serve one of the applications of `served`; the server is killed if it is still there at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.format(port=port) for part in SERVERS[server]]
    process = subprocess.Popen(
        [sys.executable, *command, *extra],
        env=os.environ | {"BENCHMARKS_APP": app} | environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{server} did not start: {' '.join(command)}") from None
                time.sleep(0.05)
        yield Served(process, port)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
