"""Which objects are enqueued, with what, and which are refused; on the engines' own brokers for tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock, Mock
from uuid import uuid4

import anyio
import celery
import dramatiq
import dramatiq.brokers.stub
import huey
import procrastinate
import procrastinate.testing
import pytest
import streaq
import taskiq

from asgi_deferred import DeferredMiddleware, DeferredTasks, Runner, engines
from asgi_deferred._engines import recognise, registered
from asgi_deferred.testing import inline, record
from tests.support import Log, request, responder, states

from .services import REDIS, need

pytestmark = pytest.mark.anyio

ran: list[Any] = []


def job(a: int, b: int = 0) -> int:
    ran.append((a, b))
    return a + b


async def async_job(a: int, b: int = 0) -> int:
    ran.append((a, b))
    return a + b


class Kept(taskiq.InMemoryBroker):
    """Keeps what it is given instead of running it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    async def kick(self, message: taskiq.BrokerMessage) -> None:
        self.kept.append(self.formatter.loads(message.message))


taskiq_broker = Kept()
taskiq_job = taskiq_broker.task(task_name="jobs.taskiq")(async_job)

celery_app = celery.Celery("jobs", broker="memory://")
celery_job: Any = celery_app.task(name="jobs.celery")(job)

celery_async_job: Any = celery_app.task(name="jobs.never")(async_job)

dramatiq_broker = dramatiq.brokers.stub.StubBroker(middleware=[])
dramatiq_job = dramatiq.actor(actor_name="dramatiq_job", broker=dramatiq_broker)(job)
dramatiq_async_job = dramatiq.actor(actor_name="dramatiq_async_job", broker=dramatiq_broker)(async_job)

memory_huey = huey.MemoryHuey("jobs")
huey_job: Any = memory_huey.task(name="huey_job")(job)

connector = procrastinate.testing.InMemoryConnector()
procrastinate_app = procrastinate.App(connector=connector)
procrastinate_job = procrastinate_app.task(name="jobs.procrastinate")(job)


@procrastinate_app.task(name="jobs.context", pass_context=True)
async def with_context(context: procrastinate.JobContext, a: int) -> None: ...


streaq_worker: streaq.Worker[None] = streaq.Worker(redis_url="redis://127.0.0.1:1")
streaq_job = streaq_worker.task(name="jobs.streaq")(async_job)


