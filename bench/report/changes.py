"""What changed between two runs, row by row. Every ratio is B over A: above 1 is slower, less exact, or more memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.record import Row, Run
from bench.report.rows import error_share, positive, reason, verdict
from bench.report.words import duration, plural, ratio, share, size

MARGIN = 0.05
OWN = "auroraio"  # its version is what a comparison is about, and no obstacle to it
Measure = Literal["status", "time", "time against", "error", "memory"]
Verdict = Literal["worse", "better", "same"]


@dataclass(frozen=True)
class Change:
    """One row in both runs. `ratio` is B over A; `verdict` says whether that is beyond the margin and the noise."""

    key: str
    ours: bool
    measure: Measure
    verdict: Verdict
    ratio: float
    low: float
    high: float
    text: str  # "1.20 ms -> 1.57 ms"
    against: str = ""  # the peer, where both runs' times are taken over that peer's


@dataclass(frozen=True)
class Comparison:
    """All that two runs have to say about each other; `changes` from the worst to the best."""

    margin: float
    warnings: tuple[str, ...]
    same_conditions: bool  # otherwise times are compared as ratios against common peers only
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    not_compared: tuple[str, ...]  # in both, with the reason

    @property
    def worse(self) -> list[Change]:
        """What is worse beyond the margin among our own rows: the reason for exit code 1."""
        return [change for change in self.changes if change.verdict == "worse" and change.ours]

    @property
    def lists(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What was not compared, by title."""
        return (
            ("Only in A", self.only_a),
            ("Only in B", self.only_b),
            ("In both, not compared", self.not_compared),
        )


def compare(a: Run, b: Run, margin: float = MARGIN) -> Comparison:
    """Compare run `b` with the earlier `a`. Raises ValueError where a run has one row twice."""
    rows_a, rows_b = _by_key(a, "A"), _by_key(b, "B")
    warnings, same = _conditions(a, b)
    changes: list[Change] = []
    left_out: list[str] = []
    for key in (key for key in rows_a if key in rows_b):
        before, after = rows_a[key], rows_b[key]
        was, now = verdict(before), verdict(after)
        if was != now or was != "ok":
            changes += _status(before, after, left_out)
            continue
        if same:
            interval = ratio_interval(after.seconds, before.seconds)
            text = f"{duration(before.median)} -> {duration(after.median)}"
            changes.append(_change(after, "time", interval, margin, text))
        else:
            pairs = _against_peers(before, after, rows_a, rows_b, margin)
            changes += pairs
            if after.ours and not pairs:
                left_out.append(f"{key}: its time, which has no peer in common that both runs paired it with")
        changes += _exactness(before, after, margin) + _memory(before, after, margin)
    drifted = [c for c in changes if not c.ours and c.measure == "time" and c.verdict != "same"]
    if drifted:
        warnings.append(
            f"{plural(len(drifted), 'time')} of other people's code changed too: part of what changed is the machine's"
        )
    changes.sort(key=lambda change: (-change.ratio, change.key))
    return Comparison(
        margin,
        tuple(warnings),
        same,
        tuple(changes),
        tuple(key for key in rows_a if key not in rows_b),
        tuple(key for key in rows_b if key not in rows_a),
        tuple(left_out),
    )


