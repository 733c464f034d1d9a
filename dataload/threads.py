"""A pool that takes a batch's samples in equal shares: what draws for the loaders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from dataload.resize import one_thread
from dataload.workers import Workers

J = TypeVar("J")
D = TypeVar("D")


class Threads:
    """`count` threads, started when they are first needed; 0 = the caller does the work. In them torch uses no threads of
    its own: they are the parallel part."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._name = name
        self._closed = threading.Event()
        self._pool: Workers | None = None

    def share(self, function: Callable[[Sequence[J]], list[D]], jobs: Sequence[J]) -> list[Future[list[D]]]:
        """function(a share of `jobs`) in each thread; the shares in their order."""
        if self.count == 0:
            future: Future[list[D]] = Future()
            with one_thread():
                future.set_result(function(jobs))
            return [future]
        if self._pool is None:
            self._pool = _start(self.count, self._closed, self._name)
        size = -(-len(jobs) // self.count) or 1
        return [self._pool.submit(function, jobs[i : i + size]) for i in range(0, len(jobs), size)]

    def check(self) -> None:
        """For jobs that take long: raises RuntimeError when the pool has been closed meanwhile."""
        if self._closed.is_set():
            raise RuntimeError("the loader is closed")

    def results(self, futures: Sequence[Future[list[D]]]) -> list[D]:
        """Of jobs that `share` began, for another thread; RuntimeError where the pool was closed and they never run."""
        results: list[D] = []
        for future in futures:
            while True:
                try:
                    results += future.result(timeout=0.5)
                    break
                except TimeoutError:
                    if future.done():
                        raise
                    self.check()
        return results

    def dead(self) -> list[str]:
        """Names of threads that have ended although the pool is open."""
        return self._pool.dead() if self._pool is not None else []

    def close(self) -> None:
        """Stops the threads after the samples they are in."""
        self._closed.set()
        if self._pool is not None:
            self._pool.close()

    def abandon(self) -> None:
        """Forgets the threads: for a forked process, where they do not exist."""
        if self._pool is not None:
            self._pool.abandon()
        self._pool, self._closed = None, threading.Event()


def _start(count: int, stop: threading.Event, name: str) -> Workers:
    pool = Workers(count, stop, name)
    before = torch.get_num_threads()
    if before == 1:
        return pool
    # torch keeps the number per thread, but what was set last is what a thread begins with when it first asks: so each
    # worker asks and sets its own (the barrier gives each of them one of these jobs), and then it is set back here.
    barrier = threading.Barrier(count)

    def limit() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        barrier.wait(60)

    for done in [pool.submit(limit) for _ in range(count)]:
        done.result()
    torch.set_num_threads(before)
    return pool
