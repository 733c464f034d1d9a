"""Compare two runs: what got slower or faster, more or less exact, hungrier or leaner."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.record import RUN_FILE, Run, load
from bench.report.changes import MARGIN, Comparison, compare
from bench.report.words import change_figure, share

__all__ = ["Comparison", "as_json", "as_text", "compare", "main", "read"]
RESULTS = Path(__file__).parent / "results"
ABOUT = """\
Compare two runs that `pytest bench/` wrote: what got slower or faster, more or less exact, hungrier or leaner.

Every ratio is B over A, so above 1 is worse. A time's ratio is the median over all pairs of one round of B and one of A,
and its 95% interval inverts the Mann-Whitney test: it assumes no distribution, and 4 rounds on each side. With fewer
the whole range is shown. A row counts as worse or better where its ratio is beyond the margin and its interval does not
reach 1. Rounds of one run say nothing about what differs from run to run, such as clocks and neighbours: the margin is
for that.

Where device, profile or versions differ, times are not compared as such: our rows' times over those of the peers that
both runs paired them with are.
"""
CODES = """\
exit codes: 0 nothing of ours is worse beyond the margin; 1 something is (slower, less exact, more memory, or now wrong
or failed); 2 a file is missing or no run, no row is in both, or an option
makes no sense. Other people's code is shown and not counted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=ABOUT,
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "a", metavar="A", help="the earlier run: its run.json or folder, or a folder's name in bench/results/"
    )
    parser.add_argument("b", metavar="B", help="the later run, likewise")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, unchanged rows too")
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="changes up to this share do not count (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.margin < math.inf:
        parser.error(f"--margin {options.margin}: a share such as 0.05, not below 0")
    try:
        a, b = read(options.a), read(options.b)
        found = compare(a, b, options.margin)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(as_json(found, a, b) if options.json else as_text(found, a, b))
    if not {row.key for row in a.rows} & {row.key for row in b.rows}:
        print(f"{parser.prog}: nothing to compare: no row is in both", file=sys.stderr)
        return 2
    return 1 if found.worse else 0


def read(name: str) -> Run:
    """The run in a file, or in RUN_FILE of a folder; the name may be one of bench/results/.

    Raises FileNotFoundError where there is neither, ValueError for a file that is no run.
    """
    places = [path for root in (Path(), RESULTS) for path in (root / name, root / name / RUN_FILE)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{name}: no such file, neither here nor in bench/results/")
    try:
        return load(path)
    except (KeyError, TypeError) as error:  # JSON of another make
        raise ValueError(f"{path} is no run of this benchmark: {error!r}") from error


def name(run: Run) -> str:
    """Which run it is, in one line."""
    rehearsed = ", only rehearsed" if run.rehearsed else ""
    return f"{run.date}, commit {run.commit[:12]}, {run.device}, profile {run.profile}{rehearsed}"


def as_text(found: Comparison, a: Run, b: Run) -> str:
    """What is printed: warnings, what is worse, what is better, and what is in one run only."""
    margin = share(found.margin)
    lines = [
        f"A  {name(a)}",
        f"B  {name(b)}",
        "   ratios are B over A: above 1 is slower, less exact, or more memory",
    ]
    lines += [f"WARNING: {warning}" for warning in found.warnings]
    for verdict in ("worse", "better"):
        some = [change for change in found.changes if change.verdict == verdict]
        lines += ["", f"{verdict.capitalize()} by more than {margin}: {len(some) or 'nothing'}"]
        for change in some:
            figure = change_figure(change.ratio, change.low, change.high)
            lines.append(
                f"  {figure:<22} {change.measure:<13} {change.key}{'' if change.ours else ' (not ours)'}"
            )
            lines.append(f"  {'':<22} {'':<13} {change.text}")
    same = sum(change.verdict == "same" for change in found.changes)
    lines += ["", f"Within {margin}, or not to be told apart: {same}"]
    for title, keys in found.lists:
        if keys:
            lines += ["", f"{title}: {len(keys)}", *(f"  {key}" for key in keys)]
    return "\n".join(lines)


def as_json(found: Comparison, a: Run, b: Run) -> str:
    """Everything, as JSON. A ratio that is no finite number (of a status, of an error that was 0) is null."""
    told = dataclasses.asdict(found) | {"a": name(a), "b": name(b), "worse": len(found.worse)}
    for change in told["changes"]:
        change |= {
            part: change[part] if math.isfinite(change[part]) else None for part in ("ratio", "low", "high")
        }
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
