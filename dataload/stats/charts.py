"""Bar charts as inline SVG, whole without JavaScript; every bar says its figures when pointed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 180
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 24


def short(value: float) -> str:
    """A figure for an axis: 12k, 1.5M, 0.25."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def ticks(high: float, wanted: int = 4) -> list[float]:
    """Round values from 0 up to at least `high`; whole numbers, as counts are."""
    rough = max(high, 1) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = max(1, next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999))
    step = math.ceil(step)
    return [step * i for i in range(math.ceil(high / step) + 1)]


def histogram(title: str, told: dict[str, Any], unit: str, note: str = "") -> dict[str, Any] | None:
    """A chart of `Distribution.to_json`, with median and 95% in words; None where nothing was counted."""
    if not told.get("count"):
        return None
    bars = told["histogram"]
    said = f"median {told['median']:g}, 95% up to {told['p95']:g}, largest {told['max']:,g} {unit}".rstrip()
    labels = []
    for low, high, count in bars:
        whole = isinstance(low, int) and isinstance(high, int)
        text = f"{low:g}" if whole and high == low + 1 else f"{low:g} to {high - 1 if whole else high:g}"
        labels.append(f"{text} {unit}: {count:,}")
    places = [bar[0] for bar in bars] + [bars[-1][1]]
    return _chart(title, [bar[2] for bar in bars], labels, _places(places), f"{said}. {note}".strip())


def _places(edges: Sequence[float]) -> list[tuple[float, str]]:
    """(place in bars, text) of a few labels below the axis; not the last edge, as the last bar is wider."""
    count = len(edges) - 1
    step = max(1, math.ceil(count / 6))
    return [(float(i), short(edges[i])) for i in range(0, count, step)]


def _chart(
    title: str, counts: Sequence[int], labels: Sequence[str], places: Sequence[tuple[float, str]], note: str
) -> dict[str, Any]:
    marks = ticks(max(counts))
    width = (WIDTH - LEFT - RIGHT) / len(counts)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - value / marks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = []
    for mark in marks:
        y = at_y(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{short(mark)}</text>')
    for i, (count, label) in enumerate(zip(counts, labels, strict=True)):
        y = min(at_y(count), HEIGHT - BOTTOM - (1.0 if count else 0.0))  # what is there shows
        parts.append(
            f'<rect class="bar" x="{LEFT + i * width + 0.5:.1f}" y="{y:.1f}" width="{max(width - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(label)}</title></rect>'
        )
    for place, text in places:
        parts.append(
            f'<text x="{LEFT + place * width + 0.5:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{escape(text)}</text>'
        )
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {note}")}">'
    return {"title": title, "note": note, "svg": Markup(f"{opening}{''.join(parts)}</svg>")}