class Own:
    """A user's own engine."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def __call__(self, *args: Any) -> None:
        ran.append(args)

    def __defer_enqueue__(self, *args: Any, **kwargs: Any) -> Any:
        self.kept.append((args, kwargs))


class OwnAsync(Own):
    async def __defer_enqueue__(self, *args: Any, **kwargs: Any) -> None:
        await anyio.lowlevel.checkpoint()
        self.kept.append((args, kwargs))


@pytest.fixture(autouse=True)
def nothing_ran() -> Iterator[None]:
    ran.clear()
    before = dict(registered)
    yield
    registered.clear()
    registered.update(before)


@pytest.fixture
def asyncio_only(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        pytest.skip("the engine's client is for asyncio alone")


async def serve(*add: Callable[[DeferredTasks], object], **options: Any) -> Log:
    log = Log()
    async with Runner(observers=[log], **options) as runner:
        await request(DeferredMiddleware(responder(*add), runner), log)
    return log


AFTER = ["http.response.start", "http.response.body", "returned"]


@pytest.mark.usefixtures("asyncio_only")
async def test_taskiq_task_and_kicker() -> None:
    """G1: a taskiq task is kicked after the response, and so is a kicker, with its labels."""
    taskiq_broker.kept.clear()
    log = await serve(
        lambda tasks: tasks.add_task(taskiq_job, 1, b=2),
        lambda tasks: tasks.add_task(taskiq_job.kicker().with_task_id("ours"), 3),
    )
    assert log == [
        *AFTER,
        "jobs.taskiq RUNNING",
        "jobs.taskiq SUCCEEDED",
        "jobs.taskiq RUNNING",
        "jobs.taskiq SUCCEEDED",
    ]
    assert [(m.task_name, m.args, m.kwargs) for m in taskiq_broker.kept] == [
        ("jobs.taskiq", [1], {"b": 2}),
        ("jobs.taskiq", [3], {}),
    ]
    assert taskiq_broker.kept[1].task_id == "ours"
    assert ran == []


async def test_celery_task_and_signature() -> None:
    """G1: a Celery task, a proxy before its app is finalized, is sent after the response; so is a signature."""
    proxy = celery.Celery("more", broker="memory://", set_as_current=False).task(name="jobs.more")(job)
    assert recognise(proxy) is recognise(celery_job)
    with celery_app.connection() as connection:
        queue = connection.SimpleQueue("celery")
        queue.clear()
        log = await serve(
            lambda tasks: tasks.add_task(celery_job, 1, b=2),
            lambda tasks: tasks.add_task(celery_job.s(3).set(task_id="ours"), b=4),
        )
        first, second = queue.get(timeout=5), queue.get(timeout=5)
        queue.close()
    assert log == [
        *AFTER,
        "jobs.celery RUNNING",
        "jobs.celery SUCCEEDED",
        "jobs.celery RUNNING",
        "jobs.celery SUCCEEDED",
    ]
    assert (first.payload[:2], second.payload[:2]) == ([[1], {"b": 2}], [[3], {"b": 4}])
    assert second.headers["id"] == "ours"
    assert ran == []


async def test_dramatiq_actor() -> None:
    """G1: a dramatiq actor, which is callable, is sent and not called."""
    dramatiq_broker.flush_all()
    log = await serve(lambda tasks: tasks.add_task(dramatiq_job, 1, b=2))
    assert log == [*AFTER, "dramatiq_job RUNNING", "dramatiq_job SUCCEEDED"]
    (raw,) = dramatiq_broker.queues["default"].queue
    message = dramatiq.Message.decode(raw)
    assert (message.actor_name, message.args, message.kwargs) == ("dramatiq_job", (1,), {"b": 2})
    assert ran == []


async def test_huey_task() -> None:
    """G1: calling a huey task is what enqueues it, and that happens after the response."""
    memory_huey.flush()
    log = await serve(lambda tasks: tasks.add_task(huey_job, 1, b=2), lambda tasks: [memory_huey.pending()].index([]))
    assert log == [*AFTER, "huey_job RUNNING", "huey_job SUCCEEDED"]
    (task,) = memory_huey.pending()
    assert task.data == ((1,), {"b": 2})
    assert ran == []


@pytest.mark.usefixtures("asyncio_only")
async def test_procrastinate_task_gets_its_arguments_by_name() -> None:
    """G1: procrastinate would drop positional arguments in silence, so they are bound to their names."""
    connector.reset()
    async with procrastinate_app.open_async():
        log = await serve(
            lambda tasks: tasks.add_task(procrastinate_job, 1, b=2),
            lambda tasks: tasks.add_task(procrastinate_job, 3, 4),
            lambda tasks: tasks.options().add_task(cast("Any", with_context), 5),
            lambda tasks: tasks.add_task(procrastinate_job.configure(queue="other"), a=6),
        )
    assert [line for line in log if "FAILED" in line] == []
    assert [(job["task_name"], job["queue_name"], job["args"]) for job in connector.jobs.values()] == [
        ("jobs.procrastinate", "default", {"a": 1, "b": 2}),
        ("jobs.procrastinate", "default", {"a": 3, "b": 4}),
        ("jobs.context", "default", {"a": 5}),
        ("jobs.procrastinate", "other", {"a": 6}),
    ]
    assert ran == []


@pytest.mark.usefixtures("asyncio_only")
async def test_procrastinate_arguments_that_have_no_name(caplog: pytest.LogCaptureFixture) -> None:
    """G11: positional arguments that procrastinate could not store fail the task and say why."""
    connector.reset()
    async with procrastinate_app.open_async():
        log = await serve(
            lambda tasks: tasks.add_task(procrastinate_job, 1, 2, 3),  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
            lambda tasks: tasks.add_task(procrastinate_job, 1, a=2),  # pyright: ignore[reportCallIssue]
            lambda tasks: tasks.add_task(procrastinate_job.configure(queue="other"), 3),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        )
    assert [line for line in log[3:] if "RUNNING" not in line] == ["jobs.procrastinate FAILED"] * 3
    assert [record.levelname for record in caplog.records if record.name == "asgi_deferred"] == ["ERROR"] * 3
    reasons = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert "has 2 names" in reasons[0]
    assert "multiple values" in reasons[1]
    assert "was configured" in reasons[2]
    assert connector.jobs == {}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_django_task_is_not_callable(backend: str) -> None:
    """G1: a Django Task, which cannot be called, is enqueued in its backend, and not as durable in one of this process."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.engines.live.django_main", backend],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    name = "__main__.job"
    lines = ["False", f"{name} RUNNING", "enqueued [1] {'b': 2}", f"{name} SUCCEEDED", *AFTER]
    lines += [f"{name} RUNNING", "enqueued [3] {}", f"{name} SUCCEEDED", *AFTER[:2], "ran 4 0", "returned"]
    if sys.version_info >= (3, 12):
        refused = "durable=True stores a job with an engine, and the backend of '__main__.job' keeps it in this process"
        assert lines.insert(1, refused) is None
    assert [line.partition(". ")[0] for line in out.stdout.splitlines()] == lines


