"""Everything a CUDA machine is wanted for, in one command: `python -m bench.gpu`, or `make gpu`.

    machine    what this is, and which optional packages are absent
    tests      those marked gpu, and the kernels' own
    sanitizer  some of them again under compute-sanitizer (memcheck, racecheck), where the CUDA toolkit has it
    aot        every Triton configuration compiled for sm_80 and sm_90
    <subject>  the benchmark, one process for each subject, so that a crash of one leaves the others
    report     one page of all that was measured

Sections run in this order, each within what is left of the time; each writes to OUT as it goes, so that a run which is
cut off leaves what it measured. Without a CUDA device, --rehearse walks through the same program on the CPU, in
Triton's interpreter where kernels are meant, and says everywhere that it was a rehearsal. Needs torch, Triton and NumPy;
what else would help is named.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import machine, record
from bench.importing import make_torchvision_importable
from bench.options import end_with, folder_path, positive_float, regular_expression
from bench.profiles import PROFILES, Profile, Task, choose
from bench.record import RUN_FILE
from bench.session import Session

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = "sections.json"
SHORT, FULL = 10.0, 60.0  # minutes
# Of the whole time, what a section may take at most. The subjects share what tests and aot leave.
MOST = {"tests": 0.25, "sanitizer": 0.05, "aot": 0.15}
# The tests that go through compute-sanitizer, which is some hundred times slower: every Triton kernel, on little data.
SANITIZED = ("test_kernels_window_triton.py", "exact and cuda and (pads-are-keys or head-dim-64)")
GPU_TEST = re.compile(r"mark\.gpu|on_each_device")  # what a file with tests for a GPU has in it
SECTIONS = ("tests", "sanitizer", "aot", "subjects")
CLOSING = 15.0  # seconds kept for the report
GRACE = 30.0  # seconds that a subject's process may take beyond its share, for a task that it has begun
OUT_OF_TIME = 3  # exit status of a subject's process that did not begin all of its tasks


@dataclass(frozen=True)
class Section:
    """What became of one section."""

    name: str
    status: str  # "ok", "failed", "out of time", "skipped"
    seconds: float
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where no section failed; one that ran out of time is named and did not fail."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help=f"take {FULL:.0f} minutes instead of {SHORT:.0f}")
    parser.add_argument("--minutes", type=positive_float, help="or so many")
    parser.add_argument(
        "--out", type=folder_path, default=Path("runs/gpu"), help="folder for all results (default runs/gpu)"
    )
    parser.add_argument("--profile", default="auto", help=f"auto, {', '.join(PROFILES)}")
    parser.add_argument("--rehearse", action="store_true", help="walk through it on a machine without a GPU")
    parser.add_argument(
        "--tasks",
        type=regular_expression,
        default="",
        help="only those whose SUBJECT/CASE/MODE/DTYPE has this pattern",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these implementations, where a task has them",
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="only these")
    parser.add_argument(
        "--subject", help=argparse.SUPPRESS
    )  # what the processes of the benchmark are started with
    options = parser.parse_args(arguments)
    kind = machine.device()
    if kind == "cpu" and not options.rehearse:
        parser.error("torch finds no CUDA device here; --rehearse walks through the program without one")
    if kind == "cuda" and options.rehearse:
        parser.error("there is a CUDA device here: leave --rehearse out")
    try:
        profile = choose(options.profile, kind, machine.device_name(kind))
    except ValueError as error:
        parser.error(str(error))
    tasks = chosen_tasks(profile, options.tasks)
    if not tasks:
        parser.error(f"no task of profile {profile.name} matches {options.tasks!r}")
    known = {name: None for task in tasks for name in task.peers}
    if strange := [name for name in options.peers if name not in known]:
        parser.error(f"--peers {' '.join(strange)}: the tasks have {'; '.join(known)}")
    minutes = options.minutes or (FULL if options.full else SHORT)
    if options.subject:
        return measure(
            profile,
            options.subject,
            options.out,
            60 * minutes,
            options.rehearse,
            options.tasks,
            options.peers,
        )
    return Program(
        profile, options.out, 60 * minutes, options.rehearse, options.tasks, options.peers, options.sections
    ).run()


class Program:
    """The sections, and the time that is left for them."""

    def __init__(
        self,
        profile: Profile,
        out: Path,
        seconds: float,
        rehearsed: bool,
        pattern: str = "",
        peers: Sequence[str] = (),
        sections: Sequence[str] = SECTIONS,
    ) -> None:
        self.peers, self.sections = peers, sections
        self.profile, self.out, self.rehearsed = profile, out.resolve(), rehearsed
        self.pattern, self.tasks = pattern, chosen_tasks(profile, pattern)
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.earlier = [_written(path) for path in self.runs]
        self.done: list[Section] = []

    def run(self) -> int:
        """All sections; the exit status."""
        self.out.mkdir(parents=True, exist_ok=True)
        mode = "REHEARSED on a CPU: not one time below is a GPU's. " if self.rehearsed else ""
        print(f"{mode}{self.seconds / 60:.0f} minutes, results in {self.out}")
        print(f"profile {self.profile.name}: {self.profile.machine}")
        self.machine()
        if "tests" in self.sections:
            self.tests()
        if "sanitizer" in self.sections:
            self.sanitizer()
        if "aot" in self.sections:
            aot = [sys.executable, "-m", "bench.aot", "--json", str(self.out / "aot.json")]
            self.process("aot", aot, MOST["aot"] * self.seconds)
        if "subjects" in self.sections:
            self.subjects()
            self.report()
        failed, late = (sum(s.status == status for s in self.done) for status in ("failed", "out of time"))
        more = (
            f" {late} ran out of time: what they had measured is kept, --minutes gives more." if late else ""
        )
        reported = any(s.name == "report" and s.status == "ok" for s in self.done)
        where = self.out / ("index.html" if reported else SUMMARY)
        print(f"\n{mode}{len(self.done)} sections, {failed} failed.{more} {where}")
        return 1 if failed else 0

    @property
    def runs(self) -> list[Path]:
        """Where each subject's process leaves what it measured."""
        subjects = dict.fromkeys(task.subject for task in self.tasks)
        return [self.out / subject / RUN_FILE for subject in subjects]

    @property
    def left(self) -> float:
        """Seconds until only the report is still to be written."""
        return self.end - time.monotonic() - CLOSING

    def add(self, section: Section) -> None:
        """Say it and write it down."""
        self.done.append(section)
        print(f"{section.status:11s} {section.name} ({section.seconds:.0f} s) {section.note}", flush=True)
        text = json.dumps({"rehearsed": self.rehearsed, "sections": [asdict(s) for s in self.done]}, indent=1)
        (self.out / SUMMARY).write_text(text + "\n")

    def machine(self) -> None:
        """What this is."""
        absent = machine.absent()
        facts = {
            "device": machine.device_name(self.profile.device), "versions": machine.versions(),
            "absent": absent, "commit": machine.commit(),
        }  # fmt: skip
        (self.out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
        named = "; ".join(f"no {name}: {why}" for name, why in absent.items())
        self.add(Section("machine", "ok", 0.0, f"{facts['device']}. {named}"))

    def tests(self) -> None:
        """The kernels' tests and all that are marked gpu."""
        if not machine.there("pytest"):
            self.add(Section("tests", "skipped", 0.0, "pytest is not installed: pip install -e '.[test]'"))
            return
        files = sorted((ROOT / "tests").glob("test_*.py"))
        if self.rehearsed:
            chosen = [str(file) for file in files if file.name.startswith("test_kernels_")]
        else:  # these files alone: others import what may be absent here
            chosen = [str(file) for file in files if GPU_TEST.search(file.read_text(encoding="utf-8"))]
            chosen += ["-m", "gpu"]
        # They compile more than they compute, so a process for each core, up to 16, where pytest-xdist is there.
        cores = min(os.cpu_count() or 1, 16)
        many = ["-n", str(cores)] if machine.there("xdist") and not self.rehearsed else []
        self.process("tests", [*_pytest(), *many, *chosen], MOST["tests"] * self.seconds)

    def sanitizer(self) -> None:
        """Reads and writes that are out of bounds, and races in shared memory."""
        tool = shutil.which("compute-sanitizer")
        if tool is None or self.rehearsed or not machine.there("pytest"):
            why = (
                "a rehearsal has no GPU"
                if self.rehearsed
                else "needs pytest and compute-sanitizer on the PATH"
            )
            self.add(Section("sanitizer", "skipped", 0.0, why))
            return
        file, some = SANITIZED
        for check in ("memcheck", "racecheck"):
            command = [
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "1",
                *_pytest(),
                str(ROOT / "tests" / file),
                "-k",
                some,
            ]
            self.process(f"sanitizer-{check}", command, MOST["sanitizer"] * self.seconds)

    def subjects(self) -> None:
        """A process for each; each gets its tasks' share of what the earlier ones left."""
        waiting = Counter(task.subject for task in self.tasks)
        for name in [*waiting]:
            share = max(self.left, 0.0) * waiting[name] / waiting.total()
            del waiting[name]
            command = [
                sys.executable, "-m", "bench.gpu", "--subject", name, "--profile", self.profile.name,
                "--out", str(self.out / name), "--minutes", str(0.8 * share / 60), f"--tasks={self.pattern}",
                *(["--peers", *self.peers] if self.peers else []),
            ]  # fmt: skip
            self.process(name, command + ["--rehearse"] * self.rehearsed, share + GRACE)

    def process(self, name: str, command: list[str], most: float) -> None:
        """Run a command for at most `most` seconds, its output in OUT/NAME.log."""
        most, start = min(most, self.left), time.monotonic()
        if most < 1:
            self.add(Section(name, "out of time", 0.0, "not begun"))
            return
        log = self.out / f"{name}.log"
        with log.open("w") as output:
            try:
                code = subprocess.run(
                    command, stdout=output, stderr=output, cwd=ROOT, timeout=most, check=False
                ).returncode
                status = {0: "ok", OUT_OF_TIME: "out of time"}.get(code, "failed")
                note = "" if code in (0, OUT_OF_TIME) else f"exit status {code}, see {log}"
            except subprocess.TimeoutExpired:
                status, note = "out of time", f"after {most:.0f} s; what it had written is kept, see {log}"
        lines = log.read_text(errors="replace").strip().splitlines()
        self.add(Section(name, status, time.monotonic() - start, note or (lines[-1] if lines else "")))

    def report(self) -> None:
        """One page of all that this call measured, also of sections that were cut off. An earlier call's stays until then."""
        both = zip(self.runs, self.earlier, strict=True)
        found = [record.load(path) for path, earlier in both if _written(path) not in (None, earlier)]
        if not found:
            self.add(Section("report", "failed", 0.0, "nothing was measured"))
            return
        run = replace(
            found[0], command=machine.command(), rows=tuple(row for one in found for row in one.rows)
        )
        record.save(run, self.out / RUN_FILE)
        for page in ("index.html", "report.md"):
            (self.out / page).unlink(missing_ok=True)
        try:
            from bench.report.page import write_report
        except ImportError as error:
            self.add(
                Section("report", "failed", 0.0, f"no page: {error}. {len(run.rows)} rows in {RUN_FILE}")
            )
            return
        write_report(run, self.out, headline=self.profile.headline)
        self.add(Section("report", "ok", 0.0, f"{len(run.rows)} rows"))


def _written(path: Path) -> int | None:
    """When, in nanoseconds; None where there is no such file."""
    return path.stat().st_mtime_ns if path.exists() else None


def _pytest() -> list[str]:
    """The command, without options of plugins that are absent here: pyproject.toml has some, and pytest refuses them."""
    missing = not (machine.there("pytest_benchmark") and machine.there("pytest_timeout"))
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *(["-c", "/dev/null", "--rootdir", str(ROOT)] if missing else []),
    ]


