"""Charts as inline SVG: whole without JavaScript, read out on hover and by arrow keys.

Across they are drawn in percent and down in pixels, so a chart fills any width while its letters keep their size. Both
forms have logarithmic axes: an equal distance is an equal ratio, for a small case as for one a thousand times as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from bench.report.rows import positive
from bench.report.words import amount, plural, shorten

# Marks of 10 pixels around the origin; a peer keeps its mark and its tone through the whole page.
MARKS = (
    '<circle id="m0" r="4.5"/>',
    '<path id="m1" d="M-4 -4h8v8h-8z"/>',
    '<path id="m2" d="M0 -5.6L5.6 0L0 5.6L-5.6 0z"/>',
    '<path id="m3" d="M0 -5.2L5 3.8H-5z"/>',
    '<path id="m4" d="M0 5.2L5 -3.8H-5z"/>',
    '<path id="m5" d="M-1.7 -5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3z"/>',
)
TONES = 5  # of peers; CSS classes t0 to t4
LINE, NAME, REMARK, HEAD, SMALL, GAP, EDGE = 19, 17, 18, 20, 15, 14, 24  # heights in pixels
PHONE, LETTER, OFF = 318, 6.9, 11  # pixels: a plot on a phone, a bold letter, from a mark to its label
ROOFLINE_HEIGHT = 340
TALL = 2400  # a chart higher than this scrolls in its card


@dataclass(frozen=True)
class Dot:
    """One figure. `value` at or below 0 is drawn at the left edge, its label says what it is."""

    who: str
    value: float
    low: float
    high: float
    label: str
    text: str  # what hover reads out
    css: str  # "ours t0" or "t3"
    mark: int


@dataclass(frozen=True)
class Lane:
    """One case: its dots below each other, then remarks (css class, text) in place of what has no figure."""

    title: str
    small: str = ""
    dots: Sequence[Dot] = ()
    remarks: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Roof:
    """min(intensity x bandwidth, peak). `sheet`: promised by a data sheet and not measured."""

    name: str
    bandwidth: float
    peak: float
    sheet: bool = False


@dataclass(frozen=True)
class Point:
    """One row in the roofline plot."""

    intensity: float  # FLOP/byte
    rate: float  # FLOP/s
    text: str
    css: str
    mark: int


@dataclass
class _Axis:
    """Logarithmic, from `low` to `high`, onto 0 to `length`."""

    low: float
    high: float
    length: float
    down: bool = False  # pixels grow downwards
    ticks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.ticks = log_ticks(self.low, self.high)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else 0.0
        share = min(max(share, 0.0), 1.0)
        return round((1 - share if self.down else share) * self.length, 2)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values within [low, high]: powers of ten over many decades, with 3 or 2 and 5 between over few."""
    decades = math.log10(high / low)
    steps: tuple[float, ...] = (1, 1.5, 2, 3, 4, 5, 7)
    for least, coarser in ((0.9, (1, 2, 5)), (1.7, (1, 3)), (2.6, (1,))):
        steps = coarser if decades > least else steps
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 8))  # of many decades not each one is written
    values = [m * 10.0**power for power in range(first, last + 1) if power % every == 0 for m in steps]
    return [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def widen(values: Sequence[float], least: float = 4.0, around: float = 1.12) -> tuple[float, float]:
    """A range with some air around the values, spanning at least a factor `least`."""
    low, high = (min(values) / around, max(values) * around) if values else (1.0, 10.0)
    short = math.sqrt(max(1.0, least / (high / low)))
    return low / short, high * short


def lanes(
    title: str, note: str, lanes: Sequence[Lane], axis: Callable[[float], str], center: float | None = None
) -> dict[str, object]:
    """For the template: a dot plot, one group of lines per lane. `axis` writes a tick; `center` is drawn stronger."""
    values = [v for lane in lanes for dot in lane.dots for v in (dot.low, dot.value, dot.high) if positive(v)]
    x = _Axis(*widen(values + [center] if center else values), length=100)
    parts: list[str] = []
    hover: list[dict[str, object]] = []
    y = EDGE + 2.0
    apart = any(not _side(dot, x, f"{dot.who} {dot.label}", center) for lane in lanes for dot in lane.dots)
    for lane in lanes:
        parts.append(f'<line class="rule" x1="0" x2="100%" y1="{y:g}" y2="{y:g}"/>')
        parts.append(
            f'<text class="lane" x="0" y="{y + HEAD - 4:g}">{escape(shorten(lane.title, 44))}</text>'
        )
        y += HEAD
        if lane.small:
            parts.append(f'<text class="shape" x="0" y="{y + 10:g}">{escape(shorten(lane.small, 56))}</text>')
            y += SMALL
        for dot in lane.dots:
            middle = y + LINE / 2 + (NAME if apart else 2)
            parts += _entry(dot, x, middle, apart, center)
            hover.append({"x": x.at(dot.value), "y": middle, "text": f"{lane.title}: {dot.text}"})
            y += LINE + (NAME if apart else 0)
        for css, text in lane.remarks:
            parts.append(
                f'<text class="remark {css}" x="0" y="{y + 15:g}">{escape(shorten(text, 62))}</text>'
            )
            y += REMARK
        y += GAP
    grid = [_tick(x, value, axis, y, strong=value == center) for value in x.ticks]
    said = "; ".join(
        f"{lane.title}: " + (", ".join(f"{dot.who} {dot.label}" for dot in lane.dots) or "nothing timed")
        for lane in lanes[:4]
    )
    more = f"; and {plural(len(lanes) - 4, 'more case')}" if len(lanes) > 4 else ""
    svg = _svg(f"{title}. {said}{more}. The tables have every figure.", y + EDGE - GAP, grid + parts)
    css = "lanes" + (" center" if center else "") + (" tall" if y > TALL else "")
    return _figure(title, note, svg, hover, css, by="row")


def _entry(dot: Dot, x: _Axis, y: float, apart: bool, center: float | None) -> list[str]:
    """A mark at height y with its words beside it; `apart`: the name above, and there the figure if it has no room."""
    parts = []
    side = _side(dot, x, dot.label if apart else f"{dot.who} {dot.label}", center)
    if apart:
        above = y - LINE / 2 - 2
        parts.append(f'<text class="{dot.css}" x="0" y="{above:g}">{_words(dot, figure=not side)}</text>')
    if center:
        ends = f'x1="{x.at(center)}%" x2="{x.at(dot.value)}%"'
        parts.append(f'<line class="stem {dot.css}" {ends} y1="{y:g}" y2="{y:g}"/>')
    parts.append(_mark(dot, x, y))
    if side:
        at, dx, anchor = (dot.low, -OFF, "end") if side == "left" else (dot.high, OFF, "start")
        place = f'x="{x.at(at)}%" dx="{dx}" y="{y + 4:g}" text-anchor="{anchor}"'
        parts.append(f'<text class="{dot.css}" {place}>{_words(dot, name=not apart)}</text>')
    return parts


def _side(dot: Dot, x: _Axis, text: str, center: float | None) -> str:
    """ "left" or "right" of the interval, where the text has room on a phone's screen; empty where neither has.

    Preferred is the side with more room, or the one away from the center.
    """
    rooms = {"left": x.at(dot.low), "right": 100 - x.at(dot.high)}
    first = "left" if (rooms["left"] > rooms["right"] if center is None else dot.value < center) else "right"
    needed = 100 * (OFF + LETTER * len(text)) / PHONE
    return next((side for side in (first, *rooms) if rooms[side] >= needed), "")


def _mark(dot: Dot, x: _Axis, y: float) -> str:
    at, low, high = (x.at(value) for value in (dot.value, dot.low, dot.high))
    return (
        f'<line class="whisker {dot.css}" x1="{low}%" x2="{high}%" y1="{y:g}" y2="{y:g}"/>'
        f'<use href="#m{dot.mark}" class="mark {dot.css}" x="{at}%" y="{y:g}"/>'
    )


def _words(dot: Dot, *, name: bool = True, figure: bool = True) -> str:
    """The dot's name, its figure, or both."""
    said = [f'<tspan class="who">{escape(shorten(dot.who, 46))}</tspan>'] if name else []
    return " ".join(said + [str(escape(dot.label))] * figure)


def _tick(x: _Axis, value: float, axis: Callable[[float], str], bottom: float, *, strong: bool) -> str:
    """A grid line from top to bottom, labelled at both ends: tall charts are read far from either."""
    at = x.at(value)
    anchor = "start" if at < 4 else "end" if at > 96 else "middle"
    label = escape(axis(value))
    lower = bottom - GAP
    return (
        f'<line class="grid{" strong" if strong else ""}" x1="{at}%" x2="{at}%" y1="{EDGE - 4}" y2="{lower + 4:g}"/>'
        f'<text class="tick" x="{at}%" y="13" text-anchor="{anchor}">{label}</text>'
        f'<text class="tick" x="{at}%" y="{lower + 18:g}" text-anchor="{anchor}">{label}</text>'
    )


def roofline(title: str, note: str, points: Sequence[Point], roofs: Sequence[Roof]) -> dict[str, object]:
    """For the template: FLOP/s over FLOP/byte, with the roofs that stand over these points."""
    ridges = [roof.peak / roof.bandwidth for roof in roofs if not roof.sheet]
    x_range = widen([p.intensity for p in points] + ridges, least=30, around=1.8)
    tops = [roof.peak for roof in roofs]
    y_range = widen([p.rate for p in points] + tops, least=30, around=1.7)
    x = _Axis(*x_range, length=100)
    y = _Axis(*y_range, length=ROOFLINE_HEIGHT, down=True)
    parts = []
    for value in x.ticks:
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="{ROOFLINE_HEIGHT}"/>')
        label = f"{value:,.6g}"
        parts.append(
            f'<text class="tick" x="{at}%" y="{ROOFLINE_HEIGHT + 16}" text-anchor="middle">{label}</text>'
        )
    for value in log_ticks(*y_range):
        at = y.at(value)
        label = amount(value, "FLOP/s", trim=True).replace("FLOP/s", "")
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="0" dx="-8" y="{at + 4}" text-anchor="end">{label}</text>')
    middle = ROOFLINE_HEIGHT + 34
    parts.append(f'<text class="tick" x="50%" y="{middle}" text-anchor="middle">FLOP/byte</text>')
    parts.append('<text class="tick" x="0" dx="-48" y="-8">FLOP/s</text>')
    for roof in roofs:
        parts += _roof(roof, x, y, below=not roof.sheet and any(other.sheet for other in roofs))
    ordered = sorted(points, key=lambda p: (p.intensity, -p.rate))
    hover: list[dict[str, object]] = []
    for point in sorted(ordered, key=lambda p: "ours" in p.css):  # ours on top
        place = f'x="{x.at(point.intensity)}%" y="{y.at(point.rate)}"'
        parts.append(f'<use href="#m{point.mark}" class="mark {point.css}" {place}/>')
    for point in ordered:
        text = f"{point.text}, {amount(point.intensity, 'FLOP/byte')}"
        hover.append({"x": x.at(point.intensity), "y": y.at(point.rate), "text": text})
    said = f"{plural(len(points), 'row')} under {plural(len(roofs), 'roof')}"
    svg = _svg(f"{title}: {said}. The tables have every figure.", ROOFLINE_HEIGHT + 42, parts)
    return _figure(title, note, svg, hover, "roofline", by="point")


def _roof(roof: Roof, x: _Axis, y: _Axis, *, below: bool) -> list[str]:
    """The slope of the memory, cut at the plot's floor or left edge, and the ceiling of the arithmetic.

    `below`: its name stands below the line, as another line is just above it.
    """
    css = "roof sheet" if roof.sheet else "roof"
    start = max(x.low, y.low / roof.bandwidth)
    ridge = min(max(roof.peak / roof.bandwidth, start), x.high)
    x1, x2 = x.at(start), x.at(ridge)
    y1, y2 = y.at(start * roof.bandwidth), y.at(ridge * roof.bandwidth)
    parts = [f'<line class="{css}" x1="{x1}%" y1="{y1}" x2="{x2}%" y2="{y2}"/>']
    if ridge < x.high:
        parts.append(f'<line class="{css}" x1="{x2}%" y1="{y2}" x2="100%" y2="{y2}"/>')
    if not roof.sheet:
        place = f'x="100%" dx="-4" y="{y2 + (15 if below else -6)}" text-anchor="end"'
        parts.append(f'<text class="roof" {place}>{escape(roof.name)}</text>')
    return parts


def _svg(summary: str, height: float, parts: Sequence[str]) -> Markup:
    ring = '<circle class="ring" r="8.5" visibility="hidden"/>'
    opening = f'<svg style="height:{height:g}px" role="img" tabindex="0" aria-label="{escape(summary)}">'
    return Markup(f"{opening}{''.join(parts)}{ring}</svg>")


def _figure(
    title: str, note: str, svg: Markup, points: list[dict[str, object]], css: str, *, by: str
) -> dict[str, object]:
    return {"title": title, "note": note, "svg": svg, "css": css, "hover": {"by": by, "points": points}}
