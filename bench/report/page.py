"""Writes index.html and report.md of one run.

The page is one file without a single request: style, script and charts are inside, and it forbids itself the network
(CSP). Names and notes come from other people's packages, so the template escapes everything (Jinja autoescape).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from bench.peaks import peak_of
from bench.record import Row, Run
from bench.report.changes import compare
from bench.report.charts import MARKS
from bench.report.markdown import markdown
from bench.report.rows import arrange, fastest, reason, subject_title, tally, usable, verdict
from bench.report.sections import Look, glance, sections
from bench.report.tables import COLUMNS
from bench.report.words import amount, change_figure, plural, share

ROOT = Path(__file__).resolve().parent.parent.parent
LISTED = 8  # cases named one by one in a list; the rest are counted and can be unfolded


def write_report(
    run: Run,
    folder: Path,
    previous: Run | None = None,
    *,
    peaks: Mapping[str, float] | None = None,
    headline: str = "",
) -> Path:
    """Write FOLDER/index.html and FOLDER/report.md; the path of the page.

    `previous`: an earlier run, for a section on what changed. `peaks`: the data sheet's, {"copy": bytes/s, dtype:
    FLOP/s}; by default what peaks.py knows of the device. `headline`: the device that the profile is written for, or a
    part of its name; another device gets a banner.
    """
    sheet = dict(sheet_of(run.device) if peaks is None else peaks)
    banners = notices(run, headline)
    look = Look.of(run.rows)
    figure, missing = glance(run, look)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_asset("template.html.j2")).render(
        run=run,
        lede=lede(run),
        facts=facts(run),
        banners=banners,
        wrong=[row for row in without_time(run) if row["status"] == "wrong"],
        ceilings=ceilings(run, sheet),
        glance=figure,
        not_compared=missing,
        subjects=sections(run, look, sheet),
        columns=COLUMNS,
        without=without_time(run),
        listed=LISTED,
        **since(previous, run),
        change_figure=change_figure,
        marks=Markup("".join(MARKS)),
        style=Markup(_house_style() + _asset("style.css")),
        script=Markup(_asset("script.js")),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(
        markdown(run, banners, without_time(run), ceilings(run, sheet)), encoding="utf-8"
    )
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def since(previous: Run | None, run: Run) -> dict[str, object]:
    """The comparison for the template, or why there is none: a report is not lost over an earlier run."""
    if previous is None:
        return {"changes": None, "previous": None, "incomparable": ""}
    try:
        return {"changes": compare(previous, run), "previous": previous, "incomparable": ""}
    except ValueError as error:
        return {"changes": None, "previous": previous, "incomparable": str(error)}


def sheet_of(device: str) -> dict[str, float]:
    """What the data sheet promises for a device that peaks.py knows; empty for another."""
    peak = peak_of(device)
    return {"copy": peak.bandwidth, "bfloat16": peak.bf16} if peak else {}


def notices(run: Run, headline: str) -> list[tuple[str, str]]:
    """(what, why it matters) where these figures are less than they look."""
    out = []
    if run.rehearsed:
        out.append(
            (
                "Only rehearsed",
                f"The program of a GPU run was walked through on {run.device}. It shows that everything runs and what "
                "it checks. Not one time here is a GPU's.",
            )
        )
    if headline and headline not in run.device:
        out.append(
            (
                f"Not run on {headline}",
                f"Profile {run.profile} is written for {headline}. These figures are those of {run.device}, and say "
                f"nothing about {headline}.",
            )
        )
    return out


def lede(run: Run) -> str:
    """What was run, and how ours did, in a few sentences that claim no more than the rows do."""
    groups = [
        (group, key) for modes in arrange(run.rows).values() for group in modes.values() for key in group
    ]
    if not groups:
        return "This run has no rows: nothing was measured."
    subjects = plural(len({row.subject for row in run.rows}), "subject")
    cases = plural(len({(row.subject, row.case, row.dtype) for row in run.rows}), "case")
    text = f"{cases} of {subjects}. {tally(run)}."
    timed = [row for row in run.rows if verdict(row) == "ok"]
    unchecked = sum(not row.accuracy for row in timed)
    if len(timed) > unchecked:
        text += " Results were checked against the reference in fp64 before they were timed"
        text += f", except {plural(unchecked, 'row')}." if unchecked else "."
    both = [(fastest(group[key], ours=True), fastest(group[key], ours=False)) for group, key in groups]
    pairs = [(mine, other) for mine, other in both if mine and other]
    if pairs:
        ahead = sum(mine.median < other.median for mine, other in pairs)
        text += f" The fastest of ours was ahead of the fastest other in {ahead} of {len(pairs)} comparisons."
    return text


def facts(run: Run) -> list[tuple[str, str]]:
    """The figures under the title."""
    rounds = sorted({len(row.seconds) for row in run.rows if row.seconds})
    shown = f"{rounds[0]}–{rounds[-1]}" if len(rounds) > 1 else "".join(map(str, rounds))
    known = [
        ("Profile", run.profile),
        ("Date", run.date.replace("T", " ")),
        ("Commit", run.commit[:12]),
        ("Rounds", shown),
        *run.versions.items(),
    ]
    return [(name, value) for name, value in known if value]


def ceilings(run: Run, sheet: Mapping[str, float]) -> list[dict[str, object]]:
    """[{"name", "measured", "sheet", "share"}]: the roofs of this run beside those of the data sheet."""
    measured = usable(run.ceilings)
    mine = {"copy": measured.copy, **measured.matmul} if measured else {}
    out: list[dict[str, object]] = []
    for name in dict.fromkeys([*mine, *sheet]):
        unit = "B/s" if name == "copy" else "FLOP/s"
        got, promised = mine.get(name), sheet.get(name)
        out.append(
            {
                "name": "Memory, copy" if name == "copy" else f"Matrix product, {name}",
                "measured": amount(got, unit) if got else "not measured",
                "sheet": amount(promised, unit) if promised else "",
                "share": got / promised if got and promised else None,
                "text": share(got / promised) if got and promised else "",
            }
        )
    return out


def without_time(run: Run) -> list[dict[str, object]]:
    """Rows without a time that counts, the wrong ones first: [{"status", "peer", "subject", "reason", "cases"}].

    Rows of one implementation of one subject that lack it for one reason stand together.
    """
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in run.rows:
        if verdict(row) != "ok":
            found.setdefault((verdict(row), row.subject, row.peer, reason(row)), []).append(row)
    order = ("wrong", "failed", "absent")
    return [
        {
            "status": status,
            "subject": subject_title(subject),
            "peer": peer,
            "reason": why,
            "cases": [f"{row.case} · {row.mode} · {row.dtype}" for row in rows],
        }
        for (status, subject, peer, why), rows in sorted(
            found.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def _house_style() -> str:
    """The pre-training report's: both pages are of one house."""
    return (ROOT / "train" / "report" / "style.css").read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
