"""Batches ahead of their reader: threads draw the samples, the reader waits for the oldest batch and for nothing
else, and a thread that is slow, stuck or dead is named.

There is no thread but the pool that draws. The position is that of the last batch that was taken, so that
nothing has to be drained or undone to save a state, and after an error nothing is skipped.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from dataload.stages import Stages
from dataload.workers import Workers

_LOOK = 1.0
"""seconds between two looks at the threads while a batch is waited for"""


At_co = TypeVar("At_co", covariant=True)


class SlowWorkerWarning(UserWarning):
    """A batch has been waited for longer than is usual; the message names the threads and their samples."""


class WorkerStuck(RuntimeError):
    """A batch did not come within the limit, or a thread died; the message names it and its sample."""


class Plan(Protocol[At_co]):
    """A batch before it is drawn."""

    @property
    def after(self) -> At_co:
        """The position after this batch."""


J = TypeVar("J")
"""a sample to draw"""
D = TypeVar("D")
"""a drawn sample"""
P = TypeVar("P", bound=Plan[Any])
At = TypeVar("At")
"""a position in the stream"""


@dataclass
class _Pending(Generic[D, P]):
    plan: P
    chunks: list[Future[list[D]]]


@dataclass(frozen=True)
class Limits:
    """How long a batch may be waited for, in seconds."""

    warn: float = 60.0
    """after this long, SlowWorkerWarning says what the threads are at"""
    stop: float = 600.0
    """after this long, WorkerStuck ends the run; 0 = never"""


class Prefetch(Generic[J, D, P, At]):
    """`ahead` batches in a pool of `workers` threads, besides the one that is wanted now.

    plan: the position after the batch before -> what the next batch is, and its jobs.
    draw: one job -> one sample; called in the threads (in the caller's where `workers` is 0).
    name: a job -> 'shard/key', for messages.
    """

    def __init__(
        self,
        position: At,
        plan: Callable[[At], tuple[P, Sequence[J]]],
        draw: Callable[[J], D],
        name: Callable[[J], str],
        stages: Stages,
        *,
        workers: int,
        ahead: int,
        limits: Limits = Limits(),  # frozen
    ) -> None:
        self.position = position
        self._plan, self._draw, self._name, self._stages = plan, draw, name, stages
        self._count, self._ahead, self._limits = workers, ahead if workers else 0, limits
        self._pending: deque[_Pending[D, P]] = deque()
        self._workers: Workers | None = None
        self._process = os.getpid()
        self._closed = threading.Event()

    def oldest(self) -> tuple[P, list[D]]:
        """The next batch's plan and samples, waited for; `taken` then moves on. What a thread raised is raised
        here, with the position left where it was. Raises WorkerStuck, and RuntimeError after `close`."""
        if self._closed.is_set():
            raise RuntimeError("the loader is closed")
        if self._process != os.getpid():
            self._after_fork()
        try:
            while len(self._pending) <= self._ahead:
                before: At = self._pending[-1].plan.after if self._pending else self.position
                plan, jobs = self._plan(before)
                self._pending.append(_Pending(plan, self._submit(jobs)))
            oldest = self._pending[0]
            return oldest.plan, [one for chunk in oldest.chunks for one in self._wait(chunk)]
        except Exception:
            self.drop()
            raise

    def taken(self) -> None:
        """The batch that `oldest` gave is in the reader's hands."""
        self.position = self._pending.popleft().plan.after

    def drop(self) -> None:
        """Forgets what was drawn ahead; the position stays."""
        for pending in self._pending:
            for chunk in pending.chunks:
                chunk.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stops the threads after the samples they are in. The position can still be read."""
        self._closed.set()
        self.drop()
        if self._workers is not None and self._process == os.getpid():
            self._workers.close()

    def _submit(self, jobs: Sequence[J]) -> list[Future[list[D]]]:
        if self._count == 0:
            future: Future[list[D]] = Future()
            future.set_result(self._draw_all(jobs))
            return [future]
        if self._workers is None:
            self._workers = Workers(self._count, self._closed, "dataload")
        size = -(-len(jobs) // self._count)
        return [
            self._workers.submit(self._draw_all, jobs[i : i + size])
            for i in range(0, len(jobs), max(size, 1))
        ]

    def _draw_all(self, jobs: Sequence[J]) -> list[D]:
        """What a thread runs: a share of one batch."""
        drawn = []
        try:
            for job in jobs:
                if self._closed.is_set():
                    raise RuntimeError("the loader is closed")
                self._stages.begin(self._name(job))
                drawn.append(self._draw(job))
        finally:
            self._stages.begin("")
        return drawn

    def _wait(self, chunk: Future[list[D]]) -> list[D]:
        started, warned = time.monotonic(), False
        while True:
            try:
                return chunk.result(timeout=_LOOK)
            except FutureTimeout:
                if chunk.done():  # the sample itself raised a TimeoutError
                    return chunk.result()
            waited = time.monotonic() - started
            dead = self._workers.dead() if self._workers is not None else []
            if dead:
                raise WorkerStuck(f"the thread {', '.join(dead)} of the loader has died; {self._at()}")
            if self._limits.stop and waited > self._limits.stop:
                raise WorkerStuck(
                    f"no batch for {waited:.0f} s (stall_limit is {self._limits.stop:g}); {self._at()}"
                )
            if not warned and waited > self._limits.warn:
                warned = True
                warnings.warn(
                    f"a batch has been waited for {waited:.0f} s; {self._at()}",
                    SlowWorkerWarning,
                    stacklevel=5,
                )

    def _at(self) -> str:
        doing = self._stages.now()
        return "; ".join(map(str, doing[:4])) if doing else "no thread has a sample in hand"

    def _after_fork(self) -> None:
        """Threads do not survive a fork: goes on from the last batch that was taken, with new ones."""
        if self._workers is not None:
            self._workers.abandon()
        self._workers, self._closed, self._process = None, threading.Event(), os.getpid()
        self._pending.clear()
