"""The gate: `python -m bench.gate` times the gated tasks alone and fails where a ratio is beyond its limit.

A ratio is taken within rounds of one run (see measure.py), its median is compared with the limit of the profile. On a
CPU the rounds are timed in CPU seconds of one thread, so that neighbours who take the cores away do not count. What is
wrong, or cannot run, fails too: a gate that measured nothing is not open. A ratio beyond its limit is measured once more,
for four times as long: neighbours can also crowd the caches and the memory for seconds, and a real slowdown shows both
times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bench import machine
from bench.importing import make_torchvision_importable
from bench.options import end_with, positive_float
from bench.profiles import PROFILES, Gate, Profile, choose
from bench.record import Row


@dataclass(frozen=True)
class Verdict:
    """What became of one gate."""

    gate: Gate
    ratio: float | None  # None where there was nothing to compare
    why: str  # empty where it holds

    @property
    def holds(self) -> bool:
        """True where the ratio was measured and is within its limit."""
        return not self.why

    def __str__(self) -> str:
        g = self.gate
        measured = "not measured" if self.ratio is None else f"{self.ratio:.2f}"
        line = f"{g.subject} {g.task}: {g.peer} / {g.against} = {measured} (limit {g.limit:.2f})"
        return f"ok    {line}" if self.holds else f"FAIL  {line}: {self.why}"


def judge(gates: Iterable[Gate], rows: Iterable[Row]) -> list[Verdict]:
    """A verdict on every gate, from the rows of one run."""
    by_key = {row.key: row for row in rows}
    return [_judge(gate, by_key) for gate in gates]


def _judge(gate: Gate, by_key: dict[str, Row]) -> Verdict:
    row = by_key.get(f"{gate.subject}/{gate.task}/{gate.peer}")
    if row is None:
        return Verdict(gate, None, "the task was not run")
    if row.status != "ok":
        return Verdict(gate, None, f"{row.peer} is {row.status}: {row.note}")
    pair = next((pair for pair in row.paired if pair.peer == gate.against), None)
    if pair is None:
        other = by_key.get(f"{gate.subject}/{gate.task}/{gate.against}")
        return Verdict(
            gate,
            None,
            f"{gate.against} is {other.status}: {other.note}" if other else f"{gate.against} was not run",
        )
    return Verdict(
        gate, pair.ratio, "" if pair.ratio <= gate.limit else f"{pair.ratio / gate.limit:.2f} times the limit"
    )


def run(profile: Profile, budget: float) -> tuple[list[Row], list[Verdict]]:
    """Measure what the profile's gates need, no more; what does not hold once more, four times as long. The rows are the last
    ones."""
    rows = _measure(profile, profile.gates, budget)
    verdicts = judge(profile.gates, rows)
    doubtful = tuple(v.gate for v in verdicts if not v.holds and v.ratio is not None)
    if doubtful:
        again = _measure(profile, doubtful, 4 * budget)
        keys = {row.key for row in again}
        rows = [row for row in rows if row.key not in keys] + again
        second = {v.gate: v for v in judge(doubtful, again)}
        verdicts = [second.get(v.gate, v) for v in verdicts]
    return rows, verdicts


def _measure(profile: Profile, gates: Sequence[Gate], budget: float) -> list[Row]:
    rows: list[Row] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in profile.tasks():
            mine = [g for g in gates if (g.subject, g.task) == (task.subject, task.name)]
            if mine:
                wanted = {name for g in mine for name in (g.peer, g.against)}
                rows += task.run(budget, wanted, "cpu" if profile.device == "cpu" else "auto")
    finally:
        torch.set_num_threads(threads)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every gate holds, 1 where one does not."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--profile", default="auto", help=f"auto, {', '.join(PROFILES)}")
    parser.add_argument(
        "--budget", type=positive_float, default=2.0, help="seconds of rounds per task (default 2)"
    )
    options = parser.parse_args(arguments)
    kept = make_torchvision_importable()
    kind = machine.device()
    try:
        profile = choose(options.profile, kind, machine.device_name(kind))
    except ValueError as error:
        parser.error(str(error))
    _, verdicts = run(profile, options.budget)
    print(*verdicts, sep="\n")
    del kept
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    end_with(main)
