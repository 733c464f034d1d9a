"""Which sample comes when: pure functions of (seed, epoch), so that any place in the stream is found
directly.

Captioned and uncaptioned samples are two sources, each an endless stream with its own position, which counts
samples of all ranks. A global micro-batch takes the next few of each; rank r takes its slice of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.random.bit_generator import ISeedSequence

GROUP = 16
"""Shards per group. Samples are shuffled within a group of shuffled shards: one group is open at a time, and
no permutation is as long as the data."""

# What a generator is for: part of its counter, so that no two uses share random numbers.
SHARD_ORDER, SAMPLE_ORDER, IMAGE, TEXT, MIM, SUBSTITUTE, AUDIO, VIDEO = range(8)


class _Key(ISeedSequence):
    """Hands a Philox its key. (Philox(key=...) gathers entropy first, at four times the cost.)"""

    def __init__(self, *words: int) -> None:
        self._words = np.array(words, dtype=np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return self._words


def generator(seed: int, epoch: int, number: int, purpose: int) -> np.random.Generator:
    """The random numbers of (seed, epoch, number, purpose).

    Philox is a counter-based generator (Salmon et al. 2011). The first two are its key, the others the high
    words of its counter, so that no two streams ever meet.
    """
    key: Any = _Key(seed, epoch)  # numpy's types name only its own SeedSequence
    return np.random.Generator(np.random.Philox(key, counter=(0, 0, number, purpose)))


class Numbers(Protocol):
    """An int64 array, or what numpy can make one of."""

    def __len__(self) -> int: ...
    def __array__(self) -> np.ndarray: ...


class Source:
    """The endless stream of one kind of sample. `shards` has the sample numbers of each shard (arrays, may be
    empty); `kind` (0, 1 ...) keeps two sources with the same seed from being shuffled alike. `begun` is told whenever another
    group of shards is begun: the places in `shards` of its shards, and of those of the group after it."""

    def __init__(
        self,
        shards: Sequence[Numbers],
        seed: int,
        kind: int,
        begun: Callable[[Sequence[int], Sequence[int]], None] | None = None,
    ) -> None:
        self._places = [place for place, shard in enumerate(shards) if len(shard)]
        self._shards = [shards[place] for place in self._places]
        self._begun = begun
        self._seed = seed
        self._kind = kind
        self._ends: tuple[int, list[list[int]], np.ndarray] | None = None
        self._group: tuple[tuple[int, int], np.ndarray] | None = None
        self._length = sum(map(len, self._shards))

    def __len__(self) -> int:
        return self._length

    @cached_property
    def all(self) -> np.ndarray:
        """int64 [samples]: every sample number, unshuffled. (Made when a substitute is first needed.)"""
        return np.concatenate(self._shards) if self._shards else np.zeros(0, dtype=np.int64)

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample number) at a position of the stream, 0, 1, 2 ..."""
        epoch, place = divmod(position, len(self))
        groups, ends = self._groups(epoch)
        group = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[group - 1]) if group else 0
        return epoch, int(self._shuffled(epoch, group, groups[group])[place - start])

    def _groups(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """The epoch's groups of shards, and how many samples they hold up to and with each."""
        if self._ends is None or self._ends[0] != epoch:
            rng = generator(self._seed, epoch, self._kind, SHARD_ORDER)
            order = rng.permutation(len(self._shards)).tolist()
            groups = [order[i : i + GROUP] for i in range(0, len(order), GROUP)]
            ends = np.cumsum([sum(len(self._shards[shard]) for shard in group) for group in groups])
            self._ends = epoch, groups, ends
        return self._ends[1], self._ends[2]

    def _shuffled(self, epoch: int, number: int, shards: list[int]) -> np.ndarray:
        group = self._group
        if group is None or group[0] != (epoch, number):
            samples = np.concatenate([self._shards[shard] for shard in shards])
            place = 2 * number + self._kind if self._kind < 2 else (self._kind << 32) + number
            rng = generator(self._seed, epoch, place, SAMPLE_ORDER)
            group = self._group = (epoch, number), samples[rng.permutation(len(samples))]
            if self._begun is not None:
                groups = self._groups(epoch)[0]
                coming = groups[number + 1] if number + 1 < len(groups) else self._groups(epoch + 1)[0][0]
                self._begun(*([self._places[one] for one in ones] for ones in (shards, coming)))
        return group[1]


@dataclass(frozen=True)
class Position:
    """Samples consumed so far by all ranks together, per source, and global micro-batches."""

    captioned: int = 0
    uncaptioned: int = 0
    batches: int = 0
    since: tuple[int, int] = (0, 0)
    """captioned and uncaptioned when the share of the two last changed: it holds from there on"""


@dataclass(frozen=True)
class Split:
    """What one rank takes of one global micro-batch: stream positions of both sources."""

    pairs: range
    uncaptioned: range
    after: Position


def split(position: Position, batch_size: int, rank: int, world_size: int, share: Fraction) -> Split:
    """The part of `rank` in the next global micro-batch of batch_size * world_size samples.

    The uncaptioned samples are `share` of all samples consumed (since the share last changed) up to the batch's end,
    rounded down: over time
    the share is exact, and it needs no state but the position. Each rank takes contiguous positions of both
    sources, batch_size in all; where the numbers do not divide, ranks differ by one pair.
    """
    total = batch_size * world_size
    captioned, before = position.captioned - position.since[0], position.uncaptioned - position.since[1]
    wanted = int(share * (captioned + before + total)) - before
    uncaptioned = max(0, min(wanted, total))
    low, high = uncaptioned * rank // world_size, uncaptioned * (rank + 1) // world_size
    first_pair = position.captioned + rank * batch_size - low
    return Split(
        pairs=range(first_pair, first_pair + batch_size - (high - low)),
        uncaptioned=range(position.uncaptioned + low, position.uncaptioned + high),
        after=Position(
            position.captioned + total - uncaptioned,
            position.uncaptioned + uncaptioned,
            position.batches + 1,
            position.since,
        ),
    )
