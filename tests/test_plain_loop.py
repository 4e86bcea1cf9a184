"""On an event loop that anyio did not start, as servers' are: nothing but asyncio knows that it runs."""

from __future__ import annotations

import asyncio

import pytest

from asgi_deferred import Runner, current_tasks


@pytest.mark.parametrize("sniffio", ["with sniffio", "without sniffio"])
def test_a_task_is_started_from_a_callback_of_the_loop(monkeypatch: pytest.MonkeyPatch, sniffio: str) -> None:
    """G11: a task added where no worker is at hand runs, although a callback, outside of any task, has to start it."""
    if sniffio == "without sniffio":
        monkeypatch.setattr("anyio._core._eventloop.sniffio", None)
    ran: list[str] = []

    async def main() -> None:
        async with Runner(drain_timeout=1) as runner:
            tasks = current_tasks()
            asyncio.get_running_loop().call_soon(lambda: tasks.add_task(ran.append, "late"))
            await asyncio.sleep(0)
            await asyncio.wait_for(runner.wait_idle(), 10)

    asyncio.run(main())
    assert ran == ["late"]
