"""What a row says: whether its time counts, why it has none, its spread, its share of the roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from bench.record import Accuracy, Ceilings, Row, Run, Status, bound, median_interval
from bench.report.words import amount, duration, plural, share, size, span

Group = dict[tuple[str, str], list[Row]]  # (case, dtype) -> its rows
TITLES = {
    "forward": "Forward",
    "training": "Forward and backward",
    "step": "Training step",
    "load": "Loading",
}


def positive(value: float) -> bool:
    """Finite and above 0: can be divided by and drawn on a logarithmic axis."""
    return math.isfinite(value) and value > 0


def verdict(row: Row) -> Status:
    """The row's status, except that nothing counts as right whose errors are not, and no time is no success."""
    if row.status == "ok" and not all(one.good for one in row.accuracy):
        return "wrong"
    if row.status == "ok" and not (row.seconds and all(map(positive, row.seconds))):
        return "failed"
    return row.status


def reason(row: Row) -> str:
    """Why a row has no time that counts."""
    said = [row.note.strip()] if row.note.strip() else []
    match verdict(row):
        case "wrong":
            strained = strain(row)
            if strained and not strained[0] <= 1:
                said.append(
                    f"{strained[1]}: error {share(strained[0])} of what is allowed".replace(
                        "–", "not a number:"
                    )
                )
        case "failed" if row.status == "ok":
            said.append("its times are not numbers" if row.seconds else "no time was recorded")
        case "ok":
            return ""
    return "; ".join(said) or "no reason was recorded"


def error_share(one: Accuracy) -> float:
    """The larger of its two errors, each over what is allowed: above 1 is wrong; not-a-number wherever there is one."""
    shares = [_over(one.error, one.allowed), _over(one.relative, one.allowed_relative)]
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def strain(row: Row) -> tuple[float, str] | None:
    """The worst `error_share` and of which tensor; None where nothing was checked. Not-a-number is the worst."""
    shares = [(error_share(one), one.name) for one in row.accuracy]
    return max(shares, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0], default=None)


def _over(error: float, allowed: float) -> float:
    return error / allowed if allowed else 0.0 if error == 0 else math.nan if math.isnan(error) else math.inf


def rounds_interval(seconds: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the median of some rounds (see record.median_interval); None for a single round."""
    return median_interval(seconds)[1:] if len(seconds) > 1 else None


def spread(row: Row) -> float:
    """Interquartile range of the rounds over their median; not-a-number below 2 rounds."""
    if len(row.seconds) < 2:
        return math.nan
    low, _, high = statistics.quantiles(row.seconds, n=4, method="inclusive")
    return (high - low) / row.median


def usable(ceilings: Ceilings | None) -> Ceilings | None:
    """Only what can be a roof; None where nothing is left."""
    if ceilings is None or not positive(ceilings.copy):
        return None
    return Ceilings(ceilings.copy, {name: peak for name, peak in ceilings.matmul.items() if positive(peak)})


def roof(row: Row, ceilings: Ceilings | None) -> tuple[float, str] | None:
    """(share of its roofline, "memory" or "compute"); None where no work is assumed or no roof was measured."""
    if ceilings is None or not (positive(row.flops) and positive(row.bytes)):
        return None
    least = bound(row, ceilings)
    return (least[0] / row.median, least[1]) if least else None


def describe(row: Row, ceilings: Ceilings | None) -> str:
    """A timed row in one line, for hover and for readers of the screen."""
    said = [duration(row.median)]
    if interval := rounds_interval(row.seconds):
        said[0] += f" ({span(duration(interval[0]), duration(interval[1]))})"
    if positive(row.rate):
        said.append(amount(row.rate, f"{row.unit}/s"))
    if positive(row.flops):
        said.append(amount(row.flops / row.median, "FLOP/s"))
    if reached := roof(row, ceilings):
        said.append(f"{share(reached[0])} of the {reached[1]} roof")
    if row.peak_memory is not None:
        said.append(f"peak memory {size(row.peak_memory)}")
    return f"{row.peer}, {row.case}, {row.dtype}: {', '.join(said)}"


def arrange(rows: Iterable[Row]) -> dict[str, dict[str, Group]]:
    """Subject -> mode -> (case, dtype) -> rows, all in the order of their first appearance."""
    out: dict[str, dict[str, Group]] = {}
    for row in rows:
        modes = out.setdefault(row.subject, {})
        modes.setdefault(row.mode, {}).setdefault((row.case, row.dtype), []).append(row)
    return out


def case_title(key: tuple[str, str], group: Group) -> str:
    """The case's name, with the dtype where the group has several."""
    case, dtype = key
    return f"{case} · {dtype}" if len({name for _, name in group}) > 1 else case


def subject_title(name: str) -> str:
    """window_attention -> Window attention."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def mode_title(name: str) -> str:
    """training -> Forward and backward."""
    return TITLES.get(name, subject_title(name))


def block_title(subject: str, mode: str) -> str:
    """ "Window attention, forward"; the same words are not said twice."""
    first, second = subject_title(subject), mode_title(mode)
    return first if first.lower() == second.lower() else f"{first}, {second[:1].lower()}{second[1:]}"


def fastest(rows: Iterable[Row], *, ours: bool) -> Row | None:
    """The fastest right row of one side."""
    return min(
        (r for r in rows if r.ours is ours and verdict(r) == "ok"), key=lambda r: r.median, default=None
    )


def speedup(mine: Row, other: Row) -> tuple[float, float, float]:
    """How many times as fast as `other`, with its 95% interval: the recorded one, else that of the ratios round by round.

    Where there is neither (one round, or not the same rounds), both ends are the ratio of the medians.
    """
    for pair in mine.paired:
        if pair.peer == other.peer and all(map(positive, (pair.ratio, pair.low, pair.high))):
            return 1 / pair.ratio, 1 / pair.high, 1 / pair.low
    if len(mine.seconds) == len(other.seconds) > 1:
        by_round = [b / a for a, b in zip(mine.seconds, other.seconds, strict=True)]
        return statistics.median(by_round), *(rounds_interval(by_round) or (math.nan, math.nan))
    value = other.median / mine.median
    return value, value, value


def tally(run: Run) -> str:
    """ "72 rows: 60 timed, 1 wrong, 11 absent"."""
    counts = {
        status: sum(verdict(row) == status for row in run.rows)
        for status in ("ok", "wrong", "failed", "absent")
    }
    parts = [
        f"{count:,} {'timed' if status == 'ok' else status}" for status, count in counts.items() if count
    ]
    return f"{plural(len(run.rows), 'row')}{': ' + ', '.join(parts) if parts else ''}"
