"""The exceptions: one for each thing that the caller can do about an error."""


class DeferredError(Exception):
    """Base of this package's errors. It is raised itself only where no subclass fits."""


class MiddlewareMissing(DeferredError):
    """Raised when there is no task list: outside a request, or without the middleware."""


class BacklogFull(DeferredError):
    """Raised by `add_task` at `max_pending` unfinished tasks of a runner with `overflow="reject"`.

    The task was not accepted. Answer 503 before you promise anything to the client.
    """


class RunnerClosed(DeferredError):
    """Raised by `add_task` when nothing is left that could run the task.

    The request has ended, and its runner has drained. On a server without a lifespan, the request's call has
    returned. The task was not accepted.
    """


class EnqueueFailed(DeferredError):
    """Raised out of the application's `send` when an engine does not take a durable task.

    If the response had not started, the client has already got a 503, or the answer of `Runner(unavailable=...)`. The
    exception then ends at the middleware. Do not catch it: as it passes, everything that is open around the response,
    such as a transaction, rolls back. If the response had started, the exception reaches the server, which breaks the
    response off. `__cause__` is the engine's error.
    """

    answered = False  # whether the client got a complete answer


class TaskTimedOut(TimeoutError):
    """The error of a TIMED_OUT task. It is raised in an async task when the timeout is over.

    The message names the task. If there is a `__cause__`, it is the cancellation, and its traceback shows where the
    task hung.
    """
