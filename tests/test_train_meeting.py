"""Ranks of a restarted round meet each other, not what the round before has left in the store."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from train.engines.meeting import agree

SOON = timedelta(seconds=20)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 2), (1, 3)])
def test_each_round_has_its_own_name(sizes: tuple[int, int]) -> None:
    """In one store, as an agent keeps it; rank 0 comes last, rank 1 first, or the other way round."""
    store, names = dist.HashStore(), []
    for size in sizes:
        for order in (1, -1):
            with ThreadPoolExecutor(size) as pool:
                found = []
                for rank in range(size)[::order]:
                    found.append(pool.submit(agree, store, rank, size, SOON))
                    time.sleep(0.05)
                (name,) = {one.result() for one in found}
            names.append(name)
    assert len(set(names)) == 4


def test_a_round_that_is_not_whole_ends() -> None:
    """What the round before has left does not stand for a rank that is missing."""
    store = dist.HashStore()
    store.set("hello/1", "gone")
    store.set("round", json.dumps({"name": "old", "heard": ["gone"]}))
    store.set("old/here/1", "")
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match=f"rank {rank}: the other ranks"):
            agree(store, rank, 2, timedelta(seconds=0.2))
