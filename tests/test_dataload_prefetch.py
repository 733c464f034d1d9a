"""The pool that draws ahead: who is slow, stuck or dead is named; and what stages cost."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from dataload import prefetch, workers
from dataload.prefetch import Limits, Prefetch, SlowWorkerWarning, Work, WorkerStuck
from dataload.stages import Stages
from dataload.threads import Threads


@dataclass(frozen=True)
class Four:
    """Four numbers from `first` on."""

    first: int

    @property
    def after(self) -> int:
        return self.first + 4


NONE = Limits()


class Numbers:
    """Draws numbers in threads; `hold` makes the drawing of one wait for an event."""

    def __init__(self, threads: int, hold: int, stages: Stages) -> None:
        self.released = threading.Event()
        self.threads = Threads(threads, "dataload")
        self.dead, self.close, self.abandon = self.threads.dead, self.threads.close, self.threads.abandon
        self._hold, self._stages = hold, stages

    def draw(self, number: int) -> int:
        with self._stages("draw"):
            if number == self._hold:
                self.released.wait(60)
        return number

    def submit(self, jobs: Sequence[int]) -> Work[int]:
        return Work(self.threads.share(self._some, jobs))

    def _some(self, jobs: Sequence[int]) -> list[int]:
        drawn = []
        with self._stages.idle():
            for job in jobs:
                self.threads.check()
                self._stages.begin(f"shard/{job:03d}")
                drawn.append(self.draw(job))
        return drawn


class Line(Prefetch[int, Four, Work[int], int]):
    """0, 1, 2 ... in batches of four."""

    def __init__(self, threads: int = 2, hold: int = -1, limits: Limits = NONE) -> None:
        self.stages = Stages({"draw": "a number"})
        self.numbers = Numbers(threads, hold, self.stages)
        ahead = 3 if threads else 0
        super().__init__(
            0,
            lambda at: (Four(at), range(at, at + 4)),
            self.numbers,
            self.stages,
            ahead=ahead,
            limits=limits,
        )

    def take(self) -> list[int]:
        _, _, drawn = self.oldest()
        self.taken()
        return drawn


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_LOOK", 0.02)
    monkeypatch.setattr(workers, "_PATIENCE", 0.3)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_order(threads: int) -> None:
    line = Line(threads)
    assert [line.take() for _ in range(5)] == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert line.position == 20
    line.close()


def test_a_slow_thread_is_named_and_then_waited_for() -> None:
    line = Line(hold=5, limits=Limits(warn=0.1, stop=30))
    assert line.take() == [0, 1, 2, 3]
    threading.Timer(0.5, line.numbers.released.set).start()
    with pytest.warns(SlowWorkerWarning, match=r"dataload-\d: in draw of shard/005 for 0\.\d s") as caught:
        assert line.take() == [4, 5, 6, 7]
    assert len(caught) == 1
    line.close()
    cost = line.stages.costs()["draw"]
    assert cost.slowest_sample == "shard/005" and 0.4 < cost.slowest < 5 and cost.cpu_seconds < 0.3


def test_a_stuck_thread_ends_the_run_and_names_its_sample() -> None:
    line = Line(hold=5, limits=Limits(warn=30, stop=0.2))
    line.take()
    started = time.monotonic()
    with pytest.raises(WorkerStuck, match=r"stall_limit is 0\.2.*dataload-\d: in draw of shard/005"):
        line.take()
    assert line.position == 4
    line.close()  # the stuck thread is left behind
    assert time.monotonic() - started < 5
    line.numbers.released.set()


def test_without_limits_nothing_is_said() -> None:
    line = Line(hold=2, limits=Limits(warn=30, stop=0))
    threading.Timer(0.3, line.numbers.released.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert line.take() == [0, 1, 2, 3]
    line.close()


def test_a_dead_thread_is_named() -> None:
    line = Line(threads=1, hold=5)
    line.take()
    assert line.numbers.threads._pool is not None
    line.numbers.threads._pool._queue.put(None)  # what ends a thread, while the pool is open
    line.numbers.released.set()
    with pytest.raises(WorkerStuck, match="the thread dataload-0 of the loader has died"):
        for _ in range(9):
            line.take()
    line.close()


def test_an_error_leaves_the_position_and_is_raised() -> None:
    line = Line()
    line.take()
    line.numbers.draw = lambda number: 1 // (number - 9)
    for _ in range(3):  # the batches that were ahead are whole
        line.take()
    assert line.position == 16
    line.numbers.draw = lambda number: 1 // (number - 33)
    with pytest.raises(ZeroDivisionError):
        for _ in range(9):
            line.take()
    assert line.position == 32
    line.numbers.draw = lambda number: number
    assert line.take() == [32, 33, 34, 35]
    line.close()


def test_a_timeout_of_the_sample_itself_is_raised() -> None:
    line = Line()
    line.numbers.draw = lambda number: (_ for _ in ()).throw(TimeoutError("the host is silent"))
    with pytest.raises(TimeoutError, match="the host is silent"):
        line.take()
    line.close()


# stages


def test_stages_sum_over_threads_and_are_printed() -> None:
    stages = Stages({"read": "bytes from the disk", "work": "what is done with them"})

    def run(name: str) -> None:
        stages.begin(name)
        for _ in range(3):
            with stages("read"):
                time.sleep(0.02)
        with stages("work"):
            until = time.thread_time() + 0.03
            while time.thread_time() < until:
                pass

    threads = [threading.Thread(target=run, args=(f"shard/{i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    costs = stages.costs()
    assert costs["read"].calls == 6 and costs["work"].calls == 2
    assert costs["read"].seconds >= 0.12 > costs["read"].cpu_seconds
    assert 0.06 <= costs["work"].cpu_seconds < 0.12
    lines = str(stages).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "read", "work", "slowest:"]
    assert lines[1].endswith("bytes from the disk") and " 6 " in lines[1]
    assert [doing.sample for doing in stages.now()] == ["shard/0", "shard/1"]


def test_an_error_ends_its_stage_and_unknown_stages_are_refused() -> None:
    stages = Stages({"read": ""})
    with pytest.raises(KeyError), stages("write"):
        pass
    with pytest.raises(OSError), stages("read"):
        raise OSError
    assert stages.costs()["read"].calls == 1
