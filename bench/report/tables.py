"""The tables of one subject in one mode, as plain data for the template: every row is in the first of them."""

from __future__ import annotations

import math

from bench.record import Ceilings, Paired, Row
from bench.report.rows import (
    Group,
    case_title,
    positive,
    reason,
    roof,
    rounds_interval,
    spread,
    strain,
    verdict,
)
from bench.report.words import NOTHING, amount, duration, ratio, share, size, span

COLUMNS = (
    ("median", "of the rounds, and the 95% interval of the median"),
    ("spread", "interquartile range of the rounds over the median"),
    ("rounds", "how many, and by which clock"),
    ("throughput", "at the median"),
    ("compute", "FLOPs assumed over the median"),
    ("of roofline", "least time that the measured ceilings grant, over the median; and which ceiling it is"),
    ("peak memory", "above what the inputs take"),
    ("FLOPs", "assumed for one call"),
    ("bytes", "the fewest that have to cross the memory bus in one call"),
)


def table(group: Group, ceilings: Ceilings | None) -> list[dict[str, object]]:
    """Per case {"title", "shape", "rows": [{"peer", "status", "cells" or "reason", ...}]}: every row is here."""
    out: list[dict[str, object]] = []
    for key, rows in group.items():
        best = min((row.median for row in rows if verdict(row) == "ok"), default=None)
        lines = []
        for row in rows:
            line: dict[str, object] = {"peer": row.peer, "ours": row.ours, "status": verdict(row)}
            error = strain(row)
            line["error"] = (share(error[0]).replace(NOTHING, "NaN"), error[1]) if error else (NOTHING, "")
            if verdict(row) == "ok":
                line |= {"cells": _cells(row, ceilings), "note": row.note, "best": row.median == best}
            else:
                line["reason"] = reason(row)
            lines.append(line)
        shape = ", ".join(dict.fromkeys(row.shape for row in rows if row.shape))
        out.append({"title": case_title(key, group), "shape": shape, "rows": lines})
    return out


def _cells(row: Row, ceilings: Ceilings | None) -> list[tuple[str, str]]:
    """(figure, small print) for each of COLUMNS."""
    interval, reached = rounds_interval(row.seconds), roof(row, ceilings)
    compute = row.flops / row.median if positive(row.flops) else math.nan
    return [
        (
            duration(row.median),
            span(duration(interval[0]), duration(interval[1])) if interval else "one round",
        ),
        (share(spread(row)), ""),
        (f"{len(row.seconds):,}", row.clock),
        (amount(row.rate, f"{row.unit}/s") if positive(row.rate) else NOTHING, ""),
        (amount(compute, "FLOP/s"), ""),
        (share(reached[0]), reached[1]) if reached else (NOTHING, ""),
        (size(row.peak_memory) if row.peak_memory is not None else NOTHING, ""),
        (amount(row.flops, "FLOP") if positive(row.flops) else NOTHING, ""),
        (size(row.bytes) if positive(row.bytes) else NOTHING, ""),
    ]


def ratios(group: Group) -> dict[str, object]:
    """{"columns": peers, "cases": [{"title", "rows": [(row, [(figure, interval, css)])]}]}; no columns: nothing paired."""
    right = {key: [row for row in rows if verdict(row) == "ok" and row.paired] for key, rows in group.items()}
    paired = {pair.peer for rows in right.values() for row in rows for pair in row.paired}
    columns = list(dict.fromkeys([row.peer for rows in group.values() for row in rows if row.peer in paired]))
    columns += sorted(paired - set(columns))
    cases = []
    for key, rows in right.items():
        lines = []
        for row in sorted(rows, key=lambda r: not r.ours):
            pairs = {pair.peer: pair for pair in row.paired}
            lines.append(
                {"peer": row.peer, "ours": row.ours, "cells": [_against(pairs.get(c)) for c in columns]}
            )
        if lines:
            cases.append({"title": case_title(key, group), "rows": lines})
    return {"columns": columns, "cases": cases}


def _against(pair: Paired | None) -> tuple[str, str, str]:
    """Figure, interval, and a class where the whole interval lies on one side of 1."""
    if pair is None:
        return NOTHING, "", "none"
    css = "faster" if pair.high < 1 else "slower" if pair.low > 1 else ""
    return ratio(pair.ratio), span(ratio(pair.low), ratio(pair.high)), css
