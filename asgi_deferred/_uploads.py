"""Uploads stay open for the tasks that have them among their arguments.

1. FastAPI closes a form when the endpoint's call ends, and `async with request.form()` closes it at the end of the
   block. If an unfinished task of the request's list can reach an upload of the form, that upload is closed later, when
   the last task of the list has ended.
2. A task reaches its arguments, and what is in their containers, partials, methods, closures, models and dataclasses.
3. `await upload.close()` closes the upload at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache, partial, wraps
from logging import ERROR
from types import FunctionType, MethodType
from typing import Any

from starlette.datastructures import FormData, UploadFile

from ._reports import write
from ._states import TaskState
from ._tasks import DeferredTasks, current

_DEPTH = 4  # of containers in containers


@cache
def keep_uploads() -> None:
    """Replace the method that closes a form, once per process. It only changes forms whose uploads a task can reach."""
    close = FormData.close

    @wraps(close)
    async def close_or_keep(self: FormData) -> None:
        tasks = current.get()
        uploads = [value for _, value in self.multi_items() if isinstance(value, UploadFile)]
        kept = _kept(tasks, uploads) if tasks is not None and uploads else []
        if tasks is None or not kept:
            await close(self)
            return
        tasks._then = partial(_close, kept, tasks._then)
        for each in uploads:
            if each not in kept:
                await each.close()

    setattr(FormData, "close", close_or_keep)  # noqa: B010 - type checkers do not let a method be replaced


def _kept(tasks: DeferredTasks, uploads: list[UploadFile]) -> list[UploadFile]:
    """Return the uploads that unfinished tasks can reach; none if the request has ended: nobody would close them."""
    if tasks._ended:
        return []
    unfinished = [task for task in tasks if task.state in (TaskState.PENDING, TaskState.RUNNING)]
    reached = {id(value) for task in unfinished for value in _reached((task.func, task.args, task.kwargs), _DEPTH)}
    return [each for each in uploads if id(each) in reached or id(each.file) in reached]


def _reached(value: Any, depth: int) -> Iterator[Any]:
    yield value
    if depth:
        for each in _parts(value):
            yield from _reached(each, depth - 1)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, FormData):
        return [each for _, each in value.multi_items()]
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, FunctionType):
        return map(_contents, value.__closure__ or ())
    if is_dataclass(value) or hasattr(type(value), "model_fields"):
        return getattr(value, "__dict__", {}).values()
    return ()


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return None


def _close(uploads: list[UploadFile], then: Callable[[], object] | None) -> None:
    for each in uploads:
        try:
            each.file.close()
        except Exception as exc:
            write(ERROR, "An upload could not be closed", error=exc)
    if then is not None:
        then()
