"""Training steps of aurora-large, aurora-xl and perceiver-xl on one CUDA device: `python -m bench.steps --out FOLDER`.

    aurora-large          a step as on one of 8 GPUs, with our window attention and with the usual one in turn
    aurora-xl             one rank's share of its step on 64 GPUs (ZeRO-2), the same two in turn
    perceiver-xl-forward  the losses of 18 billion parameters without gradients
    perceiver-xl-latent   its latent transformer alone, forward, and forward and backward
    perceiver-xl          one rank's share of its step on 256 GPUs (ZeRO-2)
    aurora-xl-32, perceiver-xl-32, aurora-large-whole    larger micro-batches; without activation checkpointing

Each row is a process of its own, most wanted first, within what is left of the time. After every row FOLDER has
steps.json, report.md and, for train.plan, plan.json of all rows so far. Random data on the device, no loader, no communication.
Needs torch, NumPy, Pillow, sentencepiece and, for our kernels, Triton.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.options import end_with, folder_path, positive_float
from bench.steps.cases import CASES, Case, rehearsed

ROOT = Path(__file__).resolve().parents[2]
GRACE = 40.0  # seconds beyond its share that a row's process may take: to import, to compile, to end
CLOSING = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 where every row was measured; 1 where one failed or was cut off; 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=folder_path, required=True, help="folder for steps.json, report.md and plan.json"
    )
    parser.add_argument("--only", nargs="*", choices=[*CASES], help="some of the rows, in this order")
    parser.add_argument("--minutes", type=positive_float, default=6.0, help="for all of it (default 6)")
    parser.add_argument(
        "--rehearse", action="store_true", help="walk through it on a CPU with the tiny presets"
    )
    parser.add_argument("--row", choices=[*CASES], help=argparse.SUPPRESS)  # in a row's process
    parser.add_argument("--seconds", type=float, default=30.0, help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)  # in the plan's process
    options = parser.parse_args(argv)
    kind = machine.device()
    if kind == "cpu" and not options.rehearse:
        parser.error("torch finds no CUDA device here; --rehearse walks through the program without one")
    if kind == "cuda" and options.rehearse:
        parser.error("there is a CUDA device here: leave --rehearse out")
    cases = [CASES[name] for name in options.only or CASES]
    cases = [rehearsed(case) for case in cases] if options.rehearse else cases
    if options.row:
        return measure(options.row, options.out, options.seconds, options.rehearse)
    if options.plan:
        from bench.steps.planned import plan_rows

        return plan_rows(cases, options.out / "plans.json")
    return Program(cases, options.out.resolve(), 60 * options.minutes, options.rehearse).run()


def measure(name: str, out: Path, seconds: float, rehearse: bool) -> int:
    """One row, in this process."""
    import torch

    from bench.steps.child import run

    if rehearse:
        torch.set_num_threads(1)
    case = rehearsed(CASES[name]) if rehearse else CASES[name]
    return run(case, out / "rows" / f"{name}.json", seconds)


class Program:
    """The rows, and the time that is left for them."""

    def __init__(self, cases: list[Case], out: Path, seconds: float, rehearsal: bool) -> None:
        self.cases, self.out, self.rehearsal = cases, out, rehearsal
        self.start, self.end = time.monotonic(), time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        now = datetime.datetime.now(datetime.UTC)
        self.head = {
            "command": machine.command(), "date": f"{now:%Y-%m-%d %H:%M} UTC",
            "rehearsed": rehearsal, "versions": machine.versions(), "commit": machine.commit(),
        }  # fmt: skip

    def run(self) -> int:
        """All rows; the exit status."""
        (self.out / "rows").mkdir(parents=True, exist_ok=True)
        for old in (self.out / "plans.json", *(self.out / "rows").glob("*.json")):
            old.unlink(missing_ok=True)
        names = [case.name for case in self.cases]
        with (self.out / "plans.log").open("w") as log:
            plan = subprocess.Popen(
                self.command("--plan", "--only", *names), cwd=ROOT, stdout=log, stderr=log
            )
        try:
            for case in self.cases:
                self.row(case)
            try:
                plan.wait(max(self.end - time.monotonic() - CLOSING / 2, 1))
            except subprocess.TimeoutExpired:
                print("plan: not all rows were planned in the time")
        finally:
            plan.kill()
            plan.wait()
        return self.finish()

    def command(self, *more: str) -> list[str]:
        """This program again, in another process."""
        given = ["--rehearse"] if self.rehearsal else []
        return [sys.executable, "-m", "bench.steps", "--out", str(self.out), *given, *more]

    def row(self, case: Case) -> None:
        """Measure one, for its own time or what is left."""
        left = self.end - time.monotonic() - CLOSING
        path, start = self.out / "rows" / f"{case.name}.json", time.monotonic()
        if left < 15:
            self.rows.append({"name": case.name, "status": "not begun", "title": case.title, "variants": {}})
            self.write()
            print(f"not begun   {case.name}: no time was left")
            return
        seconds, code = min(case.seconds, 0.75 * left), "killed"
        command = self.command("--row", case.name, "--seconds", f"{seconds:.1f}")
        with (self.out / "rows" / f"{case.name}.log").open("w") as log:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=log, timeout=min(seconds + GRACE, left), check=False
                )
                code = f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                code = "out of time"
        found: dict[str, Any] = {"name": case.name, "status": "failed", "title": case.title, "variants": {}}
        if path.exists():
            found = json.loads(path.read_text())
        if found["status"] in ("cut off", "failed"):
            found["status"] = f"{found['status']} ({code})"
        found["wall"] = time.monotonic() - start
        self.rows.append(found)
        self.write()
        from bench.steps.report import lines

        print(*lines(found), sep="\n", flush=True)

    def write(self) -> None:
        """All files, of what there is so far."""
        from bench.steps.planned import calibration
        from bench.steps.report import page

        path = self.out / "plans.json"
        plans: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for row in self.rows:
            row["plan"] = plans.get(row["name"])
        (self.out / "steps.json").write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
        record = {key: self.head[key] for key in ("date", "command", "versions")}
        content = {**record, "rows": calibration(self.rows, plans)}
        (self.out / "plan.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.out / "report.md").write_text(page(self.head, self.rows))

    def finish(self) -> int:
        """The last words; the exit status."""
        self.write()
        bad = [row["name"] for row in self.rows if row["status"] != "ok"]
        said = f"not whole: {', '.join(bad)}. " if bad else ""
        print(
            f"{len(self.rows)} rows in {time.monotonic() - self.start:.0f} s. {said}{self.out / 'report.md'}"
        )
        return 1 if bad else 0


if __name__ == "__main__":
    end_with(main)
