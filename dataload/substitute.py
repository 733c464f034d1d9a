"""A broken sample's place is taken by another of the same source: always by the same one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dataload.broken import Broken, BrokenSample, TooManyBroken
from dataload.order import Source
from dataload.shards import ShardIndex

SUBSTITUTES = 20


class Attempt:
    """A wanted sample on its way, or the substitute that is tried in its place.

    rng: the wanted sample's own random numbers, asked for only when a substitute is needed.
    """

    def __init__(
        self, wanted: int, source: Source, rng: Callable[[], np.random.Generator], index: ShardIndex
    ) -> None:
        self.sample = wanted
        """what is to be tried now"""
        self.broken: list[Broken] = []
        """what was tried before"""
        self._source, self._new_rng, self._index = source, rng, index
        self._rng: np.random.Generator | None = None

    def fail(self, error: BrokenSample | OSError) -> None:
        """The present sample is broken (BrokenSample) or does not come (OSError): goes on to a substitute. Raises
        TooManyBroken where no substitute of 20 is whole either."""
        tier = "decode" if isinstance(error, BrokenSample) else "fetch"
        self.broken.append(describe(self._index, self.sample, str(error), tier))
        if len(self.broken) > SUBSTITUTES:
            few = "; ".join(str(one) for one in self.broken[:3])
            raise TooManyBroken(f"a sample and {SUBSTITUTES} substitutes for it are broken: {few}; ...")
        if self._rng is None:
            self._rng = self._new_rng()
        self.sample = int(self._source.all[self._rng.integers(len(self._source))])


def describe(index: ShardIndex, sample: int, reason: str, tier: str) -> Broken:
    """For reports: where the sample lies, what is wrong with it, and where that showed (see `Broken`)."""
    shard, key = index.where(sample)
    return Broken(shard, key, reason, tier, index.offset(sample))
