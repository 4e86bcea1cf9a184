"""What can go wrong, one exception for each thing the caller can do about it."""


class DeferredError(Exception):
    """Base of this package's own errors, raised itself only where no subclass fits."""


class MiddlewareMissing(DeferredError):
    """Raised when there is no task list to add to: outside a request, or without the middleware."""


class BacklogFull(DeferredError):
    """Raised by `add_task` at `max_pending` unfinished tasks of a runner with `overflow="reject"`.

    The task was not accepted. Answer 503 before anything is promised to the client.
    """


class RunnerClosed(DeferredError):
    """Raised by `add_task` when nothing is left that could run the task.

    That is: after the request's list has ended *and* its runner has drained, or its call has returned
    on a server without a lifespan. The task was not accepted.
    """


class EnqueueFailed(DeferredError):
    """Raised out of the application's `send` when an engine did not take a durable task.

    Before the response started the client has got a 503, or the answer of `Runner(unavailable=...)`, instead of it,
    and this exception ends at the middleware; let it pass, and what is open around the response, such as a
    transaction, rolls back. In the middle of a response it goes on to the server, which breaks the response off.
    `__cause__` is the engine's error.
    """

    answered = False  # whether the client has got an answer


class TaskTimedOut(TimeoutError):
    """Raised in an async task when its timeout is over, and the error of each TIMED_OUT task.

    It names the task. `__cause__`, if there is one, is the cancellation, and its traceback says where the task hung.
    """
