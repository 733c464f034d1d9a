"""pytest's side of the benchmark: which tests there are, one measurement for all of a task, the report at the end.

A test is one implementation on one task. The first of a task measures all of those that were selected, in turns; the
others find their rows there. pytest-benchmark is then given the rounds (see `ReplayClock`), so that its options to
save and compare work as its users expect.
"""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import gate, machine, record
from bench.compare import read
from bench.importing import make_torchvision_importable
from bench.options import folder_path
from bench.profiles import PROFILES, Task, choose
from bench.report.page import write_report
from bench.session import Session

DEFAULT_REPORT = "runs/bench"


class ReplayClock:
    """A clock that jumps by the next measured round whenever the timed function is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def load(self, seconds: tuple[float, ...]) -> None:
        """The rounds to come."""
        self.steps = iter(seconds)

    def tick(self) -> None:
        """One round; the calls after the last (pytest-benchmark makes some when it is disabled) take no time."""
        self.now += next(self.steps, 0.0)


CLOCK = ReplayClock()


@dataclass(frozen=True)
class Entry:
    """One implementation on one task: what a test is about."""

    task: Task
    peer: str

    def __str__(self) -> str:
        return f"{self.task.name}/{self.peer}"


@dataclass
class Bench:
    """What one call of pytest measures."""

    session: Session
    kept: object  # see make_torchvision_importable
    selected: dict[Task, set[str]] = field(default_factory=dict)  # implementations that were not deselected

    def row(self, entry: Entry) -> record.Row:
        """The entry's row, measured together with the others of its task when it is first asked for."""
        rows = self.session.measure(entry.task, self.selected[entry.task])
        return next(row for row in rows if row.peer == entry.peer)


BENCH = pytest.StashKey[Bench]()
EARLIER = pytest.StashKey[record.Run | None]()
VERDICTS = pytest.StashKey[list[gate.Verdict]]()
GATE_BUDGET = 0.5  # seconds of rounds per task


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("auroraio", "the benchmark's report")
    group.addoption(
        "--report",
        default=DEFAULT_REPORT,
        metavar="DIR",
        help=f"where the page goes (default {DEFAULT_REPORT})",
    )
    group.addoption("--profile", default="auto", help=f"auto, {', '.join(PROFILES)}: cases and limits")
    group.addoption(
        "--gate", action="store_true", help="then run the gate too (python -m bench.gate), and fail with it"
    )
    group.addoption(
        "--against",
        metavar="RUN",
        help="an earlier run's run.json or folder, or a name in bench/results/, for a section on what changed since",
    )
    group.addoption(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="of rounds per task; the profile has a default",
    )
    group.addoption(
        "--rehearse", action="store_true", help="label the report as a rehearsal for another machine"
    )


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "the benchmark runs in one process: leave -n out, processes would disturb each other's times"
        )
    kind = machine.device()
    earlier = config.getoption("--against")
    try:
        profile = choose(config.getoption("--profile"), kind, machine.device_name(kind))
        config.stash[EARLIER] = read(earlier) if earlier else None  # now: this run may be written over it
        report = folder_path(config.getoption("--report"))
    except (ValueError, OSError, ArgumentTypeError) as error:
        raise pytest.UsageError(str(error)) from None
    budget = config.getoption("--budget")
    if budget is not None and not 0 <= budget < math.inf:
        raise pytest.UsageError(f"--budget {budget}: seconds, 0 or more")
    session = Session(
        profile, profile.budget if budget is None else budget, report,
        rehearsed=config.getoption("--rehearse"),
    )  # fmt: skip
    config.stash[BENCH] = Bench(session, make_torchvision_importable())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        tasks = metafunc.config.stash[BENCH].session.profile.tasks()
        wanted = [task for task in tasks if task.subject in metafunc.module.SUBJECTS]
        metafunc.parametrize("entry", [Entry(task, peer) for task in wanted for peer in task.peers], ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "entry" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            item.add_marker(pytest.mark.timeout(600))  # a task's compilation is in its first test


def pytest_collection_finish(session: pytest.Session) -> None:
    selected = session.config.stash[BENCH].selected
    for item in session.items:
        entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")  # type: ignore[attr-defined]
        if entry:
            selected.setdefault(entry.task, set()).add(entry.peer)


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, entry: Entry) -> Callable[[], None]:
    """What every test of the benchmark calls. It measures the entry and hands its rounds to pytest-benchmark; it fails
    where one of our implementations is wrong or broken, and skips, with the reason, where one of others' is, or where
    one cannot run here."""
    return lambda: _measure(request.config.stash[BENCH], benchmark, entry)


def _measure(bench: Bench, benchmark: BenchmarkFixture, entry: Entry) -> None:
    row = bench.row(entry)
    ceilings = bench.session.ceilings
    benchmark.group = f"{entry.task.subject} {entry.task.name}"
    benchmark.extra_info.update(
        shape=row.shape, flops=row.flops, bytes=row.bytes, peak_memory=row.peak_memory, clock=row.clock,
        fraction_of_roofline=record.fraction(row, ceilings) if ceilings else None,
        errors={a.name: {"error": a.error, "allowed": a.allowed, "relative": a.relative} for a in row.accuracy},
        ratios={p.peer: [p.ratio, p.low, p.high] for p in row.paired},
    )  # fmt: skip
    if row.status == "absent" or (row.status != "ok" and not row.ours):
        pytest.skip(f"{row.peer} is {row.status}: {row.note}")
    if row.status != "ok":
        pytest.fail(f"{row.peer} is {row.status}: {row.note}", pytrace=False)
    CLOCK.load(row.seconds)
    benchmark.pedantic(CLOCK.tick, rounds=len(row.seconds))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    bench = config.stash[BENCH].session
    if not bench.rows:
        return
    write_report(bench.run(), bench.folder, config.stash[EARLIER], headline=bench.profile.headline)
    if config.getoption("--gate") and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        config.stash[VERDICTS] = gate.run(bench.profile, GATE_BUDGET)[1]
        if not all(verdict.holds for verdict in config.stash[VERDICTS]):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash[BENCH].session
    if not bench.rows:
        return
    if VERDICTS in config.stash:
        terminalreporter.section(f"gate of profile {bench.profile.name}")
        terminalreporter.write("".join(f"{verdict}\n" for verdict in config.stash[VERDICTS]))
    terminalreporter.section("report")
    terminalreporter.write_line(f"profile {bench.profile.name}: {bench.profile.machine}")
    for name, missed in machine.absent().items():
        terminalreporter.write_line(f"not installed: {name}: {missed}")
    terminalreporter.write_line(f"report: {bench.folder.resolve() / 'index.html'}")
