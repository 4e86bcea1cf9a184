"""The live page as a browser shows it, on a real server with two workers.

Run as a program, it takes the pictures of the documentation: `python -m tests.servers.test_monitor_browser`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from .browser import Browser, chromium
from .harness import ROOT, WORKERS, Server, serve, until

pytestmark = pytest.mark.servers

IMAGES = ROOT / "docs" / "images"
HURRY = "const wait = setTimeout; setTimeout = (call, ms) => wait(call, ms / 20)"  # the page asks 20 times a second

# The least contrast of a text with what is behind it, as WCAG reckons it.
CONTRAST = """(() => {
  const rgba = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => rgba(color).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const color = getComputedStyle(node).backgroundColor;
    return rgba(color)[3] === 0 ? behind(node.parentNode) : color;
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) => !node.children.length && node.innerText);
  const ratios = texts.map((node) => [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a))
    .map(([more, less]) => (more + 0.05) / (less + 0.05));
  return Math.min(...ratios);
})()"""


def post(server: Server, path: str, **query: str) -> int:
    """Post to any worker, over a connection of its own; return which one answered."""
    return int(httpx.post(server.url + path, params=query, trust_env=False).text)


def post_to_both(server: Server, path: str, **query: str) -> set[int]:
    workers: set[int] = set()

    def both() -> bool:
        workers.add(post(server, path, **query))
        return len(workers) == 2

    until(both, "both workers to answer")
    return workers


def look_at(browser: Browser, server: Server) -> None:
    """Open the page, and wait until it shows both workers."""
    browser.open(server.url + "/deferred/")
    browser.wait_for("document.querySelectorAll('article').length === 2")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        browser.on_every_page(HURRY)
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests that leave it running; the tasks of each have a name of their own."""
    with serve(WORKERS, tmp_path_factory.mktemp("server"), app="monitor_app:app") as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """A server for one test, with little time to drain."""
    with serve(WORKERS, tmp_path, app="monitor_app:app", drain_timeout=1.0) as server:
        yield server


@pytest.fixture(autouse=True)
def blank(browser: Browser) -> None:
    """Begin without what the test before has left in the browser."""
    browser.open("about:blank")
    browser.requests.clear()
    browser.complaints.clear()


def test_it_updates(browser: Browser, server: Server) -> None:
    """The page shows both workers and follows them; what was opened by keyboard stays open, and has the focus."""
    workers = post_to_both(server, "/orders/1", name="followed")
    address = f"{server.url}/deferred/?of=mine"
    browser.open(address.replace("//", "//user:password@"))
    browser.wait_for("document.querySelectorAll('article').length === 2")
    assert browser.evaluate("[...document.querySelectorAll('h2')].map((node) => node.innerText)") == [
        f"Process {each}" for each in sorted(workers, key=str)
    ]
    assert browser.text().count("followed") == 4  # in each process one runs, and the rest is pending
    for key in ("Tab", "Enter"):
        browser.press(key)
    browser.wait_for("document.querySelector('details').matches('[open]:focus-within')")
    assert "monitor_app.py" in browser.evaluate("document.querySelector('pre').innerText")
    post_to_both(server, "/orders/2", name="followed")
    browser.wait_for("document.querySelectorAll('details').length === 4")
    for number in (1, 2):
        server.open_gate(f"{number}")
    browser.wait_for("!document.body?.innerText.includes('followed')")
    assert browser.text().count("24\nsucceeded") == 2
    assert browser.evaluate("document.querySelector('.failures').lastChild.matches('[open]:focus-within')")
    assert {request.replace("user:password@", "") for request in browser.requests} == {address}
    assert browser.complaints == []


def test_it_is_legible(browser: Browser, server: Server) -> None:
    """Narrow and wide, light and dark, the page fits and each text has the contrast that WCAG AA asks for."""
    post_to_both(server, "/orders/" + "long" * 50)
    post_to_both(server, "/photos/teapot")
    look_at(browser, server)
    for dark, background in ((False, "rgb(245, 245, 242)"), (True, "rgb(18, 19, 22)")):
        for width in (360, 1280):
            browser.look_like(width=width, dark=dark)
            assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == background
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(CONTRAST) >= 4.5


def test_markup_is_text(browser: Browser, server: Server) -> None:
    """Markup in a path, a task's name and an exception's text shows as text, and no script of it runs."""
    markup = "<img src=x onerror=console.log(1)><script>console.log(2)</script>"
    post_to_both(server, f"/orders/{markup}/path", name=f"{markup} name", why=f"{markup} why")
    look_at(browser, server)
    browser.evaluate("document.querySelector('details').open = true")
    text = browser.text()
    assert text.count(f"POST /orders/{markup}/path") == 3  # two run, and one failure is open
    assert text.count(f"{markup} name") == 4
    assert text.count(f"ConnectionError: {markup} why") == 3
    assert browser.evaluate("document.querySelectorAll('body img, main script').length") == 0
    assert browser.complaints == []


def test_refused(browser: Browser, server: Server) -> None:
    """Once `allow` refuses, an open page says that it is out of date, and a new one is not to be had."""
    look_at(browser, server)
    server.open_gate("refuse")
    browser.wait_for("document.body?.innerText.includes('(403 Forbidden)')")
    assert browser.evaluate("document.querySelector('#status').innerText").startswith("No answer since ")
    browser.open(server.url + "/deferred/")
    browser.wait_for("document.body?.innerText === 'Forbidden'")
    (server.folder / "gates" / "refuse").unlink()


def test_a_worker_dies_and_the_server_ends(browser: Browser, mortal: Server) -> None:
    """G8: a worker that has died fades and vanishes, and SIGTERM with the page open ends the server by its drain."""
    dead, other = post_to_both(mortal, "/orders/1001")
    look_at(browser, mortal)
    os.kill(dead, signal.SIGKILL)
    browser.wait_for(f"document.querySelector('.silent')?.innerText.includes('Process {dead}')")
    assert "no answer since" in browser.text()
    browser.wait_for(
        f"document.querySelectorAll('article').length === 2 && !document.body?.innerText.includes('{dead}')"
    )
    assert f"Process {other}" in browser.text()
    assert mortal.stop() == 0
    browser.wait_for("document.body?.matches('.lost')")
    assert "No answer since" in browser.text()
    assert "drain_timeout=1.0 s is over; abandoning deferred tasks: 'send_receipt' (12)" in mortal.log()


def take_pictures() -> None:
    """Write the wide page, light and dark, into the documentation."""
    with TemporaryDirectory() as name, chromium(Path(name)) as browser:
        with serve(WORKERS, Path(name), app="monitor_app:app") as server:
            for path in ("/orders/1001", "/orders/1002", "/photos/teapot"):
                post_to_both(server, path)
            look_at(browser, server)
            IMAGES.mkdir(parents=True, exist_ok=True)
            for scheme in ("light", "dark"):
                browser.look_like(width=1280, dark=scheme == "dark")
                (IMAGES / f"monitor-{scheme}.png").write_bytes(browser.screenshot())


if __name__ == "__main__":
    take_pictures()
