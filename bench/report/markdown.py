"""The run as Markdown tables, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from bench.record import Ceilings, Row, Run
from bench.report.rows import (
    Group,
    arrange,
    case_title,
    fastest,
    mode_title,
    positive,
    reason,
    roof,
    rounds_interval,
    speedup,
    strain,
    subject_title,
    tally,
    usable,
    verdict,
)
from bench.report.words import NOTHING, amount, duration, ratio, share, size, span

HEAD = (
    "case",
    "implementation",
    "median",
    "95% interval",
    "throughput",
    "ours against it",
    "of roofline",
    "peak memory",
    "error / allowed",
)


def markdown(
    run: Run,
    banners: Sequence[tuple[str, str]],
    without: Sequence[Mapping[str, object]],
    ceilings: Sequence[Mapping[str, object]],
) -> str:
    """The whole document. `banners`, `without`, `ceilings` as page.py makes them."""
    parts = [f"# Benchmark: {safe(run.device)}"]
    parts += [f"> **{safe(what)}.** {safe(why)}" for what, why in banners]
    if wrong := sum(verdict(row) == "wrong" for row in run.rows):
        parts.append(f"> **WRONG RESULTS: {wrong}.** They are named below and have no time.")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    parts.append(
        f"Profile {safe(run.profile)}, {safe(run.date)}, commit {safe(run.commit)}. {safe(versions)}.\n\n"
        f"    {' '.join(run.command.split())}\n\n{safe(tally(run))}."
    )
    if ceilings:
        rows = [(safe(str(c["name"])), str(c["measured"]), str(c["sheet"]), str(c["text"])) for c in ceilings]
        parts.append("## Ceilings\n\n" + _table(("ceiling", "measured here", "data sheet", "share"), rows))
    for subject, modes in arrange(run.rows).items():
        parts.append(f"## {safe(subject_title(subject))}")
        for mode, group in modes.items():
            parts.append(f"### {safe(mode_title(mode))}")
            parts.append(_table(HEAD, _rows(group, usable(run.ceilings))))
            parts += [f"{safe(peer)}: {safe(note)}." for peer, note in _notes(group)]
    if without:
        rows = [
            (f"**{str(w['status']).upper()}**" if w["status"] == "wrong" else str(w["status"]),)
            + (
                safe(f"{w['subject']}: {w['peer']}"),
                safe(str(w["reason"])),
                safe(", ".join(_names(w["cases"]))),
            )
            for w in without
        ]
        parts.append("## Rows without a time\n\n" + _table(("", "implementation", "why", "cases"), rows))
    parts.append(
        "Median: of the rounds. Ours against it: how many times as fast the fastest of ours is as this one, by time in the "
        "same rounds, and its 95% interval. Of roofline: the least time that the measured ceilings grant over the median. "
        "Error: the worst tensor's, as a share of what is allowed."
    )
    return "\n\n".join(parts) + "\n"


def safe(text: str) -> str:
    """Text that stays text in Markdown: one line, no markup, no cell border."""
    one_line = " ".join(text.split())
    escaped = re.sub(r"([\\`*|\[\]~])", r"\\\1", one_line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _names(cases: object) -> list[str]:
    return [str(case) for case in cases] if isinstance(cases, Iterable) else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows(group: Group, ceilings: Ceilings | None) -> list[tuple[str, ...]]:
    out = []
    for key, rows in group.items():
        ours = fastest(rows, ours=True)
        out += [(safe(case_title(key, group)), *_cells(row, ours, ceilings)) for row in rows]
    return out


def _notes(group: Group) -> Iterable[tuple[str, str]]:
    """(implementation, what a reader has to know about its times), each once."""
    rows = [row for rows in group.values() for row in rows if verdict(row) == "ok" and row.note.strip()]
    return dict.fromkeys((row.peer, row.note.strip().rstrip(".")) for row in rows)


def _cells(row: Row, ours: Row | None, ceilings: Ceilings | None) -> tuple[str, ...]:
    worst = strain(row)
    error = f"{share(worst[0])} ({safe(worst[1])})".replace(NOTHING, "NaN") if worst else NOTHING
    name = f"**{safe(row.peer)}**" if row.ours else safe(row.peer)
    if verdict(row) != "ok":
        status = (
            f"**{verdict(row).upper()}**: {safe(reason(row))}" if verdict(row) == "wrong" else verdict(row)
        )
        return (name, status, *[""] * 5, error)
    interval = rounds_interval(row.seconds)
    against = ""
    if ours is not None and ours is not row:
        value, low, high = speedup(ours, row)
        against = f"{ratio(value)} ({span(ratio(low), ratio(high))})" if high > low else ratio(value)
    reached = roof(row, ceilings)
    return (
        name,
        duration(row.median),
        span(duration(interval[0]), duration(interval[1])) if interval else "one round",
        safe(amount(row.rate, f"{row.unit}/s")) if positive(row.rate) else NOTHING,
        against,
        f"{share(reached[0])} {reached[1]}" if reached else NOTHING,
        size(row.peak_memory) if row.peak_memory is not None else NOTHING,
        error,
    )