@pytest.mark.usefixtures("asyncio_only")
async def test_streaq_task_is_enqueued() -> None:
    """G1: a streaq task is known by its class, goes to its queue in Redis, and nothing runs here."""
    engine = recognise(streaq_job)
    assert engine is not None
    assert engine.name is not None
    assert engine.name(streaq_job) == "jobs.streaq"
    worker: streaq.Worker[None] = streaq.Worker(redis_url=need(REDIS), queue_name=f"asgi-deferred-{uuid4().hex}")
    job = worker.task()(async_job)
    app = DeferredMiddleware(responder(lambda tasks: tasks.add_task(job, 1)))
    async with worker:
        await request(app, Log())
        assert await worker.queue_size() == 1
    assert app.runner.statistics().succeeded == 1


@pytest.mark.parametrize(
    "task", [taskiq_job, celery_job, celery_job.s(), dramatiq_job, huey_job, procrastinate_job, streaq_job]
)
async def test_partial_of_an_engine_task_is_refused(task: Any) -> None:
    """G11: a partial of an engine's task would run the task here, so the line that adds it raises."""

    def add(tasks: DeferredTasks) -> None:
        with pytest.raises(TypeError, match="Pass the task itself, and its arguments"):
            tasks.add_task(partial(partial(task, 1), 2))
        assert len(tasks) == 0

    assert await serve(add) == AFTER


async def test_async_celery_task_is_refused() -> None:
    """G11: Celery never runs an `async def`, so the line that adds such a task, or its signature, raises."""

    def add(tasks: DeferredTasks) -> None:
        for each in (celery_async_job, celery_async_job.s(1)):
            with pytest.raises(TypeError, match="Make it a `def`"):
                tasks.add_task(each)
        tasks.add_task(celery_app.signature("jobs.elsewhere"))

    assert (await serve(add))[3:] == ["jobs.elsewhere RUNNING", "jobs.elsewhere SUCCEEDED"]


async def test_mocks_are_called() -> None:
    """G1: a Mock has every attribute that an engine's task has, and is still called like the function it stands for."""
    mock, magic = Mock(return_value=None), MagicMock(return_value=None)
    await serve(lambda tasks: tasks.add_task(mock, 1), lambda tasks: tasks.add_task(partial(magic, 2)))
    assert (mock.mock_calls[-1].args, magic.mock_calls[-1].args) == ((1,), (2,))
    mock.assert_called_once_with(1)
    magic.assert_called_once_with(2)


async def test_own_engine_by_method() -> None:
    """G1: an object with `__defer_enqueue__` is enqueued by it, sync or async, and not called."""
    sync, asynchronous = Own(), OwnAsync()
    log = await serve(
        lambda tasks: tasks.add_task(sync, 1), lambda tasks: tasks.options(name="mine").add_task(asynchronous, 2)
    )
    assert log[3:] == ["Own RUNNING", "Own SUCCEEDED", "mine RUNNING", "mine SUCCEEDED"]
    assert (sync.kept, asynchronous.kept) == ([((1,), {})], [((2,), {})])
    assert ran == []


async def test_own_engine_by_registration() -> None:
    """G1: `register()` goes before everything else, and the last registration of a class wins."""
    kept: list[Any] = []
    engines.register(dramatiq.Actor, lambda task, *args: kept.append("older"))
    engines.register(object, lambda task, *args: kept.append("object"))
    engines.register(dramatiq.Actor, lambda task, *args: kept.append((task, args)))
    await serve(lambda tasks: tasks.add_task(dramatiq_job, 1))
    assert kept == [(dramatiq_job, (1,))]


def test_registration_of_what_is_none() -> None:
    """G11: `register()` refuses what is no class or cannot be called."""
    with pytest.raises(TypeError, match="pass type"):
        engines.register(dramatiq_job, job)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass a function"):
        engines.register(dramatiq.Actor, "send")  # type: ignore[arg-type]


