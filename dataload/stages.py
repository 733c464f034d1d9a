"""What a pipeline does, as a table: its stages, what they have cost so far, and what each thread is at now."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType


@dataclass
class Cost:
    """One stage, summed over all threads."""

    calls: int = 0
    seconds: float = 0.0
    """on the clock"""
    cpu_seconds: float = 0.0
    """of the calling threads alone (a library's own threads are not in it)"""
    slowest: float = 0.0
    """seconds of the longest call"""
    slowest_sample: str = ""
    """what that call was working on"""


@dataclass(frozen=True)
class Doing:
    """What a thread is at."""

    thread: str
    stage: str
    sample: str
    since: float
    """time.monotonic() at which it began"""

    def __str__(self) -> str:
        stage = f"in {self.stage}" if self.stage else "between two stages"
        sample = f" of {self.sample}" if self.sample else ""
        return f"{self.thread}: {stage}{sample} for {time.monotonic() - self.since:.1f} s"


@dataclass
class _Thread:
    """A thread's own sums: written by it alone, so that no lock is needed."""

    name: str
    costs: dict[str, Cost] = field(default_factory=dict)
    stage: str = ""
    sample: str = ""
    since: float = 0.0


class Stages:
    """Measures stages by `with stages("decode"):`, in any thread. `str()` is a table of them.

    `descriptions` names every stage in the order of the table; another name is a KeyError. Stages do not
    nest. Measuring costs about 2 us a stage.
    """

    def __init__(self, descriptions: Mapping[str, str]) -> None:
        self.descriptions = dict(descriptions)
        self._local = threading.local()
        self._threads: list[_Thread] = []
        self._lock = threading.Lock()

    def __call__(self, stage: str) -> _Timer:
        return _Timer(self._mine(), stage)

    def begin(self, sample: str) -> None:
        """Says what the calling thread works on from here on; empty = nothing."""
        mine = self._mine()
        mine.sample, mine.since = sample, time.monotonic()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """After this block the calling thread has no sample in hand, however it ends."""
        try:
            yield
        finally:
            self.begin("")

    def _mine(self) -> _Thread:
        mine: _Thread | None = getattr(self._local, "thread", None)
        if mine is None:
            mine = _Thread(threading.current_thread().name, {name: Cost() for name in self.descriptions})
            self._local.thread = mine
            with self._lock:
                self._threads.append(mine)
        return mine

    def now(self) -> list[Doing]:
        """What each thread that has a sample in hand is at, the one that has been at it longest first."""
        with self._lock:
            threads = list(self._threads)
        doing = [Doing(one.name, one.stage, one.sample, one.since) for one in threads if one.sample]
        return sorted(doing, key=lambda one: one.since)

    def costs(self) -> dict[str, Cost]:
        """The sums of all threads, by stage."""
        with self._lock:
            threads = list(self._threads)
        total = {name: Cost() for name in self.descriptions}
        for thread in threads:
            for name, cost in thread.costs.items():
                one = total[name]
                one.calls += cost.calls
                one.seconds += cost.seconds
                one.cpu_seconds += cost.cpu_seconds
                if cost.slowest > one.slowest:
                    one.slowest, one.slowest_sample = cost.slowest, cost.slowest_sample
        return total

    def __str__(self) -> str:
        costs = self.costs()
        whole = sum(cost.seconds for cost in costs.values()) or 1.0
        rows = [("stage", "calls", "ms each", "cpu ms", "share", "slowest", "")]
        for name, cost in costs.items():
            calls = max(cost.calls, 1)
            rows.append(
                (
                    name,
                    f"{cost.calls:,}",
                    f"{1e3 * cost.seconds / calls:.2f}",
                    f"{1e3 * cost.cpu_seconds / calls:.2f}",
                    f"{100 * cost.seconds / whole:.0f}%",
                    f"{1e3 * cost.slowest:.0f} ms" if cost.calls else "-",
                    self.descriptions[name],
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = []
        for row in rows:
            numbers = "  ".join(row[i].rjust(widths[i]) for i in range(1, 6))
            lines.append(f"  {row[0].ljust(widths[0])}  {numbers}  {row[6]}".rstrip())
        slow = max(costs.values(), key=lambda cost: cost.slowest)
        if slow.slowest_sample:
            lines.append(f"  slowest: {slow.slowest_sample}, {1e3 * slow.slowest:.0f} ms")
        return "\n".join(lines)


class _Timer:
    """One call of one stage."""

    __slots__ = ("_cpu", "_stage", "_thread", "_wall")

    def __init__(self, thread: _Thread, stage: str) -> None:
        self._thread = thread
        self._stage = stage

    def __enter__(self) -> None:
        self._thread.stage = self._stage
        self._thread.costs[self._stage]  # an unknown stage is an error here
        self._wall, self._cpu = time.perf_counter(), time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, cpu = time.perf_counter() - self._wall, time.thread_time() - self._cpu
        cost = self._thread.costs[self._stage]
        cost.calls += 1
        cost.seconds += seconds
        cost.cpu_seconds += cpu
        if seconds > cost.slowest:
            cost.slowest, cost.slowest_sample = seconds, self._thread.sample
        self._thread.stage = ""
