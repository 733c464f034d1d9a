"""Line charts as inline SVG: whole without JavaScript, with a crosshair on hover and by arrow keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 26
MOST_POINTS = 300  # of a line; more are averaged in bins: a million steps must not make a hundred megabytes


@dataclass(frozen=True)
class Series:
    """One line. `tone` names a CSS color of the page: accent, second, third, quiet."""

    name: str
    x: list[float]
    y: list[float]
    tone: str = "accent"
    dots: bool = False  # mark every point (evaluations)
    smooth: bool = False  # draw the noisy line faint and its moving average over it


@dataclass(frozen=True)
class Chart:
    """A titled chart; its y axis starts at 0 (or below, where values are)."""

    title: str
    series: list[Series]
    note: str = ""
    percent: bool = False


def render(chart: Chart) -> dict[str, object]:
    """For the template: {"title", "note", "svg", "legend", "hover"}."""
    thin = replace(chart, series=[s for s in map(_thin, chart.series) if s.x])
    legend = [(s.name, s.tone) for s in thin.series] if len(thin.series) > 1 else []
    return {
        "title": chart.title,
        "note": chart.note,
        "svg": _draw(thin),
        "legend": legend,
        "hover": _hover(thin),
    }


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A figure for an axis: 12k, 1.5M, 0.25, 1.5e-4."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def moving_average(values: list[float]) -> list[float]:
    """Mean over a centred window, a twentieth of the line: unlike an exponential average it does not lag.

    Towards both ends the window narrows, so the line starts and ends where the data do.
    """
    half = len(values) // 40
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append(sum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    return out


def _thin(series: Series) -> Series:
    """Finite points only, and at most MOST_POINTS of them, each the mean of its bin."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    size = math.ceil(len(points) / MOST_POINTS) if points else 1
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    x, y = ([sum(p[axis] for p in b) / len(b) for b in bins] for axis in (0, 1))
    return Series(series.name, x, y, series.tone, series.dots, series.smooth)


def _range(chart: Chart) -> tuple[list[float], list[float]]:
    """Axis ticks. A loss often starts with a spike that would flatten the rest: y ends at percentile 99."""
    xs = [x for s in chart.series for x in s.x] or [0.0, 1.0]
    ys = sorted(y for s in chart.series for y in s.y) or [0.0, 1.0]
    high = max([ys[min(len(ys) - 1, int(0.99 * len(ys)))]] + [s.y[-1] for s in chart.series if s.y])
    return ticks(min(xs), max(xs)), ticks(min(0.0, ys[0]), high)


def _draw(chart: Chart) -> Markup:
    x_ticks, y_ticks = _range(chart)
    x_low, x_high = x_ticks[0], max((x for s in chart.series for x in s.x), default=1.0)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.02) * (HEIGHT - TOP - BOTTOM)

    def path(xs: list[float], ys: list[float], css: str) -> str:
        points = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in zip(xs, ys, strict=True))
        return f'<polyline class="{css}" points="{points}"/>'

    parts = []
    for y in y_ticks:
        label = f"{100 * y:.4g}%" if chart.percent else short(y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 7}" y="{at_y(y) + 3.5:.1f}" text-anchor="end">{label}</text>')
    reach = x_high + 0.01 * (x_high - x_low)  # the last bin's mean lies a little before the last step
    for x in (x for x in x_ticks if x <= reach):
        anchor = "end" if at_x(x) > WIDTH - 24 else "middle"
        parts.append(f'<text x="{at_x(x):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{short(x)}</text>')
    for s in chart.series:
        if s.smooth:
            parts.append(path(s.x, s.y, f"line faint {s.tone}"))
        parts.append(path(s.x, moving_average(s.y) if s.smooth else s.y, f"line {s.tone}"))
        if s.dots:
            parts += [
                f'<circle class="dot {s.tone}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.6"/>'
                for x, y in zip(s.x, s.y, strict=True)
            ]
    parts.append(f'<line class="cross" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    opening = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(_summary(chart))}">'
    )
    return Markup(f"{opening}{''.join(parts)}</svg>")


def _summary(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    said = [
        f"{s.name} from {_figure(chart, s.y[0])} to {_figure(chart, s.y[-1])} at step {short(s.x[-1])}"
        for s in chart.series
        if s.y
    ]
    return f"{chart.title}: {'; '.join(said) or 'no data'}"


def _figure(chart: Chart, value: float) -> str:
    return f"{100 * value:.3g}%" if chart.percent else f"{value:.4g}"


def _hover(chart: Chart) -> dict[str, object]:
    """What script.js needs for the crosshair: pixel positions of x and the texts to show there."""
    x_ticks, _ = _range(chart)
    low, high = x_ticks[0], max((x for s in chart.series for x in s.x), default=1.0)
    steps = sorted({x for s in chart.series for x in s.x})
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1)
    lines = [dict(zip(s.x, moving_average(s.y) if s.smooth else s.y, strict=True)) for s in chart.series]
    return {
        "x": [round(LEFT + (x - low) * scale, 1) for x in steps],
        "text": [
            f"step {x:,.0f}: "
            + ", ".join(
                f"{s.name} {_figure(chart, line[x])}"
                for s, line in zip(chart.series, lines, strict=True)
                if x in line
            )
            for x in steps
        ],
    }
