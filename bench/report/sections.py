"""What the page shows of one subject in one mode: charts and tables, as plain data for the template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.record import Ceilings, Row, Run
from bench.report import charts
from bench.report.charts import Dot, Lane, Point, Roof
from bench.report.rows import (
    Group,
    arrange,
    block_title,
    case_title,
    describe,
    fastest,
    mode_title,
    positive,
    roof,
    rounds_interval,
    speedup,
    subject_title,
    usable,
    verdict,
)
from bench.report.tables import ratios, table
from bench.report.words import amount, duration, plural, ratio, shorten, size, span

OPEN = 40  # a table of more rows starts closed


@dataclass(frozen=True)
class Look:
    """Which mark and tone each implementation has, on the whole page."""

    css: dict[tuple[str, bool], str]
    mark: dict[tuple[str, bool], int]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Look:
        css, mark, count = {}, {}, {True: 0, False: 0}
        for key in dict.fromkeys((row.peer, row.ours) for row in rows):
            number = count[key[1]]
            css[key] = "ours" if key[1] else f"t{number % charts.TONES}"
            mark[key] = number % len(charts.MARKS)
            count[key[1]] += 1
        return cls(css, mark)


def sections(run: Run, look: Look, sheet: dict[str, float]) -> list[dict[str, object]]:
    """Per subject {"id", "title", "modes": [{"title", "charts", "table", "ratios", ...}]}."""
    ceilings = usable(run.ceilings)
    out: list[dict[str, object]] = []
    for number, (subject, modes) in enumerate(arrange(run.rows).items()):
        shown = []
        for place, (mode, group) in enumerate(modes.items()):
            rows = [row for rows in group.values() for row in rows]
            timed = [row for row in rows if verdict(row) == "ok"]
            shown.append(
                {
                    "id": f"s{number}m{place}",
                    "title": mode_title(mode),
                    "charts": _charts(group, timed, ceilings, look, sheet) if timed else [],
                    "legend": _legend(timed, look),
                    "table": table(group, ceilings),
                    "ratios": ratios(group),
                    "open": len(rows) <= OPEN,
                    "rows": plural(len(rows), "row"),
                    "without": _without(timed, ceilings),
                }
            )
        counts = plural(len({case for group in modes.values() for case, _ in group}), "case")
        out.append({"id": f"s{number}", "title": subject_title(subject), "counts": counts, "modes": shown})
    return out


def _charts(
    group: Group, timed: Sequence[Row], ceilings: Ceilings | None, look: Look, sheet: dict[str, float]
) -> list[dict[str, object]]:
    units = sorted({row.unit for row in timed if row.unit})
    unit = f"{' or '.join(units) or 'items'} per second"
    out = [
        charts.lanes(
            "Throughput",
            f"{unit[:1].upper()}{unit[1:]}, more is better. Lines: 95% interval of the median.",
            [_rate_lane(key, group, ceilings, look) for key in group],
            lambda value: amount(value, trim=True),
        )
    ]
    if any(row.peak_memory is not None for row in timed):
        out.append(
            charts.lanes(
                "Peak memory",
                "Above what the inputs take, less is better.",
                [_memory_lane(key, group, ceilings, look) for key in group],
                lambda value: amount(value, "B", trim=True),
            )
        )
    points = [
        Point(
            row.flops / row.bytes,
            row.flops / row.median,
            describe(row, ceilings),
            look.css[row.peer, row.ours],
            look.mark[row.peer, row.ours],
        )
        for row in timed
        if positive(row.flops) and positive(row.bytes)
    ]
    if points:
        drawn = roofs(ceilings, {row.dtype for row in timed}, sheet)
        note = f"Arithmetic intensity against compute rate. {_roof_note(drawn)}"
        out.append(charts.roofline("Roofline", note, points, drawn))
    return out


def roofs(ceilings: Ceilings | None, dtypes: Iterable[str], sheet: dict[str, float]) -> list[Roof]:
    """Those of the dtypes that are shown: measured ones, and the data sheet's where it has both figures."""
    shown = set(dtypes)
    found = []
    if ceilings:
        found += [Roof(name, ceilings.copy, peak) for name, peak in ceilings.matmul.items() if name in shown]
    if copy := sheet.get("copy"):
        found += [
            Roof(name, copy, peak, sheet=True)
            for name, peak in sheet.items()
            if name in shown and name != "copy"
        ]
    return found


def _roof_note(drawn: Sequence[Roof]) -> str:
    """Which line is what: "Roofs, reached in this run: copy 1.74 TB/s, bfloat16 261 TFLOP/s. Dashed, ..."."""
    said = []
    for sheet, words in ((False, "Roofs, reached in this run"), (True, "Dashed, by the data sheet")):
        some = [one for one in drawn if one.sheet is sheet]
        peaks = ", ".join(f"{one.name} {amount(one.peak, 'FLOP/s')}" for one in some)
        if some:
            said.append(f"{words}: copy {amount(some[0].bandwidth, 'B/s')}, {peaks}.")
    if not any(not one.sheet for one in drawn):
        said.insert(0, "No ceiling was measured for these rows, so there is no measured roof.")
    return " ".join(said)