async def test_enqueue_timeout_is_the_default() -> None:
    """G7: enqueueing has a limit of its own, which `timeout` overrides and the runner's `timeout` does not."""
    from math import inf

    got: list[float | None] = []

    def add(tasks: DeferredTasks) -> None:
        got.extend(
            task.timeout
            for task in (
                tasks.add_task(Own()),
                tasks.options(timeout=2).add_task(Own()),
                tasks.options(timeout=inf).add_task(Own()),
                tasks.add_task(job, 1),
            )
        )

    await serve(add, timeout=9, enqueue_timeout=3)
    assert got == [3, 2, None, 9]


@pytest.mark.usefixtures("asyncio_only")
async def test_inline_runs_engine_tasks_here() -> None:
    """G1: under `inline()` the functions below the engines' tasks run here, after the response, durable or not."""
    engines.register(Own, lambda task, *args: None, local=lambda task: partial(task, "local"))
    taskiq_broker.kept.clear()
    dramatiq_broker.flush_all()
    log = Log()

    def add(tasks: DeferredTasks) -> None:
        adder = tasks.options(durable=True)
        for number, each in enumerate(
            [
                taskiq_job,
                taskiq_job.kicker(),
                celery_job,
                celery_job.s(),
                dramatiq_job,
                dramatiq_async_job,
                huey_job,
                procrastinate_job,
                streaq_job,
                Own(),
            ]
        ):
            adder.add_task(each, number)  # pyright: ignore[reportArgumentType]

    with inline(raise_errors=True):
        await request(DeferredMiddleware(responder(add)), log)
    assert log == AFTER
    assert ran == [*((number, 0) for number in range(9)), ("local", 9)]
    assert taskiq_broker.kept == []
    assert not dramatiq_broker.queues["default"].queue


async def test_inline_cannot_find_a_configured_procrastinate_task() -> None:
    """G11: a configured procrastinate task has forgotten its function, and `inline()` says so at the adding line."""

    def add(tasks: DeferredTasks) -> None:
        with pytest.raises(LookupError, match="InMemoryConnector"):
            tasks.add_task(procrastinate_job.configure())

    with inline():
        await request(DeferredMiddleware(responder(add)), Log())


async def test_record_enqueues_nothing() -> None:
    """G1: under `record()` an engine's task, durable ones too, stays PENDING and is given back as it was added."""
    own = Own()
    with record() as tasks:
        log = await serve(lambda tasks: tasks.options(durable=True).add_task(own, 1))
    assert log == AFTER
    assert states(tasks) == ["Own PENDING"]
    assert [(task.func, task.args, task.durable) for task in tasks] == [(own, (1,), True)]
    assert own.kept == []


@pytest.mark.parametrize("task", [taskiq_job, taskiq_job.kicker(), celery_job, celery_job.s(), dramatiq_job, huey_job])
async def test_durable_in_this_process_is_refused(task: Any) -> None:
    """G11: durable is refused for an engine whose broker keeps its jobs in this process; in a test kit it is not."""
    refused: list[str] = []

    def add(tasks: DeferredTasks) -> None:
        with pytest.raises(TypeError, match=r"keeps it in this process\. Give the task a backend that stores"):
            tasks.options(durable=True).add_task(task, 1)
        refused.append("refused")

    assert await serve(add) == AFTER
    assert refused == ["refused"]
    with record() as tasks:
        assert await serve(lambda tasks: tasks.options(durable=True).add_task(task, 1)) == AFTER
    assert [task.durable for task in tasks] == [True]
    with inline(raise_errors=True):
        await serve(lambda tasks: tasks.options(durable=True).add_task(task, 1))
    assert ran == [(1, 0)]


async def test_durable_with_a_backend_that_stores() -> None:
    """Durable is accepted for an engine that has a broker of its own."""
    stored: Any = celery.Celery("stored", broker="redis://127.0.0.1:1", set_as_current=False).task(name="stored")(job)
    with record() as tasks:
        await serve(lambda tasks: tasks.options(durable=True).add_task(stored, 1))
        await serve(lambda tasks: tasks.options(durable=True).add_task(streaq_job, 1))
    assert [task.durable for task in tasks] == [True, True]


def test_no_engine_is_imported() -> None:
    """G12: recognition imports no engine, whatever is added."""
    code = """
import sys, anyio
from asgi_deferred import Runner
import asgi_deferred.engines

class Plain:
    def __call__(self): pass

async def main():
    async with Runner() as runner:
        from asgi_deferred import defer
        defer(Plain()); defer(print); defer(lambda: None)

before = set(sys.modules)
anyio.run(main)
known = {"taskiq", "celery", "dramatiq", "huey", "procrastinate", "streaq", "django", "django_tasks"}
print(sorted(known & {name.partition(".")[0] for name in sys.modules}))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert out.stdout.split("\n")[-2:] == ["[]", ""]
