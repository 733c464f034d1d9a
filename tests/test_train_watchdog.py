"""What the watchdog says of ranks that stop while others may take their time; threads stand for the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from train.engine import Ranks
from train.engines.watchdog import Watchdog

LIMIT = 0.5


class Watched(Watchdog):
    """Notes in memory; `frozen` stops its thread from publishing, as SIGSTOP would; leaving is written down."""

    frozen = False

    def __init__(self, rank: int, store: Any) -> None:
        super().__init__(Ranks(rank, rank, 2), LIMIT)
        self.store = store
        self.left: list[str] = []

    def _store(self) -> Any:
        return self.store

    def _publish(self, *values: Any, **named: Any) -> None:
        while self.frozen:
            time.sleep(LIMIT / 10)
        super()._publish(*values, **named)

    def _leave(self, found: list[str], seconds: float) -> None:
        self.left += found
        self._over.set()


@pytest.fixture
def pair() -> Iterator[tuple[Watched, Watched]]:
    store = dist.HashStore()
    both = Watched(0, store), Watched(1, store)
    for one in both:
        one.start()
    time.sleep(0.4 * LIMIT)  # both have published
    yield both
    for one in both:
        one.frozen = False
        one.stop()


def wait(done: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(LIMIT / 10)


def test_a_frozen_process_is_named_in_a_checkpoint(pair: tuple[Watched, Watched]) -> None:
    first, second = pair
    second.frozen = True
    with first.patient("a checkpoint"):
        wait(lambda: first.left, 20 * LIMIT)
    assert len(first.left) == 1 and "rank 1 hangs: it gives no sign of life" in first.left[0]


def test_a_rank_that_does_not_come_to_a_checkpoint_names_itself(pair: tuple[Watched, Watched]) -> None:
    """Its thread lives, so the others, which may take their time, do not end it."""
    first, second = pair
    with first.patient("a checkpoint"):
        wait(lambda: second.left, 20 * LIMIT)
    assert not first.left and "rank 1 hangs at: start" in second.left[0]
    assert "the others wait for it at: a checkpoint" in second.left[0]


def test_a_rank_that_is_done_does_not_count_as_silent(pair: tuple[Watched, Watched]) -> None:
    """And one that waits beyond an evaluation is excused by the one that evaluates."""
    first, second = pair
    with first.patient("the last evaluation"):
        with second.patient("the last evaluation"):
            pass
        time.sleep(3 * LIMIT)
        second.stop()
        time.sleep(4 * LIMIT)
        assert not first.left and not second.left


def test_a_rank_that_left_in_a_step_is_named(pair: tuple[Watched, Watched]) -> None:
    first, second = pair
    second.stop()
    wait(lambda: first.left, 20 * LIMIT)
    assert "rank 1 has left the run" in first.left[0]