def _rate_lane(key: tuple[str, str], group: Group, ceilings: Ceilings | None, look: Look) -> Lane:
    dots = []
    for row in sorted(group[key], key=lambda r: r.median if r.seconds else math.inf):
        if verdict(row) == "ok":
            low, high = rounds_interval(row.seconds) or (row.median, row.median)
            label = amount(row.rate) if positive(row.rate) else f"{duration(row.median)}, no items counted"
            rate = row.rate if positive(row.rate) else 0.0
            bounds = (row.items / high, row.items / low) if rate else (0.0, 0.0)
            dots.append(_dot(row, rate, bounds, label, ceilings, look))
    return Lane(case_title(key, group), group[key][0].shape, dots, _remarks(group[key]))


def _memory_lane(key: tuple[str, str], group: Group, ceilings: Ceilings | None, look: Look) -> Lane:
    measured = [row for row in group[key] if verdict(row) == "ok" and row.peak_memory is not None]
    dots = [
        _dot(
            row, row.peak_memory or 0, (row.peak_memory or 0,) * 2, size(row.peak_memory or 0), ceilings, look
        )
        for row in sorted(measured, key=lambda r: r.peak_memory or 0)
    ]
    others = [row.peer for row in group[key] if verdict(row) == "ok" and row.peak_memory is None]
    remarks = [("quiet", f"not measured: {', '.join(others)}")] if others else []
    return Lane(case_title(key, group), group[key][0].shape, dots, remarks + _remarks(group[key]))


def _dot(
    row: Row, value: float, bounds: tuple[float, float], label: str, ceilings: Ceilings | None, look: Look
) -> Dot:
    key = (row.peer, row.ours)
    return Dot(row.peer, value, *bounds, label, describe(row, ceilings), look.css[key], look.mark[key])


def _remarks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """In the place of missing dots: each wrong row by itself, the others in one line."""
    wrong = [("wrong", f"✗ {row.peer}: WRONG RESULT") for row in rows if verdict(row) == "wrong"]
    others = [row.peer for row in rows if verdict(row) in ("absent", "failed")]
    return wrong + ([("quiet", f"no time: {', '.join(others)}")] if others else [])


def _legend(timed: Sequence[Row], look: Look) -> list[dict[str, object]]:
    keys = dict.fromkeys((row.peer, row.ours) for row in sorted(timed, key=lambda r: not r.ours))
    return [{"name": key[0], "css": look.css[key], "mark": look.mark[key]} for key in keys]


def _without(timed: Sequence[Row], ceilings: Ceilings | None) -> str:
    """What the charts of this mode can not show, in a sentence; empty where they show all."""
    said = []
    if timed and all(row.peak_memory is None for row in timed):
        said.append("Peak memory was not measured here.")
    bare = sum(not (positive(row.flops) and positive(row.bytes)) for row in timed)
    if bare:
        said.append(f"No work is assumed for {plural(bare, 'row')}, so the roofline plot has no such point.")
    elif ceilings and timed and all(roof(row, ceilings) is None for row in timed):
        said.append("No product was measured in these dtypes, so there is no share of a roofline.")
    return " ".join(said)


def glance(run: Run, look: Look) -> tuple[dict[str, object] | None, list[str]]:
    """The fastest of ours against the fastest other, case by case; and the cases where that can not be said."""
    found, missing = [], []
    for subject, modes in arrange(run.rows).items():
        for mode, group in modes.items():
            title = block_title(subject, mode)
            dots = []
            for key, rows in group.items():
                mine, other = fastest(rows, ours=True), fastest(rows, ours=False)
                name = case_title(key, group)
                if mine is None or other is None:
                    missing.append(
                        f"{title}: {name} ({'no time of ours' if mine is None else 'no time of another'})"
                    )
                    continue
                value, low, high = speedup(mine, other)
                interval = span(ratio(low), ratio(high)) if high > low else "no interval"
                text = f"{mine.peer} is {ratio(value)} as fast as {other.peer} ({interval})"
                css = "ours" if 1 < low < high else "ours behind" if low < high < 1 else "ours even"
                dots.append(
                    Dot(
                        f"{shorten(name, 26)}, {mine.peer} vs {other.peer}",
                        value,
                        low,
                        high,
                        f"{ratio(value)}",
                        text,
                        css,
                        0,
                    )
                )
            if dots:  # the best first
                dots.sort(key=lambda dot: -dot.value)
                found.append(Lane(title, dots=dots))
    if not found:
        return None, missing
    figure = charts.lanes(
        "Our fastest against the fastest other",
        "How many times as fast, by time in the same rounds: right of 1 ours is ahead. Lines: 95% interval. Hollow: it "
        "reaches 1, or there is none. Orange: ours is behind.",
        found,
        lambda value: f"{value:g}×",
        center=1.0,
    )
    return figure, missing