def ratio_interval(after: Sequence[float], before: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of all ratios of one of `after` to one of `before`; low to high is the 95% interval.

    Its ends are the k-th smallest and k-th largest ratio, k = floor(nm/2 - 1.96 sqrt(nm(n + m + 1)/12)), the normal
    approximation to the Mann-Whitney test's critical value. Where k is below 1 there are too few rounds for 95%, and
    the ends are the smallest and the largest.
    """
    n, m = len(after), len(before)
    ordered = np.sort((np.asarray(after)[:, None] / np.asarray(before)[None, :]).ravel())
    k = max(1, math.floor(n * m / 2 - 1.96 * math.sqrt(n * m * (n + m + 1) / 12)))
    return float(np.median(ordered)), float(ordered[k - 1]), float(ordered[-k])


def _by_key(run: Run, name: str) -> dict[str, Row]:
    twice = [key for key, count in Counter(row.key for row in run.rows).items() if count > 1]
    if twice:
        raise ValueError(f"{name} has more than one row {twice[0]}: which one to compare?")
    return {row.key: row for row in run.rows}


def _conditions(a: Run, b: Run) -> tuple[list[str], bool]:
    """What differs between the runs and makes times incomparable, and what should be known besides."""
    named = [(name, getattr(a, name), getattr(b, name)) for name in ("device", "kind", "profile")]
    versions = [name for name in dict.fromkeys([*a.versions, *b.versions]) if name != OWN]
    named += [
        (f"{name} version", a.versions.get(name, "none"), b.versions.get(name, "none")) for name in versions
    ]
    named.append(("rehearsed", str(a.rehearsed), str(b.rehearsed)))
    warnings = [f"{name} differs: {x} in A, {y} in B" for name, x, y in named if x != y]
    same = not warnings
    if not same:
        warnings.append(
            "so times are not comparable as such; compared are ratios against peers that both runs have"
        )
    if a.rehearsed and b.rehearsed:
        warnings.append("both runs were only rehearsed: not one time is a GPU's")
    return warnings, same


def _change(
    row: Row,
    measure: Measure,
    interval: tuple[float, float, float],
    margin: float,
    text: str,
    against: str = "",
) -> Change:
    """Worse: the ratio is beyond the margin, and the whole interval on the same side of 1. Better likewise."""
    value, low, high = interval
    worse, better = value > 1 + margin and low > 1, value < 1 / (1 + margin) and high < 1
    found: Verdict = "worse" if worse else "better" if better else "same"
    return Change(row.key, row.ours, measure, found, value, low, high, text, against)


def _status(before: Row, after: Row, left_out: list[str]) -> list[Change]:
    """A row that has no time in one of the runs: worse where it became wrong or failed, better the other way round."""
    was, now = verdict(before), verdict(after)
    if was == now or (was == "absent" and now != "wrong") or now == "absent":
        left_out.append(f"{after.key}: {f'{now} in both' if was == now else f'{was} in A, {now} in B'}")
        return []
    text = f"{was} -> {now}{': ' + reason(after) if now != 'ok' else ''}"
    order = ("ok", "absent", "failed", "wrong")
    worse = order.index(now) > order.index(was)
    value = math.inf if worse else 0.0
    return [
        Change(after.key, after.ours, "status", "worse" if worse else "better", value, value, value, text)
    ]


def _against_peers(
    before: Row, after: Row, rows_a: dict[str, Row], rows_b: dict[str, Row], margin: float
) -> list[Change]:
    """The row's time over that of each peer which both runs paired it with, B's over A's; of our own rows only."""
    common = [p for p in after.paired if after.ours and p.peer in {q.peer for q in before.paired}]
    out = []
    for pair in common:
        earlier = next(q for q in before.paired if q.peer == pair.peer)
        key = after.key.removesuffix(after.peer) + pair.peer
        series = [_by_round(row, rows.get(key)) for row, rows in ((before, rows_a), (after, rows_b))]
        if series[0] and series[1]:
            interval = ratio_interval(series[1], series[0])
        elif all(map(positive, (pair.ratio, pair.low, pair.high, earlier.ratio, earlier.low, earlier.high))):
            interval = pair.ratio / earlier.ratio, pair.low / earlier.high, pair.high / earlier.low
        else:
            continue
        text = f"{ratio(earlier.ratio)} -> {ratio(pair.ratio)} the time of {pair.peer}"
        out.append(_change(after, "time against", interval, margin, text, pair.peer))
    return out


def _by_round(row: Row, peer: Row | None) -> list[float]:
    """The row's time over the peer's, round by round; empty where their rounds are not the same."""
    if peer is None or verdict(peer) != "ok" or len(peer.seconds) != len(row.seconds):
        return []
    return [mine / other for mine, other in zip(row.seconds, peer.seconds, strict=True)]


def _exactness(before: Row, after: Row, margin: float) -> list[Change]:
    """RMSE over RMS of each tensor: the largest single error jumps with every change in the order of additions."""
    earlier = {one.name: one for one in before.accuracy}
    out = []
    for one in after.accuracy:
        if one.name in earlier:
            x, y = earlier[one.name].relative, one.relative
            value = y / x if x else 1.0 if y == 0 else math.inf
            text = f"{one.name}: {x:.2g} -> {y:.2g}; {share(error_share(one))} of what is allowed"
            out.append(_change(after, "error", (value, value, value), margin, text))
    return out


def _memory(before: Row, after: Row, margin: float) -> list[Change]:
    x, y = before.peak_memory, after.peak_memory
    if x is None or y is None:
        return []
    value = y / x if x else 1.0 if y == 0 else math.inf
    return [_change(after, "memory", (value, value, value), margin, f"{size(x)} -> {size(y)}")]
