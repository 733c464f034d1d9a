"""What a run tells: metrics.jsonl, TensorBoard, and progress on the terminal or in plain lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Metrics:
    """metrics.jsonl: one JSON object a line, kinds "train" and "eval", each with "step" (1 = after the first
    step).

    Opening it after a resume drops what lies beyond the checkpoint, and a line that a kill cut short: no step
    is there twice.
    """

    def __init__(self, path: Path, keep_up_to: int, last: int) -> None:
        """keep_up_to: the checkpoint's step; last: the run's last step, whose evaluation is always made
        (again).
        """
        lines = [line for line in _read_lines(path) if line["step"] <= keep_up_to]
        lines = [line for line in lines if not (line["kind"] == "eval" and line["step"] == last)]
        self.evaluated = {line["step"] for line in lines if line["kind"] == "eval"}
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; the operating system has it when this returns, so a killed process loses none."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *complete, _ = path.read_text().split("\n")  # what follows the last newline was cut short
    return [json.loads(line) for line in complete]


class TensorBoard:
    """Event files that continue a run: after a resume, what lies beyond the checkpoint is purged."""

    def __init__(self, directory: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a third of a second, not wanted by --help

        self._writer = SummaryWriter(str(directory), purge_step=start + 1 if start else None)

    def write(self, prefix: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars under "prefix/name"."""
        for name, value in values.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Progress:
    """One updating line on a terminal; elsewhere a plain line every `every` steps. Silent where `on` is False
    (ranks above 0).
    """

    def __init__(
        self, steps: int, samples_per_step: int, every: int, *, on: bool = True, stream: TextIO | None = None
    ) -> None:
        self.stream = stream or sys.stdout
        self.steps, self.samples_per_step, self.every, self.on = steps, samples_per_step, every, on
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = 0.0
        self._line = ""
        self._seconds = self._waited = 0.0
        self._count = 0

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if not self.on:
            return
        if self._line:
            self.stream.write("\r" + " " * len(self._line) + "\r")
            self._line = ""
        self.stream.write(text + "\n")
        self.stream.flush()

    def step(
        self, step: int, values: Mapping[str, Any], seconds: float, waited: float, extra_seconds: float = 0.0
    ) -> None:
        """After step `step` (1-based) that took `seconds`, `waited` of them for data; `extra_seconds`: still
        to come besides steps.
        """
        self._seconds, self._waited, self._count = (
            self._seconds + seconds,
            self._waited + waited,
            self._count + 1,
        )
        now = time.monotonic()
        due = now - self._shown > 0.1 if self.live else step % self.every == 0 or step == self.steps
        if not self.on or not due:
            return
        line = self._format(step, values, extra_seconds)
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + line.ljust(len(self._line)))
            self._line, self._shown = line, now
            self.stream.flush()
        else:
            self.say(line)
        if step % self.every == 0 or not self.live:
            self._seconds = self._waited = 0.0
            self._count = 0

    def _format(self, step: int, values: Mapping[str, Any], extra_seconds: float) -> str:
        per_step = self._seconds / self._count
        parts = ", ".join(f"{name} {value:.3g}" for name, value in values["losses"].items())
        eta = duration((self.steps - step) * per_step + extra_seconds)
        return (
            # A narrow terminal cuts the end, so what is asked for most comes first.
            f"step {step:>{len(str(self.steps))}}/{self.steps}  ETA {eta}  "
            f"{self.samples_per_step / per_step:,.0f} images/s  loss {values['loss']:.3f} ({parts})  "
            f"lr {values['lr']:.1e}  data wait {100 * self._waited / self._seconds:.0f}%{_resources(values)}"
        )


def _resources(values: Mapping[str, Any]) -> str:
    """Gradient norm, utilisation and memory, those that are known."""
    said = ""
    if "grad_norm" in values:
        said += f"  gradient {values['grad_norm']:.2g}"
    if "mfu" in values:
        said += f"  MFU {100 * values['mfu']:.0f}%"
    if values.get("peak_memory"):
        said += f"  memory {values['peak_memory'] / 1e9:.1f} GB"
    return said


def duration(seconds: float) -> str:
    """ "1:05", "2:03:04", "5 days 3:00:00"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{days} day{'s' * (days != 1)} {clock}" if days else clock