def chosen_tasks(profile: Profile, pattern: str) -> list[Task]:
    """Those whose SUBJECT/NAME has the pattern, an "re"."""
    return [task for task in profile.tasks() if re.search(pattern, f"{task.subject}/{task.name}")]


def measure(
    profile: Profile,
    subject: str,
    out: Path,
    seconds: float,
    rehearsed: bool,
    pattern: str = "",
    peers: Sequence[str] = (),
) -> int:
    """One subject's tasks, in this process; those for which no time is left are not begun, and named."""
    kept = make_torchvision_importable()
    tasks = [task for task in chosen_tasks(profile, pattern) if task.subject == subject]
    tasks = [task for task in tasks if not peers or set(peers) & set(task.peers)]
    session = Session(profile, profile.budget, out, rehearsed)
    start, bad = time.monotonic(), 0
    for i, task in enumerate(tasks):
        if i and (time.monotonic() - start) * (i + 1) / i > seconds:
            print(f"{subject}: out of time before {', '.join(t.name for t in tasks[i:])}")
            return OUT_OF_TIME
        try:
            rows = session.measure(task, peers or None)
        except Exception:  # the tasks that follow may still be measured
            traceback.print_exc()
            bad += 1
            continue
        for row in rows:
            bad += row.ours and row.status in ("wrong", "failed")
            print(f"{row.status:7s} {row.key} {row.median * 1e3:.4f} ms {row.note}", flush=True)
    print(f"{len(tasks)} task{'s' * (len(tasks) != 1)}, {bad} of them or of our rows wrong or failed")
    del kept
    return 1 if bad else 0


if __name__ == "__main__":
    end_with(main)
