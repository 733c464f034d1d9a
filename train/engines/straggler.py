"""Which rank holds the others up. In a synchronous step all ranks take as long as the slowest, so the step's own time says
nothing; compared is what each rank does alone: getting its data, and a small matrix product that it runs for this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from train.engine import Ranks
from train.machine import peak_memory

PROBE_SIDE = {"cpu": 256, "cuda": 4096}
PROBE_REPEATS = 5
LATE = 0.1  # of a step's time: a rank that keeps the others waiting for longer is named
SLOW = 1.3  # times the median of the probe
SHORTEST = 1e-3  # seconds: smaller differences are noise


@dataclass(frozen=True)
class RankReport:
    """What one rank did since the last report. Seconds are means per step; memory in bytes."""

    data_wait: float
    step_seconds: float
    probe: float
    peak_memory: float


FIELDS = tuple(RankReport.__dataclass_fields__)


class Watch:
    """Collects a rank's times; `report` brings those of all ranks together."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self._waited = self._seconds = 0.0
        self._steps = 0

    def add(self, seconds: float, waited: float) -> None:
        """A step that took `seconds`, `waited` of them before this rank met the others."""
        self._seconds, self._waited, self._steps = (
            self._seconds + seconds,
            self._waited + waited,
            self._steps + 1,
        )

    def report(self) -> list[RankReport]:
        """Every rank's report, on every rank, and begin anew. All ranks call this, after the same step."""
        n = max(self._steps, 1)
        mine = (self._waited / n, self._seconds / n, probe(self.device), float(peak_memory(self.device)))
        self._waited = self._seconds = 0.0
        self._steps = 0
        sent = torch.tensor(mine, dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(sent) for _ in range(self.ranks.size)]
        if self.ranks.size > 1:
            dist.all_gather(gathered, sent)
        else:
            gathered = [sent]
        return [RankReport(*one.tolist()) for one in gathered]


def probe(device: torch.device) -> float:
    """Least seconds of a few products of the same matrices: a device that is throttled, or shared, takes longer."""
    x = torch.ones(PROBE_SIDE[device.type], PROBE_SIDE[device.type], device=device)
    x = x.to(torch.bfloat16) if device.type == "cuda" else x
    taken = []
    for _ in range(PROBE_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def stragglers(reports: Sequence[RankReport]) -> list[str]:
    """A sentence for each rank that holds the others up; none where no rank does, or there is one."""
    if len(reports) < 2:
        return []
    said = []
    for rank, mine in enumerate(reports):
        others = [one for other, one in enumerate(reports) if other != rank]
        late = mine.data_wait - statistics.median(one.data_wait for one in others)
        if late > max(LATE * mine.step_seconds, SHORTEST):
            said.append(
                f"rank {rank} is a straggler: it waits {1e3 * mine.data_wait:.0f} ms per step for data, the others "
                f"{1e3 * (mine.data_wait - late):.0f} ms; steps take {1e3 * mine.step_seconds:.0f} ms"
            )
        usual = statistics.median(one.probe for one in others)
        if mine.probe > SLOW * usual and mine.probe - usual > SHORTEST:
            said.append(
                f"rank {rank} is a straggler: its device takes {mine.probe / usual:.1f} times as long as the others' for the "
                "same matrix product"
            )
    return said


def as_columns(reports: Sequence[RankReport]) -> dict[str, list[Any]]:
    """Name -> a value per rank, for metrics.jsonl."""
    rows = [asdict(one) for one in reports]
    return {name: [row[name] for row in rows] for name in FIELDS}
