"""Figures as people read them: three digits, a prefix that fits, a unit."""

from __future__ import annotations

import math

PREFIXES = ("p", "n", "µ", "m", "", "k", "M", "G", "T", "P", "E")
SPACE = "\N{NO-BREAK SPACE}"
NOTHING = "–"


def digits(value: float) -> str:
    """Three significant digits of a figure from 1 to 999, trailing zeros kept so that columns align: 1.20, 61.0, 412."""
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def amount(value: float, unit: str = "", *, trim: bool = False) -> str:
    """12_400_000, "tokens/s" -> "12.4 M tokens/s"; 1.2e12, "FLOP/s" -> "1.20 TFLOP/s".

    A prefix joins what is a symbol (FLOP, B, s), and stands alone before a word. `trim` drops zeros, for axes.
    """
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return ("∞" if value > 0 else "-∞") + (SPACE + unit if unit else "")
    rounded = float(f"{value:.3g}")
    power = math.floor(math.log10(abs(rounded)) / 3 + 1e-12) if rounded else 0
    power = min(max(power, -PREFIXES.index("")), len(PREFIXES) - 1 - PREFIXES.index(""))
    scaled = rounded / 1000.0**power
    text = f"{scaled:.4g}" if trim or not rounded else digits(scaled)
    prefix = PREFIXES[power + PREFIXES.index("")]
    joined = prefix + unit if unit.split("/")[0] in ("FLOP", "B", "s") else f"{prefix} {unit}".strip()
    return f"{text}{SPACE}{joined.replace(' ', SPACE)}" if joined else text


def duration(seconds: float) -> str:
    """0.00124 -> 1.24 ms."""
    return amount(seconds, "s")


def size(count: float) -> str:
    """12_400_000 -> 12.4 MB, of a million bytes each."""
    return f"{count:.0f}{SPACE}B" if 0 <= count < 1000 else amount(count, "B")


def ratio(value: float) -> str:
    """0.4837 -> 0.48×, 12.34 -> 12.3×, 1234 -> 1,234×."""
    if not math.isfinite(value):
        return NOTHING if math.isnan(value) else "∞"
    text = (
        f"{value:.2g}" if abs(value) < 0.0995 else f"{value:,.0f}" if abs(value) >= 99.95 else digits(value)
    )
    return f"{text}×"


def share(value: float) -> str:
    """0.614 -> 61%, 0.0345 -> 3.5%, 0.00123 -> 0.12%, 12.3 -> 1,230%."""
    if not math.isfinite(value):
        return NOTHING if math.isnan(value) else "∞"
    percent = 100 * value
    decimals = 0 if percent >= 9.95 or not percent else 1 if percent >= 0.995 else 2
    return "< 0.01%" if 0 < percent < 0.005 else f"{percent:,.{decimals}f}%"


def span(low: str, high: str) -> str:
    """ "1.22 ms", "1.27 ms" -> "1.22–1.27 ms": the unit once where both have the same."""
    if low.endswith("×") and high.endswith("×"):
        return f"{low[:-1]}–{high}"
    (first, _, unit), (_, _, other) = low.partition(SPACE), high.partition(SPACE)
    return f"{first}–{high}" if unit == other else f"{low} – {high}"


def change_figure(value: float, low: float, high: float) -> str:
    """1.31× [1.28×, 1.35×]; without the interval where there is none, and nothing for what is no ratio."""
    if not 0 < value < math.inf:
        return ""
    return f"{ratio(value)} [{ratio(low)}, {ratio(high)}]" if low < high else ratio(value)


def shorten(text: str, most: int) -> str:
    """At most so many letters, the cut marked."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def plural(count: int, one: str, many: str = "") -> str:
    """1, "row" -> "1 row"; 1200, "row" -> "1,200 rows"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
