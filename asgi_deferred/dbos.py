"""DBOS: tasks that survive a crash, in an SQLite file or in PostgreSQL, without a broker or a worker process.

`options(durable=True)` stores a task before the response. The application's own processes run it. A task that
was waiting or running at a crash runs after the next start. So a task may run more than once: make it idempotent.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import ExitStack, closing, suppress
from functools import partial, update_wrapper, wraps
from importlib import import_module
from inspect import iscoroutinefunction, signature
from itertools import count
from pickle import dumps
from threading import Event, Lock, Thread
from types import FunctionType
from typing import Any, Generic, ParamSpec, Self, TypeVar

import sqlalchemy as sa
from anyio import CancelScope, to_thread
from dbos import DBOS, DBOSClient, WorkflowStatus
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError

from ._tasks import check_count

__all__ = ["Store", "StoredTask"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# 1. There is one version. DBOS would make it of the source code, and leave the tasks of all other versions alone.
# 2. A process has a slot, and the slot's number is its name in the store. It holds a lock on the slot, which ends with
#    the process. So whoever gets a slot's lock knows that its process has ended, and that its tasks may run again.
# 3. Storing a task ends within 2 * _PATIENCE. DBOS itself would try again without end, in a thread of the runner.
_VERSION = "asgi-deferred"
_PATIENCE = 2  # seconds for a connection, and again for a lock
_POLL = 0.25  # seconds from one look for tasks to the next
_CLEANING = 60  # seconds from one removal of tasks that have ended to the next
_AT_ONCE = 500  # of them: the file is locked meanwhile
_OLDEST_SQLITE = (3, 42)  # unixepoch('subsec')
_QUIET: dict[str, Any] = {"hide_parameters": True}  # in errors: arguments are never logged

_dbos_is_free = Lock()


class StoredTask(Generic[_P, _R]):
    """A function whose calls are stored: what `Store.task` returns.

    `add_task` stores a call. If you call the object itself, as tests do, it calls the function.
    """

    def __init__(self, store: Store, func: Callable[_P, _R]) -> None:
        update_wrapper(self, func)
        self._store = store
        self._func = func
        named = isinstance(func, FunctionType)
        self._workflow = f"{func.__module__}.{func.__qualname__}" if named else repr(func)
        if not named or "<" in self._workflow:
            raise TypeError(f"{self._workflow} has no name by which another process finds it: move it to its module")
        DBOS.workflow(name=self._workflow)(_without_result(func))

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call the function, here and now."""
        return self._func(*args, **kwargs)

    def __defer_enqueue__(self, *args: _P.args, **kwargs: _P.kwargs) -> None:
        """Store a call of the function."""
        call = signature(self._func).bind(*args, **kwargs)
        self._store._put(self._workflow, call.args, call.kwargs)


