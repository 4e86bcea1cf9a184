"""What the pages on Kubernetes, Docker and systemd show: it is what those programs read, and its times add up."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path

import anyio
import pytest
import yaml
from gunicorn.config import Config
from uvicorn.main import main

from asgi_deferred import Runner, defer
from examples import probes, prometheus_gunicorn

from .clients import async_client
from .test_docs import ROOT, blocks

PAGES = ROOT / "docs" / "how-to"
DRAIN = Runner().drain_timeout + 1  # and the second that cancelled tasks have


def shown(page: str, language: str) -> str:
    ((_, text),) = blocks(PAGES / page, language)
    return text


def uvicorn_waits(command: Iterable[str]) -> float:
    """How long uvicorn, started by this command, waits for requests."""
    program, *arguments = command
    options = main.make_context(program, arguments).params
    assert (program, options["app"]) == ("uvicorn", "app:app")
    seconds = options["timeout_graceful_shutdown"]
    assert isinstance(seconds, int)
    return seconds


@pytest.mark.anyio
async def test_probes() -> None:
    """G7: the example is ready until its backlog is nearly full and again when that has shrunk, and it is alive all the time."""
    go, seen = anyio.Event(), []
    async with async_client(probes.app) as client, probes.runner:

        async def probe() -> None:
            seen.append([(await client.get(path)).status_code for path in ("/ready", "/alive")])

        for _ in range(899):
            defer(go.wait)
        await probe()
        defer(go.wait)
        await probe()
        go.set()
        await probes.runner.wait_idle()
        await probe()
    assert seen == [[200, 200], [503, 200], [200, 200]]


def test_kubernetes() -> None:
    """G8: the pod's time is enough for the pause, the requests and the drain, and its probes are those of the example."""
    pod = yaml.safe_load(shown("kubernetes.md", "yaml"))["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + uvicorn_waits(container["command"]) + DRAIN
    paths = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")]
    assert paths == ["/ready", "/alive"]
    ports = {container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("readiness", "liveness")}
    assert ports == {port["containerPort"] for port in container["ports"]} == {8000}


def test_docker() -> None:
    """G8: the server is process 1 and gets SIGTERM, and the container's time is enough for the requests and the drain."""
    lines = shown("docker.md", "dockerfile").splitlines()
    instructions = dict(line.split(" ", 1) for line in lines)
    assert list(instructions) == ["FROM", "WORKDIR", "COPY", "RUN", "CMD"]
    seconds = yaml.safe_load(shown("docker.md", "yaml"))["services"]["app"]["stop_grace_period"]
    assert float(seconds.removesuffix("s")) > uvicorn_waits(json.loads(instructions["CMD"])) + DRAIN


def test_systemd() -> None:
    """G8: gunicorn waits for longer than the drain, and systemd for longer than gunicorn, and signals it alone."""
    unit = ConfigParser(interpolation=None, strict=True)
    unit.read_string(shown("systemd.md", "ini"))
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    settings = vars(Config().parser().parse_args(arguments))
    assert (Path(program).name, settings["args"]) == ("gunicorn", ["app:app"])
    assert DRAIN < settings["graceful_timeout"] < float(service["TimeoutStopSec"])
    assert (service["KillMode"], "KillSignal" in service) == ("mixed", False)
    assert prometheus_gunicorn.graceful_timeout > DRAIN
