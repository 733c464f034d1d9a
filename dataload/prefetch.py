"""Batches ahead of their reader: threads draw the samples, the reader waits for the oldest batch and for nothing
else, and a thread that is slow, stuck or dead is named.

There is no thread but the pool that draws. The position is that of the last batch that was taken, so that
nothing has to be drained or undone to save a state, and after an error nothing is skipped.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from dataload.stages import Stages

_LOOK = 1.0
"""seconds between two looks at the threads while a batch is waited for"""


At_co = TypeVar("At_co", covariant=True)


class SlowWorkerWarning(UserWarning):
    """A batch has been waited for longer than is usual; the message names the threads and their samples."""


class WorkerStuck(RuntimeError):
    """A batch did not come within the limit, or a thread died; the message names it and its sample."""


J_contra = TypeVar("J_contra", contravariant=True)
D = TypeVar("D")
"""a drawn sample"""
J = TypeVar("J")
"""a sample to draw"""
W = TypeVar("W", bound="Work[Any]")
"""a batch that is being made"""
R = TypeVar("R")
W_co = TypeVar("W_co", bound="Work[Any]", covariant=True)
P = TypeVar("P", bound="Plan[Any]")
At = TypeVar("At")
"""a position in the stream"""


class Plan(Protocol[At_co]):
    """A batch before it is made."""

    @property
    def after(self) -> At_co:
        """The position after this batch."""


@dataclass(frozen=True)
class Work(Generic[D]):
    """A batch that is being made."""

    parts: list[Future[list[D]]]
    """its samples, in their order"""

    def cancel(self) -> None:
        """What has not begun will not be done."""
        for part in self.parts:
            part.cancel()


class Backend(Protocol[J_contra, W_co]):
    """Makes batches in the order in which they are submitted, as far ahead as its caller likes."""

    def submit(self, jobs: Sequence[J_contra]) -> W_co:
        """Begins a batch. Broken samples are replaced; everything else that goes wrong is raised by the parts."""

    def dead(self) -> list[str]:
        """Names of threads that have ended although they should not."""

    def close(self) -> None:
        """Stops the threads; what they have not begun never ends."""

    def abandon(self) -> None:
        """Forgets the threads, and begins with new ones: for a forked process, where they do not exist."""


@dataclass(frozen=True)
class _Pending(Generic[P, W]):
    plan: P
    work: W


@dataclass(frozen=True)
class Limits:
    """How long a batch may be waited for, in seconds."""

    warn: float = 60.0
    """after this long, SlowWorkerWarning says what the threads are at"""
    stop: float = 600.0
    """after this long, WorkerStuck ends the run; 0 = never"""


def wait(part: Future[R], limits: Limits, dead: Callable[[], list[str]], at: Callable[[], str]) -> R:
    """What a thread makes, or raises. Raises WorkerStuck once `limits.stop` has passed or where `dead` names a thread;
    `at` says for its message, and for that of SlowWorkerWarning, what is being done."""
    started, warned = time.monotonic(), False
    while True:
        try:
            return part.result(timeout=_LOOK)
        except FutureTimeout:
            if part.done():  # the sample itself raised a TimeoutError
                return part.result()
        waited = time.monotonic() - started
        if gone := dead():
            raise WorkerStuck(f"the thread {', '.join(gone)} of the loader has died; {at()}")
        if limits.stop and waited > limits.stop:
            raise WorkerStuck(f"no batch for {waited:.0f} s (stall_limit is {limits.stop:g}); {at()}")
        if not warned and waited > limits.warn:
            warned = True
            warnings.warn(
                f"a batch has been waited for {waited:.0f} s; {at()}", SlowWorkerWarning, stacklevel=6
            )


class Prefetch(Generic[J, P, W, At]):
    """`ahead` batches in a backend, besides the one that is wanted now.

    plan: the position after the batch before -> what the next batch is, and its jobs.
    """

    def __init__(
        self,
        position: At,
        plan: Callable[[At], tuple[P, Sequence[J]]],
        backend: Backend[J, W],
        stages: Stages,
        *,
        ahead: int,
        limits: Limits = Limits(),
    ) -> None:
        self.position = position
        self.waited = 0.0
        """seconds that the reader has waited for batches"""
        self._plan, self._backend, self._stages = plan, backend, stages
        self._ahead, self._limits = ahead, limits
        self._pending: deque[_Pending[P, W]] = deque()
        self._process = os.getpid()
        self._closed = False

    def oldest(self) -> tuple[P, W, list[Any]]:
        """The next batch: its plan, its work, and its samples, waited for; `taken` then moves on. What a thread raised
        is raised here, with the position left where it was. Raises WorkerStuck, and RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._process != os.getpid():  # a fork: goes on from the last batch that was taken
            self._backend.abandon()
            self._pending.clear()
            self._process = os.getpid()
        started = time.perf_counter()
        try:
            while len(self._pending) <= self._ahead:
                before: At = self._pending[-1].plan.after if self._pending else self.position
                plan, jobs = self._plan(before)
                self._pending.append(_Pending(plan, self._backend.submit(jobs)))
            oldest = self._pending[0]
            drawn = [one for part in oldest.work.parts for one in self._wait(part)]
        except Exception:
            self.drop()
            raise
        self.waited += time.perf_counter() - started
        return oldest.plan, oldest.work, drawn

    def taken(self) -> None:
        """The batch that `oldest` gave is in the reader's hands."""
        self.position = self._pending.popleft().plan.after

    def drop(self) -> None:
        """Forgets what was made ahead; the position stays."""
        for pending in self._pending:
            pending.work.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stops the threads after the samples they are in. The position can still be read."""
        self._closed = True
        self.drop()
        if self._process == os.getpid():
            self._backend.close()

    def _wait(self, part: Future[list[Any]]) -> list[Any]:
        return wait(part, self._limits, self._backend.dead, self._at)

    def _at(self) -> str:
        doing = self._stages.now()
        return "; ".join(map(str, doing[:4])) if doing else "no thread has a sample in hand"
