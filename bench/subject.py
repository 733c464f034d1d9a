"""A subject: cases to do, implementations that do them, and the way from both to rows of a run.

case + mode + dtype = a problem
  reference in fp64, plain PyTorch in the dtype      what is exact, and what error is ordinary
  -> every implementation: right?                    numerics.py; one that is not gets no time
  -> sets of random inputs, larger than the cache
  -> rounds in turns, memory                         measure.py
  -> rows with ratios                                record.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import measure, numerics
from bench.machine import cache_bytes
from bench.record import Accuracy, Paired, Row, median_interval
from bench.work import Work
from kernels.backend import BackendError

Function = Callable[..., Tensor]
FORWARD, TRAINING, STEP = "forward", "training", "step"
# Other people's code computes half types in its own way (the textbook's bf16 is beyond our bound). Four times the bounds
# still tell that it did the same work, and their errors stand in the report beside ours.
OTHERS_SLACK = 4.0
FEW_SETS = 4  # of inputs where CPU seconds are counted (the gate): it watches the code, and must be quick


class Absent(Exception):
    """This implementation cannot do this case here; the message says why."""


class Case(Protocol):
    """One call's shapes. Inputs are named as the functions' positional arguments, in their order."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> str: ...
    def inputs(self, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]: ...
    def work(self, mode: str, dtype: torch.dtype) -> Work: ...


@dataclass(frozen=True)
class Peer:
    """One implementation. `build(case, device, dtype)` gives a function of the case's inputs, or raises Absent.

    What it returns may be a module: then training also makes the gradients of its parameters. For the mode "step" it
    has a method `step(*inputs)`, which is timed; calling it gives what is checked.
    """

    name: str
    build: Callable[[Any, str, torch.dtype], Function]
    ours: bool = False
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """What one file of the benchmark measures. `exact` names the peer that is run in fp64 as the truth, `plain` those
    whose errors in the same dtype are the yardstick."""

    name: str
    peers: tuple[Peer, ...]
    exact: str
    plain: tuple[str, ...]
    depth: float = (
        1.0  # the bound on relative errors is for one operation; layers and models get so many times it
    )

    def peer(self, name: str) -> Peer:
        """By its name. Raises ValueError for an unknown one."""
        for peer in self.peers:
            if peer.name == name:
                return peer
        raise ValueError(
            f"{self.name} has no peer {name!r}; there are {', '.join(p.name for p in self.peers)}"
        )


@dataclass(frozen=True)
class Problem:
    """What rows have in common."""

    case: Any
    mode: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """ "tiny-64px-stage1/forward/float32"."""
        return f"{self.case.name}/{self.mode}/{str(self.dtype).removeprefix('torch.')}"


@dataclass
class Attempt:
    """One implementation on its way through a problem; `row` says how it ends."""

    row: Row
    function: Function | None = None
    accuracy: tuple[Accuracy, ...] = field(default=())


def solve(
    subject: Subject,
    problem: Problem,
    device: str,
    *,
    budget: float,
    peers: Collection[str] | None = None,
    clock: str = "auto",
    fewest: int = measure.FEWEST_ROUNDS,
    seed: int = 0,
) -> list[Row]:
    """Check, then time, all implementations (or those named) of one problem; one row each, in their order.

    `budget` is in seconds, for the rounds of all of them together. `clock` is one of measure.py; memory is measured
    with "auto" alone. `seed` is that of the inputs that are checked.
    """
    chosen = [p for p in subject.peers if peers is None or p.name in peers]
    attempts = {peer.name: _build(subject, problem, device, peer) for peer in chosen}
    if any(a.function for a in attempts.values()):
        inputs = problem.case.inputs(device, problem.dtype, seed=seed)
        out = _check(subject, problem, device, inputs, attempts)
        timed = {name: a for name, a in attempts.items() if a.row.status == "ok"}
        if timed:
            _time(subject, problem, device, inputs, out, timed, budget, fewest, clock)
    return pair_rows([a.row for a in attempts.values()])


def _build(subject: Subject, problem: Problem, device: str, peer: Peer) -> Attempt:
    row = Row(
        subject.name, problem.case.name, problem.mode, peer.name, str(problem.dtype).removeprefix("torch."),
        "", peer.ours, "ok", peer.note,
    )  # fmt: skip
    try:
        work = problem.case.work(problem.mode, problem.dtype)
        row = replace(
            row,
            shape=problem.case.shape,
            items=work.items,
            unit=work.unit,
            flops=work.flops,
            bytes=work.bytes,
        )
        return Attempt(row, peer.build(problem.case, device, problem.dtype))
    except Absent as why:
        return Attempt(replace(row, status="absent", note=str(why)))


