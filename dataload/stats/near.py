"""Pictures that are nearly the same: every pair of hashes within a distance, without exception.

Brute force on purpose: an exclusive or and a count of bits over 64-bit numbers costs about a nanosecond a pair and
core, so 10,000 pictures against a million take some 20 seconds of one core, mirror images included; no index would
be exact at such distances and faster.

    distance    bits (of 64) in which the hashes differ; picks the candidates
    check       bits (of 256) in which the fine hashes differ; decides

The limits are measured: `python -m dataload.stats.trial`, and the README beside this package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dataload.stats.looks import WHOLE

DISTANCE, CHECK = 12, 72
BLOCK = 1 << 16  # hashes: half a megabyte, which stays in the cache while queries pass over it


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, each once: int64 [n] all of them, `mirrored` bool [n]."""

    query: np.ndarray
    found: np.ndarray
    distance: np.ndarray
    check: np.ndarray
    mirrored: np.ndarray

    def __len__(self) -> int:
        return len(self.query)


def search(
    queries: np.ndarray,
    corpus: np.ndarray,
    *,
    distance: int = DISTANCE,
    check: int = CHECK,
    within: bool = False,
    step: Callable[[int], None] = lambda count: None,
) -> Pairs:
    """All pairs (row of `queries`, row of `corpus`) that look the same, or the same when one is mirrored.

    Both are LOOK arrays. `within`: they are one array, and only pairs with query < found count. Where a pair is
    near both ways, the nearer one is told. Rows that are not WHOLE are near to nothing. `step` is called with the
    number of queries done.
    """
    ours = np.flatnonzero(queries["state"] == WHOLE)
    theirs = np.flatnonzero(corpus["state"] == WHOLE)
    hashes = np.ascontiguousarray(corpus["hash"][theirs])
    workers = os.cpu_count() or 1
    chunk = max(1, min(256, -(-len(ours) // workers)))

    def candidates(first: int) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        found = []
        rows = ours[first : first + chunk]
        start = first if within else 0  # pairs with earlier ones are found from those
        for mirrored, name in ((False, "hash"), (True, "mirrored")):
            wanted = queries[name][rows]
            for query, place in _within(wanted, hashes[start:], distance):
                found.append((np.full(len(place), rows[query]), theirs[start:][place], mirrored))
        step(len(rows))
        return found

    with ThreadPoolExecutor(workers) as pool:
        parts = [part for some in pool.map(candidates, range(0, len(ours), chunk)) for part in some]
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return Pairs(nothing, nothing, nothing, nothing, nothing.astype(bool))
    query = np.concatenate([part[0] for part in parts])
    found = np.concatenate([part[1] for part in parts])
    mirrored = np.concatenate([np.full(len(part[0]), part[2]) for part in parts])
    if within:
        query, found, mirrored = (x[query < found] for x in (query, found, mirrored))
    return _decide(queries, corpus, query, found, mirrored, check)


def _within(wanted: np.ndarray, hashes: np.ndarray, distance: int) -> Iterator[tuple[int, np.ndarray]]:
    """(place in `wanted`, places in `hashes`) of all that differ in at most `distance` bits."""
    differ = np.empty(BLOCK, dtype=np.uint64)
    bits = np.empty(BLOCK, dtype=np.uint8)
    for start in range(0, len(hashes), BLOCK):
        block = hashes[start : start + BLOCK]
        some, counts = differ[: len(block)], bits[: len(block)]
        for query, one in enumerate(wanted):
            np.bitwise_xor(block, one, out=some)
            np.bitwise_count(some, out=counts)
            if counts.min() <= distance:
                yield query, start + np.flatnonzero(counts <= distance)


def _decide(
    queries: np.ndarray,
    corpus: np.ndarray,
    query: np.ndarray,
    found: np.ndarray,
    mirrored: np.ndarray,
    check: int,
) -> Pairs:
    """Candidates whose fine hashes are near too, each pair once, by query and nearness."""
    coarse = np.where(mirrored, queries["mirrored"][query], queries["hash"][query])
    fine = np.where(mirrored[:, None], queries["fine_mirrored"][query], queries["fine"][query])
    distances = np.bitwise_count(coarse ^ corpus["hash"][found]).astype(np.int64)
    checks = np.bitwise_count(fine ^ corpus["fine"][found]).sum(axis=1, dtype=np.int64)
    good = np.flatnonzero(checks <= check)
    order = good[np.lexsort((mirrored[good], checks[good], found[good], query[good]))]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (query[order][1:] != query[order][:-1]) | (found[order][1:] != found[order][:-1])
    kept = order[first]
    kept = kept[np.lexsort((checks[kept], query[kept]))]
    return Pairs(query[kept], found[kept], distances[kept], checks[kept], mirrored[kept])


def groups(count: int, pairs: Pairs) -> list[list[int]]:
    """Rows that pairs connect, directly or by way of others: lists of two or more, each sorted."""
    parent = np.arange(count)

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = int(parent[row])
        return row

    for one, other in zip(pairs.query.tolist(), pairs.found.tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    members: dict[int, list[int]] = {}
    for row in sorted({*pairs.query.tolist(), *pairs.found.tolist()}):
        members.setdefault(root(row), []).append(row)
    return list(members.values())
