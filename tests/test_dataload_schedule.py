"""Mixtures by weight: exact, deterministic, and the same on any number of ranks."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataload.schedule import Progress, Schedule, shares, split


def test_shares_are_exact() -> None:
    assert shares({"a": 0.1, "b": 0.2}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    # MM-Align-2.0's 2.5B : 800M : 300M
    assert list(shares({"image": 2.5e9, "video": 800e6, "audio": 300e6}).values()) == [
        Fraction(25, 36),
        Fraction(8, 36),
        Fraction(3, 36),
    ]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True])
def test_impossible_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of 'b'"):
        shares({"a": 1, "b": weight})
    with pytest.raises(ValueError, match="no source"):
        shares({})
    with pytest.raises(ValueError, match="sum to 1"):
        Schedule([Fraction(1, 2), Fraction(1, 3)])


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=1, max_size=6), batch=st.integers(1, 50))
def test_shares_hold_at_every_sample(weights: list[int], batch: int) -> None:
    """No source is ever further from its share than one sample for two sources, two for up to six; and the order of
    the sources does not depend on the batch size."""
    parts = [Fraction(weight, sum(weights)) for weight in weights]
    schedule = Schedule(parts)
    whole = schedule.next([0] * len(weights), 500)
    counts = [0] * len(weights)
    bound = 1 if len(weights) <= 2 else 2
    for done, source in enumerate(whole, 1):
        counts[source] += 1
        assert all(abs(count - part * done) < bound for count, part in zip(counts, parts, strict=True))
    pieces: list[int] = []
    while len(pieces) < 500:
        seen = Counter(pieces)
        pieces += schedule.next([seen[i] for i in range(len(weights))], batch)
    assert pieces[:500] == whole


def test_a_period_is_exact() -> None:
    schedule = Schedule(list(shares({"image": 25, "video": 8, "audio": 3}).values()))
    assert Counter(schedule.next([0, 0, 0], 360)) == {0: 250, 1: 80, 2: 30}
    # far along, integers stay exact
    assert Counter(schedule.next([25 * 10**15, 8 * 10**15, 3 * 10**15], 36)) == {0: 25, 1: 8, 2: 3}


def test_ranks_share_the_same_global_batches_and_resume_elastically() -> None:
    """1 -> 2 -> 4 -> 3 ranks: each place of each source once, in order, and equal global batches."""
    schedule = Schedule(list(shares({"a": 5, "b": 2, "c": 1}).values()))
    alone, at = [], Progress((0, 0, 0))
    for _ in range(12):
        part = split(at, schedule, 24, 0, 1)
        alone.append(sorted(part.places))
        at = part.after
    at = Progress((0, 0, 0))
    for number, ranks in enumerate([1, 1, 2, 2, 2, 4, 4, 4, 3, 3, 3, 1]):
        parts = [split(at, schedule, 24 // ranks, rank, ranks) for rank in range(ranks)]
        assert all(len(part.places) == 24 // ranks for part in parts)
        assert len({part.after for part in parts}) == 1
        assert sorted(place for part in parts for place in part.places) == alone[number]
        for source in range(3):
            per_rank = [sum(s == source for s, _ in part.places) for part in parts]
            assert max(per_rank) - min(per_rank) <= 1
        at = parts[0].after
    taken = Counter(place for batch in alone for place in batch)
    assert set(taken.values()) == {1}
    assert at == Progress((180, 72, 36), 12)
