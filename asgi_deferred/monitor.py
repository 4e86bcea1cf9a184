"""A live page of a runner's tasks, to look at in a browser: an ASGI application to mount.

1. `allow` is asked about every request before anything else is done. Nothing but `True` lets one pass.
2. The page shows names of tasks, requests as "GET /path", lines of code, and errors with message and traceback.
   It shows no argument, no result and no local variable. The browser gets text, and adds it as text.
3. Of a failure the monitor keeps text, cut to length. It keeps no task, no exception and no frame.
4. An answer is small, and looking takes a twentieth of a processor at most, however much waits and however many look.
5. No connection stays open. The page holds up no shutdown, and the next answer may be another worker process's.
"""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files
from inspect import isawaitable
from itertools import count
from json import dumps
from os import getpid
from pathlib import PurePath
from platform import node
from time import perf_counter, strftime, thread_time
from traceback import format_exception, format_exception_only
from typing import Any

from ._drains import draining
from ._runner import Runner
from ._states import TaskState
from ._tasks import TaskEvent

__all__ = ["Monitor"]

ROWS, FAILURES = 50, 20  # of each process
LONGEST, TRACEBACK = 200, 4000  # characters

PAGE = files("asgi_deferred").joinpath("monitor.html").read_text(encoding="utf-8")
STYLE, SCRIPT = (
    b64encode(sha256(PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()).decode()
    for tag in ("style", "script")
)
HEADERS = {
    "allow": "GET, HEAD",
    "cache-control": "no-store",
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{STYLE}'; script-src 'sha256-{SCRIPT}'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Monitor:
    """An ASGI application that shows what a runner does, in each process that answers.

    Make one for each runner, before the application serves: `app.mount("/deferred", Monitor(runner, allow=is_staff))`.
    From then on the page is one of the runner's observers.

    Args:
        runner: The runner that the `DeferredMiddleware` has.
        allow: `(scope) -> bool`, sync or async: whether this request may see the page. It is called for each request,
            a few times every second, so a sync function must not block. The answer is 403 if it returns anything but
            `True`. An exception goes on to the framework.

    Raises:
        TypeError: `runner` is not a `Runner`, or `allow` cannot be called.
    """

    def __init__(self, runner: Runner, *, allow: Callable[[Any], bool | Awaitable[bool]]) -> None:
        if not isinstance(runner, Runner):
            raise TypeError(f"runner={runner!r} is not a Runner: Monitor(runner, allow=...)")
        if not callable(allow):
            raise TypeError(f"allow={allow!r} cannot be called: use a function (scope) -> bool")
        self._runner, self._allow = runner, allow
        self._failures: deque[tuple[str, float, dict[str, Any]]] = deque(maxlen=FAILURES)
        self._numbers, self._since = count(), perf_counter()
        self._seen, self._fresh_until = "", 0.0
        runner.observers = (*runner.observers, self._note)

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        """Answer a request, with the page or with what it shows."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            raise ValueError(f"The monitor answers HTTP requests, and knows no {scope['type']!r}")
        allowed = self._allow(scope)
        if isawaitable(allowed):
            allowed = await allowed
        status, kind, text = 200, "text/html", PAGE
        if allowed is not True:
            status, kind, text = 403, "text/plain", "Forbidden"
        elif scope["method"] not in ("GET", "HEAD"):
            status, kind, text = 405, "text/plain", "Method Not Allowed"
        elif any(name == b"accept" and b"application/json" in value for name, value in scope["headers"]):
            kind, text = "application/json", self._look()
        body = text.encode()
        headers = {**HEADERS, "content-type": f"{kind}; charset=utf-8", "content-length": f"{len(body)}"}
        if scope.get("http_version", "1.1").startswith("1"):  # later versions have no such header
            headers["connection"] = "close"
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def _note(self, event: TaskEvent) -> None:
        task, error, brief, trace = event.task, event.error, "", ""
        if error is not None:
            # A SyntaxError shows its lines of code first.
            brief = next(each for each in format_exception_only(error) if not each.startswith(" "))
            brief = brief.partition("\n")[0].removeprefix(f"{type(error).__module__}.")
            trace = _cut("".join(format_exception(error)), TRACEBACK)
        elif event.state is not TaskState.ABANDONED:
            return
        when = strftime("%Y-%m-%d %H:%M:%S %z")
        text = f"{when}  {_cut(task.request)}\nAdded at {_cut(task.added_at)}\n\n{trace}"
        failure = {"number": next(self._numbers), "name": _cut(task.name), "error": _cut(brief), "text": text}
        self._failures.append((event.state.value, perf_counter(), failure))

    def _look(self) -> str:
        """Return what there is to see. What took long to collect is good for twenty times as long."""
        if perf_counter() >= self._fresh_until:
            began = thread_time()
            self._seen = dumps(self._collect())
            took = thread_time() - began
            self._fresh_until = perf_counter() + (20 * took if took > 0.005 else 0)
        return self._seen

    def _collect(self) -> dict[str, Any]:
        runner, now = self._runner, perf_counter()
        running: list[TaskEvent] = []
        pending: dict[str, list[float]] = {}
        for event in runner.tasks():
            if event.state is TaskState.RUNNING:
                running.append(event)
            else:
                pending.setdefault(event.task.name, []).append(event.waited)
        running.sort(key=lambda event: -event.duration)
        groups = sorted(pending.items(), key=lambda item: -len(item[1]))[:ROWS]
        _, *counts = runner.statistics()._asdict().items()
        return {
            "id": f"{node()} {getpid()} {self._since}",
            "title": f"Process {getpid()}",
            "about": f"on {node()}, up {_span(now - self._since)}",
            "note": "draining" if draining() else "",
            "counts": [[f"{number:,}", state.replace("_", " ")] for state, number in counts],
            "limits": f"Limits: {runner.max_concurrency:,} run at once, {runner.max_threads:,} of them in threads; "
            f"{runner.max_pending:,} unfinished; {runner.drain_timeout:g} s to drain",
            "running": [_row(event) for event in running[:ROWS]],
            "pending": [[_cut(name), f"{len(waits):,}", f"for up to {_span(max(waits))}"] for name, waits in groups],
            "failures": [
                {**told, "when": f"{state} {_span(now - at)} ago"} for state, at, told in self._failures.copy()
            ],
        }


def _row(event: TaskEvent) -> list[str]:
    task = event.task
    place = "/".join(PurePath(task.added_at).parts[-2:])
    return [_cut(task.name), _span(event.duration), _cut(task.request), _cut(place)]


def _cut(text: str, longest: int = LONGEST) -> str:
    """Cut a long text in its middle: a traceback says at its end what was raised."""
    return text if len(text) <= longest else f"{text[: longest // 4]} … {text[-longest * 3 // 4 :]}"


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
