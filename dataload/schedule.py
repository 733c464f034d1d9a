"""Which source the next samples come from: an exact, deterministic schedule for any number of weighted sources.

A sample goes to the source that is furthest behind its share. So every source is always within one sample of its
share for two sources, and within a few for more; the schedule needs no random numbers, and its whole state is the
number of samples that each source has given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


def shares(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as exact shares that sum to 1. Decimals count as written: 0.1 is a tenth.

    Raises ValueError where there is no source, or a weight is not a positive, finite number.
    """
    if not weights:
        raise ValueError("no source was given")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not math.isfinite(weight) or weight <= 0:
            raise ValueError(f"the weight of {name!r} is {weight!r}; it must be a positive number")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: share / total for name, share in exact.items()}


class Schedule:
    """Assigns samples to sources. `shares` sum to 1 (ValueError if not)."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        if sum(shares) != 1 or min(shares) < 0:
            raise ValueError(f"shares must be 0 or more and sum to 1, not {[str(one) for one in shares]}")
        # Whole numbers: share i is _parts[i] / _whole.
        self._whole = math.lcm(*(share.denominator for share in shares))
        self._parts = [int(share * self._whole) for share in shares]

    def next(self, consumed: Sequence[int], count: int) -> list[int]:
        """The sources of the next `count` samples, where source i has given consumed[i] so far."""
        # How far a source is behind once `total` samples are given, times _whole.
        total = sum(consumed)
        behind = [part * total - self._whole * done for part, done in zip(self._parts, consumed, strict=True)]
        chosen = []
        for _ in range(count):
            behind = [late + part for late, part in zip(behind, self._parts, strict=True)]
            source = behind.index(max(behind))
            behind[source] -= self._whole
            chosen.append(source)
        return chosen


@dataclass(frozen=True)
class Progress:
    """Samples consumed so far by all ranks together, per source, and global micro-batches."""

    consumed: tuple[int, ...]
    batches: int = 0


@dataclass(frozen=True)
class Share:
    """What one rank takes of one global micro-batch: (source, stream position) of each sample, in the order of
    the batch."""

    places: tuple[tuple[int, int], ...]
    after: Progress


def split(progress: Progress, schedule: Schedule, batch_size: int, rank: int, world_size: int) -> Share:
    """The part of `rank` in the next global micro-batch of batch_size * world_size samples.

    The global micro-batch is sorted by source, and dealt like cards: rank r takes its places r, r + world_size ...
    So every rank has batch_size samples, the ranks' numbers of samples per source differ by one at most, and the global
    batch does not depend on how many ranks share it.
    """
    sources = sorted(schedule.next(progress.consumed, batch_size * world_size))
    seen = list(progress.consumed)
    places = []
    for source in sources:
        places.append((source, seen[source]))
        seen[source] += 1
    return Share(tuple(places[rank::world_size]), Progress(tuple(seen), progress.batches + 1))
