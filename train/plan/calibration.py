"""How far off plans were: measured steps, kept in bench/results, beside what was planned for them.

A file plan.json there is what `python -m train.plan.measure` or `python -m bench.steps` wrote: rows of what a step took and
what the plan said in the same run, on the machine and on the day that it names.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.devices import Peak, peak_of

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """One measured step. Bytes above weights and optimizer; seconds of one step."""

    device: str
    case: str
    planned_bytes: float
    measured_bytes: float
    floor_seconds: float
    measured_seconds: float
    flops: float
    flop_rate: float
    source: str

    @property
    def memory(self) -> float:
        """Planned over measured."""
        return self.planned_bytes / self.measured_bytes

    @property
    def reached(self) -> float:
        """The traced floor over what the step took."""
        return self.floor_seconds / self.measured_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs per second over what the machine multiplied at best."""
        return self.flops / self.measured_seconds / self.flop_rate


def read(folder: Path = RESULTS) -> list[Row]:
    """The rows of all plan.json below `folder`, oldest first; none where there is no such folder (an installed package). Raises
    ValueError for a file that cannot be read."""
    found: list[Row] = []
    for path in sorted(folder.glob("*/plan.json")) if folder.is_dir() else []:
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            found += [Row(**row) for row in content["rows"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of measured steps: {error}") from error
    return found


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A line per device."""
    if not rows:
        yield "calibrated  by nothing: no measured steps here (python -m train.plan.measure makes some)"
    for i, device in enumerate(dict.fromkeys(row.device for row in rows)):
        mine = [row for row in rows if row.device == device]
        off = [100 * (row.memory - 1) for row in mine]
        reached = [100 * row.reached for row in mine]
        mfu = [100 * row.mfu for row in mine]
        head = "calibrated " if i == 0 else "           "
        small = " (too small for this device: it waits for launches)" if max(reached) < 10 else ""
        yield (
            f"{head} {device}, {len(mine)} measured step{'s' * (len(mine) != 1)}: planned memory was off by "
            f"{_range(off, '+.1f')}; of the time that steps took, the floor was {_range(reached, '.0f')}{small}; "
            f"MFU {_range(mfu, '.0f')} of what it multiplies at best"
        )


def reached_by(
    rows: Sequence[Row], preset: str, peak: Peak, checkpointing: bool, micro_batch: float
) -> tuple[float, int]:
    """The share of the data sheet's peak that measured steps of a preset reached on a device, the median of those whose
    micro-batch is nearest, and that micro-batch: with few samples a GPU waits for its host. (0, 0) where there are none.
    Exchange is not in it (`python -m bench.steps` has one device)."""
    mode = "with" if checkpointing else "without"
    shares: dict[int, list[float]] = {}
    for row in rows:
        found = re.match(rf"{re.escape(preset)}, (\d+) samples.*, {mode} checkpointing$", row.case)
        if found and peak_of(row.device.split(",")[0]) == peak:
            shares.setdefault(int(found[1]), []).append(row.flops / row.measured_seconds / peak.bf16)
    if not shares:
        return 0.0, 0
    nearest = (
        max(shares) if micro_batch == math.inf else min(shares, key=lambda n: abs(math.log(n / micro_batch)))
    )
    return statistics.median(shares[nearest]), nearest


def _range(percent: Sequence[float], form: str) -> str:
    low, high = format(min(percent), form), format(max(percent), form)
    return f"{low}%" if low == high else f"{low}% to {high}%"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Every row."""
    yield f"{'case':44} {'device':26} {'planned':>9} {'measured':>9} {'off':>7} {'floor':>9} {'took':>9} {'MFU':>5}"
    for row in rows:
        memory = f"{row.planned_bytes / 1e6:6.0f} MB {row.measured_bytes / 1e6:6.0f} MB {100 * (row.memory - 1):+6.1f}%"
        times = f"{1e3 * row.floor_seconds:6.0f} ms {1e3 * row.measured_seconds:6.0f} ms"
        yield f"{row.case:44} {row.device[:26]:26} {memory} {times} {100 * row.mfu:4.0f}%"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with what follows from them."""
    return [{**vars(row), "memory": row.memory, "reached": row.reached, "mfu": row.mfu} for row in rows]
