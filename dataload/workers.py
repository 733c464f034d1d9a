"""A pool of threads that lets a process end.

concurrent.futures' own pool makes the interpreter's exit wait until everything in its queue has been done: a
few batches of large pictures are a long time after Ctrl-C.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_Queue = SimpleQueue["Callable[[], None] | None"]
_PATIENCE = 30.0
"""seconds for which closing waits for a job that does not end"""


class Workers:
    """`count` threads that run what is submitted, in order.

    `stop` is set when the pool is closed, garbage-collected, or left behind at the interpreter's exit: jobs
    that take long look at it and give up.
    """

    def __init__(self, count: int, stop: threading.Event, name: str) -> None:
        self._queue: _Queue = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._queue, stop), name=f"{name}-{i}", daemon=True)
            for i in range(count)
        ]
        # Daemons are not waited for, so that this is reached at exit; it then waits until they have stopped.
        self._finalizer = weakref.finalize(self, _stop, self._queue, stop, self._threads)
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Puts a call at the end of the queue. What it raises is raised by the future's result()."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._queue.put(run)
        return future

    def dead(self) -> list[str]:
        """Names of the threads that have ended although the pool is open."""
        return (
            [thread.name for thread in self._threads if not thread.is_alive()]
            if self._finalizer.alive
            else []
        )

    def close(self) -> None:
        """Stops the threads after the jobs they are in; what is still queued is never run, and its futures
        never end. A job that goes on for another 30 seconds is left behind: a stuck one must not hold the process."""
        self._finalizer()

    def abandon(self) -> None:
        """Forgets the threads: for a forked process, where they do not exist."""
        self._finalizer.detach()


def _work(queue: _Queue, stop: threading.Event) -> None:
    while (job := queue.get()) is not None and not stop.is_set():
        job()
        del job  # holds what was submitted, until the next one comes


def _stop(queue: _Queue, stop: threading.Event, threads: list[threading.Thread]) -> None:
    stop.set()
    for _ in threads:
        queue.put(None)
    until = time.monotonic() + _PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():  # the last reference may have been dropped by a job
            thread.join(max(0.0, until - time.monotonic()))
