"""Whole numbers and texts, counted: lengths, sides, durations, words."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

BARS = 24  # at most, of a histogram
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


@dataclass
class Distribution:
    """How often each value came, so that its figures are exact. `scale`: a unit in which values are kept (0.1 for
    tenths); they are rounded to it."""

    scale: float = 1.0
    values: Counter[int] = field(default_factory=Counter)

    def add(self, value: float, times: int = 1) -> None:
        """Counts one value."""
        self.values[round(value / self.scale)] += times

    def __len__(self) -> int:
        return self.values.total()

    def at(self, share: float) -> float:
        """The smallest value that is not below `share` of all (0.5: the median); not-a-number for none."""
        wanted, seen = max(1, math.ceil(share * len(self))), 0
        for value in sorted(self.values):
            seen += self.values[value]
            if seen >= wanted:
                return self._out(value)
        return math.nan

    def to_json(self) -> dict[str, Any]:
        """{"count", "mean", "min", "p5", "median", "p95", "p99", "max", "histogram": [[from, up to, count]]}."""
        if not self.values:
            return {"count": 0}
        total = sum(value * count for value, count in self.values.items())
        shares = {"p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99}
        return {
            "count": len(self),
            "mean": round(total * self.scale / len(self), 3),
            "min": self._out(min(self.values)),
            **{name: self.at(share) for name, share in shares.items()},
            "max": self._out(max(self.values)),
            "histogram": self.histogram(),
        }

    def histogram(self) -> list[list[float]]:
        """[from, up to (not included), count] of bars of one round width that reach past 99% of the values; what
        is above is in the last, which goes up to the largest."""
        low, high = min(self.values), max(self.values)
        reach = max(1, round(self.at(0.99) / self.scale) - low + 1)
        width = max(1, _round_up(reach / BARS))
        start = low // width * width
        last = (low + reach - 1 - start) // width  # this bar holds the 99th percentile
        bars = [
            [self._out(start + i * width), self._out(start + (i + 1) * width), 0.0] for i in range(last + 1)
        ]
        for value, count in self.values.items():
            bars[min((value - start) // width, last)][2] += count
        bars[-1][1] = max(bars[-1][1], self._out(high + 1))
        return [[a, b, int(n)] for a, b, n in bars]

    def _out(self, value: int) -> float:
        return value if self.scale == 1 else round(value * self.scale, 6)


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10 ** max(0, math.floor(math.log10(max(value, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def words(text: str) -> list[str]:
    """Words of a text in small letters; of a text without spaces between words, its runs of letters."""
    return [word.casefold() for word in _WORD.findall(text)]


def same_text(text: str) -> str:
    """What makes two captions the same: their words, whatever the case, spaces and punctuation."""
    return " ".join(words(text))
