"""A broken sample's place is taken by another of the same source: always by the same one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dataload.broken import Broken, BrokenSample, TooManyBroken
from dataload.shards import ShardIndex

SUBSTITUTES = 20
T = TypeVar("T")


def first_whole(
    make: Callable[[int], T],
    wanted: int,
    candidates: np.ndarray,
    rng: Callable[[], np.random.Generator],
    index: ShardIndex,
) -> tuple[int, T, list[Broken]]:
    """(sample, make(sample), what was broken before) for `wanted`, or else for the first sample drawn from
    `candidates` that is whole.

    make: raises BrokenSample for bytes that cannot be used, OSError for bytes that do not come. rng: the broken
    sample's own random numbers, asked for only when they are needed. Raises TooManyBroken where no substitute of 20
    is whole either.
    """
    broken: list[Broken] = []
    sample, generator = wanted, None
    while True:
        try:
            return sample, make(sample), broken
        except BrokenSample as error:
            broken.append(describe(index, sample, str(error), "decode"))
        except OSError as error:
            broken.append(describe(index, sample, str(error), "fetch"))
        if len(broken) > SUBSTITUTES:
            few = "; ".join(str(one) for one in broken[:3])
            raise TooManyBroken(f"a sample and {SUBSTITUTES} substitutes for it are broken: {few}; ...")
        if generator is None:
            generator = rng()
        sample = int(candidates[generator.integers(len(candidates))])


def describe(index: ShardIndex, sample: int, reason: str, tier: str) -> Broken:
    """For reports: where the sample lies, what is wrong with it, and where that showed (see `Broken`)."""
    shard, key = index.where(sample)
    return Broken(shard, key, reason, tier, index.offset(sample))