class Store:
    """Where tasks are stored, and the worker that runs them in this process.

    Enter it in the application's lifespan. DBOS exists once in a process, so one store can be entered at a time.

    Args:
        url: "sqlite:///jobs.sqlite" or "postgresql://user:password@host/database". An SQLite file is for the
            processes of one machine, and must be on a disk of that machine. Arguments are pickled, not encrypted.
        name: The application's name: 3 or more of a-z, 0-9, "-" and "_". Applications that share a database need
            different names.
        concurrency: How many tasks may run at once in this process.
        drain_timeout: How many seconds (an `int`) a shutdown waits for running tasks. Tasks that have not ended by
            then run again after the next start.

    Raises:
        ValueError: `url` names no file and no database, or `concurrency` is not above 0.
        RuntimeError: Python's SQLite is older than 3.42. From `async with`: another store is entered already.

    Example:
        ```python
        store = Store("sqlite:///jobs.sqlite")

        @store.task
        def send_welcome(email: str) -> None: ...

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with store:
                yield
        ```
    """

    def __init__(
        self, url: str, *, name: str = "asgi-deferred", concurrency: int = 40, drain_timeout: int = 10
    ) -> None:
        try:
            self._url = sa.make_url(url)
        except ArgumentError:
            raise ValueError("url is not like sqlite:///jobs.sqlite") from None
        if self._url.get_backend_name() not in {"sqlite", "postgresql", "postgres"}:
            raise ValueError(f"url={self._url!r} is not a database of SQLite or PostgreSQL")
        check_count("concurrency", concurrency)
        if self._url.database in {None, "", ":memory:"}:
            raise ValueError(f"url={self._url!r} names no file and no database, and memory survives no crash")
        self._sqlite = _find_sqlite() if self._url.get_backend_name() == "sqlite" else None
        self._name = name
        self._concurrency = concurrency
        self._drain_timeout = drain_timeout
        self._client: DBOSClient | None = None

    def task(self, func: Callable[_P, _R]) -> StoredTask[_P, _R]:
        """Make a function a `StoredTask`: its calls are stored under the names of its module and of the function.

        If you rename the function, calls that were stored before wait until the old name is back. An `async def` runs
        on the application's event loop under asyncio, and on a loop of DBOS under trio. An exception ends a call: the
        logger "dbos" reports it, the call is not run again, and the store keeps it as an ERROR. Calls that succeeded
        are removed. The result is dropped.

        Raises:
            TypeError: It is a lambda, a function inside a function, or not a function, such as a bound method.
        """
        return StoredTask(self, func)

    async def __aenter__(self) -> Self:
        """Start to run stored tasks, beginning with those that were running when a process was killed."""
        if not _dbos_is_free.acquire(blocking=False):
            raise RuntimeError("Another Store is entered, and DBOS exists once in a process: use one Store")
        with ExitStack() as stack:
            stack.callback(_dbos_is_free.release)
            await to_thread.run_sync(self._connect, stack)
            stack.callback(partial(DBOS.destroy, workflow_completion_timeout_sec=self._drain_timeout))
            DBOS.launch()  # on the event loop, which DBOS then uses for `async def` tasks
            await to_thread.run_sync(self._listen)
            closed = Event()
            cleaner = Thread(target=self._clean, args=(closed,), name="asgi-deferred-dbos", daemon=True)
            cleaner.start()
            stack.callback(cleaner.join, _PATIENCE)
            stack.callback(closed.set)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop, once the running tasks have ended or `drain_timeout` is over."""
        self._client = None
        with CancelScope(shield=True):
            await to_thread.run_sync(self._exit.close)

    def _connect(self, stack: ExitStack) -> None:
        self._engine = self._make_engine()
        stack.callback(self._engine.dispose)
        self._slot, lock = next((slot, lock) for slot in count() if (lock := self._lock(slot)))
        stack.enter_context(closing(lock))
        DBOS(
            config={
                "name": self._name,
                "system_database_url": self._url.render_as_string(hide_password=False),
                "db_engine_kwargs": _QUIET | ({"module": self._sqlite} if self._sqlite else {}),
                "application_version": _VERSION,
                "executor_id": f"{self._slot}",
                "notification_listener_polling_interval_sec": _POLL,  # which a shutdown waits for
                "log_level": "WARNING",
            }
        )

    def _make_engine(self) -> sa.Engine:
        """Return the engine that stores tasks. DBOS has one of its own, and more patience."""
        if self._sqlite:
            engine = sa.create_engine(
                self._url,
                module=self._sqlite,
                connect_args={"timeout": _PATIENCE, "isolation_level": "IMMEDIATE"},
                pool_timeout=_PATIENCE,
                **_QUIET,
            )
            # The default does not sync the folder, so that a power loss can undo the last commit.
            event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=EXTRA"))
            return engine
        return sa.create_engine(
            self._url.set(drivername="postgresql+psycopg"),
            connect_args={
                "connect_timeout": _PATIENCE,
                "options": f"-c statement_timeout={_PATIENCE}s",
                "tcp_user_timeout": _PATIENCE * 1000,  # for a machine that is gone and closes no connection
            },
            pool_pre_ping=True,
            pool_timeout=_PATIENCE,
            **_QUIET,
        )

    def _lock(self, slot: int) -> Any:
        """Lock a slot until the connection that this returns is closed; return `None` if another process has it."""
        if self._sqlite:
            connection = self._sqlite.connect(
                f"{self._url.database}.slot{slot}", timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                connection.executescript("PRAGMA journal_mode=MEMORY; BEGIN EXCLUSIVE")
            except self._sqlite.Error as exc:
                connection.close()
                if "locked" in f"{exc}":
                    return None
                raise
            return connection
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # from the pool, which would keep it open
        if connection.scalar(sa.text("SELECT pg_try_advisory_lock(hashtext(:n), :s)"), {"n": self._name, "s": slot}):
            return connection
        connection.close()
        return None

    def _listen(self) -> None:
        DBOS.register_queue(self._name, worker_concurrency=self._concurrency, polling_interval_sec=_POLL)
        self._client = DBOSClient(system_database_engine=self._engine, application_name=self._name, lazy=True)
        slots = {each.executor_id or "0" for each in self._list("PENDING")}
        for slot in slots - {f"{self._slot}"}:
            # There were more processes once. DBOS itself takes care only of the tasks of its own slot.
            if lock := self._lock(int(slot)):
                with closing(lock):  # so ask again: another process may just have resumed them
                    left = [each.workflow_id for each in self._list("PENDING") if each.executor_id == slot]
                    DBOS.resume_workflows(left, queue_name=self._name)

    def _list(self, status: str, limit: int | None = None) -> list[WorkflowStatus]:
        return DBOS.list_workflows(
            application_name=self._name, status=status, limit=limit, load_input=False, load_output=False
        )

    def _clean(self, closed: Event) -> None:
        """Delete what has ended well. DBOS would keep it for ever, with the arguments."""
        pause = 0
        while not closed.wait(pause):
            pause = _CLEANING
            with suppress(Exception):  # it tries again, and what is wrong with the store is in DBOS's log
                while ended := self._list("SUCCESS", _AT_ONCE):
                    DBOS.delete_workflows([each.workflow_id for each in ended])

    def _put(self, workflow: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._client is None:
            raise RuntimeError("The Store is not entered: write `async with store` in the application's lifespan")
        dumps((args, kwargs))  # raises now what DBOS would raise after it has logged the arguments
        with self._engine.begin() as connection:
            self._client.enqueue_in_transaction(
                connection,
                {"queue_name": self._name, "workflow_name": workflow, "app_version": _VERSION},
                *args,
                **kwargs,
            )


def _without_result(func: Callable[..., Any]) -> Callable[..., Any]:
    """Drop what a function returns. DBOS would store it, and fail the task where that cannot be pickled."""

    @wraps(func)
    def call(*args: Any, **kwargs: Any) -> None:
        returned = func(*args, **kwargs)
        if isinstance(returned, Awaitable | AsyncGenerator | Generator):
            raise TypeError(f"It returned a {type(returned).__name__}, which nobody runs: make it an `async def`")

    @wraps(func)
    async def call_async(*args: Any, **kwargs: Any) -> None:
        await func(*args, **kwargs)

    return call_async if iscoroutinefunction(func) else call


def _find_sqlite() -> Any:
    """Return Python's own SQLite, or that of pysqlite3 if Python's is too old.

    Raises:
        RuntimeError: Neither is new enough.
    """
    if sqlite3.sqlite_version_info >= _OLDEST_SQLITE:
        return sqlite3
    try:
        return import_module("pysqlite3.dbapi2")
    except ImportError:
        raise RuntimeError(
            f"DBOS needs SQLite 3.42 or newer, and this Python was built with {sqlite3.sqlite_version}. "
            "Install pysqlite3-binary, which brings its own, or use a newer Python, or PostgreSQL."
        ) from None
