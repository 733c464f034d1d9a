"""One run of the benchmark: tasks measured when asked for, everything written as it goes."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine, record
from bench.profiles import Profile, Task
from bench.record import RUN_FILE


@dataclass
class Session:
    """Rows so far, and what they are measured on. `folder` gets RUN_FILE after every task."""

    profile: Profile
    budget: float  # seconds of rounds per task
    folder: Path
    rehearsed: bool = False
    rows: dict[tuple[str, str], list[record.Row]] = field(default_factory=dict)
    ceilings: record.Ceilings | None = None

    def measure(self, task: Task, peers: Collection[str] | None = None) -> list[record.Row]:
        """The rows of a task, measured when it is first asked for; all implementations, or `peers`."""
        key = (task.subject, task.name)
        if self.ceilings is None:
            self.ceilings = machine.ceilings(self.profile.device, self.profile.dtypes)
        if key not in self.rows:
            self.rows[key] = task.run(self.budget, peers, "auto")
            record.save(self.run(), self.folder / RUN_FILE)
        return self.rows[key]

    def run(self) -> record.Run:
        """All of it as a run."""
        kind = self.profile.device
        return record.Run(
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"), command=machine.command(),
            commit=machine.commit(), device=machine.device_name(kind), kind=kind, profile=self.profile.name,
            versions=machine.versions(), ceilings=self.ceilings, rehearsed=self.rehearsed, absent=machine.absent(),
            rows=tuple(row for rows in self.rows.values() for row in rows),
        )  # fmt: skip