def _check(
    subject: Subject,
    problem: Problem,
    device: str,
    inputs: Mapping[str, Tensor],
    attempts: Mapping[str, Attempt],
) -> Tensor:
    """Gives each attempt its verdict; returns what plain PyTorch's result is."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    exact = results(subject.peer(subject.exact).build(problem.case, device, torch.float64), wide, problem)
    plain = [
        results(subject.peer(name).build(problem.case, device, problem.dtype), inputs, problem)
        for name in subject.plain
    ]
    for attempt in attempts.values():
        if attempt.function is None:
            continue
        try:
            found = results(attempt.function, inputs, problem)
            slack = 1.0 if attempt.row.ours else OTHERS_SLACK
            verdicts = numerics.judge(found, plain, exact, problem.dtype, slack, subject.depth)
        except (Absent, BackendError) as why:
            attempt.row = replace(attempt.row, status="absent", note=str(why))
        except Exception as error:  # a peer that breaks is a result too; ours fail their test by it
            attempt.row = replace(attempt.row, status="failed", note=f"{type(error).__name__}: {error}"[:400])
        else:
            good = all(verdict.good for verdict in verdicts)
            attempt.row = replace(
                attempt.row, accuracy=verdicts, status="ok" if good else "wrong",
                note=attempt.row.note if good else worst(verdicts),
            )  # fmt: skip
    return plain[0]["out"]


def results(function: Function, inputs: Mapping[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """ "out", and in training the gradient of every floating input under its name."""
    leaves = leaves_of(inputs, problem.mode)
    with torch.set_grad_enabled(problem.mode == TRAINING):
        out = function(*leaves.values())
    found = {"out": out.detach()}
    if problem.mode == TRAINING:
        wanted = {name: t for name, t in leaves.items() if t.requires_grad}
        cotangent = cotangent_of(out, problem, seed=1)
        found |= dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), cotangent), strict=True))
    return found


def cotangent_of(out: Tensor, problem: Problem, seed: int) -> Tensor:
    """What comes back to `out`: numbers that the problem's dtype can hold, so that the exact gradient is that of the
    very numbers which the others get."""
    return measure.random_like(torch.empty_like(out, dtype=problem.dtype), seed).to(out.dtype)


def leaves_of(inputs: Mapping[str, Tensor], mode: str) -> dict[str, Tensor]:
    """The same tensors as leaves of a new graph; in training, floating ones ask for a gradient."""
    wanted = mode == TRAINING
    return {n: t.detach().requires_grad_(wanted and t.is_floating_point()) for n, t in inputs.items()}


def worst(verdicts: Sequence[Accuracy]) -> str:
    """What is wrong, in words: the verdict that exceeds its bounds most."""
    bad = max(
        (v for v in verdicts if not v.good),
        key=lambda v: v.relative / v.allowed_relative if v.allowed_relative else math.inf,
    )
    return (
        f"{bad.name}: largest error {bad.error:.2e} (allowed {bad.allowed:.2e}), "
        f"relative {bad.relative:.2e} (allowed {bad.allowed_relative:.1e})"
    )


def _time(
    subject: Subject, problem: Problem, device: str, inputs: Mapping[str, Tensor], out: Tensor,
    attempts: Mapping[str, Attempt], budget: float, fewest: int, clock: str,
) -> None:  # fmt: skip
    one = sum(t.numel() * t.element_size() for t in inputs.values())
    sets = FEW_SETS if clock == "cpu" else measure.sets_needed(one, device, cache_bytes(device))
    rotation = [inputs, *(problem.case.inputs(device, problem.dtype, seed=s) for s in range(1, sets))]
    cotangents = [cotangent_of(out, problem, s) if problem.mode == TRAINING else None for s in range(sets)]
    calls = {
        name: [bind(a.function, *each, problem.mode) for each in zip(rotation, cotangents, strict=True)]  # type: ignore[arg-type]
        for name, a in attempts.items()
    }
    # Layers and steps are timed as people run them, launches and all; a graph would also leave half a step behind
    # where it cannot be captured.
    whole = any(isinstance(a.function, torch.nn.Module) for a in attempts.values())
    way = "events" if whole and device == "cuda" and clock == "auto" else clock
    # Nobody takes the definition for its speed, and it reads masks on the host, so no graph can hold it.
    timed = measure.interleave(
        calls, device=device, budget=budget, fewest=fewest, clock=way, apart=(subject.exact,)
    )
    for name, attempt in attempts.items():
        used, seconds = timed[name]
        memory = measure.peak_memory(calls[name][0], device) if clock == "auto" else None
        attempt.row = replace(attempt.row, clock=used, seconds=seconds, peak_memory=memory)


def bind(
    function: Function, inputs: Mapping[str, Tensor], cotangent: Tensor | None, mode: str
) -> Callable[[], object]:
    """A call without arguments: forward alone, forward and the gradients of inputs and parameters by `cotangent`, or
    the function's own `step`."""
    leaves = list(leaves_of(inputs, mode).values())
    if mode == STEP:
        step: Callable[..., object] = function.step  # type: ignore[attr-defined]
        return lambda: step(*leaves)
    if mode == FORWARD:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)

        return forward
    wanted = [t for t in leaves if t.requires_grad]
    if isinstance(function, torch.nn.Module):
        wanted += [p for p in function.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted, cotangent, allow_unused=True)


def pair_rows(rows: Sequence[Row]) -> list[Row]:
    """Each of our rows gets its ratios to every other row of the problem that the same clock timed, within rounds."""
    timed = [row for row in rows if row.seconds]
    out = []
    for row in rows:
        pairs = []
        if row.ours and row.seconds:
            for other in timed:
                if other is not row and other.clock == row.clock:
                    ratios = [mine / theirs for mine, theirs in zip(row.seconds, other.seconds, strict=True)]
                    pairs.append(Paired(other.peer, *median_interval(ratios)))
        out.append(replace(row, paired=tuple(pairs)))
    return out
