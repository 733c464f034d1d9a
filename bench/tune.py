"""Which configuration of a Triton kernel is fastest on this GPU: `python -m bench.tune window_attention --out FILE`.

For each case and kernel the launcher's own choice is timed beside candidates: tiles, warps, stages, programs per
multiprocessor. Candidates are compiled by many processes first; then one process times them, through a CUDA graph, in
turns. A candidate whose result is not the launcher's own, up to rounding, or that does not run is listed with the reason.
Nothing is changed by it: launch.py has what was chosen from its tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases, machine
from bench.measure import GraphTimer, sets_needed
from bench.options import end_with, file_path, positive_int
from bench.peers.latent import LATENT_ATTENTION, LatentCase
from bench.peers.window import WINDOW_ATTENTION, WindowCase
from bench.subject import FORWARD, TRAINING, Problem, Subject, bind, cotangent_of, results
from kernels import launch
from kernels.launch import Config

ROUNDS = 7
CLOSE = 0.02  # of the norm: two configurations add the same numbers in another order


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration of one kernel in one case, the others as the launcher chooses."""

    case: str
    mode: str
    kernel: str  # "own": nothing is forced
    config: Config | None

    def __str__(self) -> str:
        return f"{self.kernel} {'-' if self.config is None else tuple(self.config)}"


def window_cases() -> list[WindowCase]:
    """One for each kind of configuration."""
    return [
        cases.swin("b", 1, 64),
        cases.swin("b", 1, 64, version=2, window=8),
        cases.stage(WindowCase, "small", 1, 64),
        cases.stage(WindowCase, "xl", 3, 16),
        dataclasses.replace(cases.swin("b", 1, 32, window=14), name="swin-b-window14-stage1"),
        cases.swin("b", 1, 16, version=2, window=16),
        WindowCase("window14-odd-map", 16, 100, 100, 4, 32, 14, 7, cosine=False),
    ]


def latent_cases() -> list[LatentCase]:
    """One for each kind of configuration."""
    return [
        LatentCase("tune-32", 8, 512, 8192, 16, 32),
        LatentCase("tune-64", 8, 512, 8192, 16, 64),
        LatentCase("tune-128", 8, 512, 8192, 12, 128),
        LatentCase("tune-256", 4, 512, 8192, 8, 256),
    ]


def window_candidates(case: WindowCase) -> Iterator[Candidate]:
    """Of every kernel that can run the case."""
    own = Candidate(case.name, FORWARD, "own", None)
    yield own
    yield dataclasses.replace(own, mode=TRAINING)
    if case.slots <= 64:
        for (warps, stages), programs in itertools.product(((4, 2), (4, 3), (4, 4), (2, 3)), (4, 8, 16)):
            config = Config(0, 0, warps, stages, programs=programs)
            yield Candidate(case.name, FORWARD, "forward", config)
        for stages, by_product, programs in itertools.product((1, 2, 3), (False, True), (2, 3, 4)):
            config = Config(0, 0, 4, stages, programs=programs, by_product=by_product)
            yield Candidate(case.name, TRAINING, "fused", config)
        return
    for queries, keys, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        yield Candidate(case.name, FORWARD, "forward", Config(queries, keys, warps, stages))
    if case.height % case.window == case.width % case.window == 0:
        walking = itertools.product(("walking queries", "walking keys"), (1, 2), (1, 2, 3, 4, 6))
        for kernel, stages, programs in walking:
            yield Candidate(case.name, TRAINING, kernel, Config(64, 64, 4, stages, programs=programs))
        return
    for queries, keys, warps, stages in itertools.product((64, 128), (32, 64), (4, 8), (1, 2, 3)):
        yield Candidate(case.name, TRAINING, "queries", Config(queries, keys, warps, stages))
    for queries, keys, warps, stages in itertools.product((16, 32, 64), (64, 128), (4, 8), (1, 2, 3)):
        yield Candidate(case.name, TRAINING, "keys", Config(queries, keys, warps, stages))
    for (queries, keys, warps), stages, programs in itertools.product(
        ((64, 64, 4), (128, 64, 8), (64, 128, 8)), (2, 3), (4, 8)
    ):
        config = Config(queries, keys, warps, stages, programs=programs)
        yield Candidate(case.name, TRAINING, "bias", config)


def latent_candidates(case: LatentCase) -> Iterator[Candidate]:
    """Of the three kernels."""
    own = Candidate(case.name, FORWARD, "own", None)
    yield own
    yield dataclasses.replace(own, mode=TRAINING)
    shapes = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 32, 4))
    for (queries, keys, warps), stages in itertools.product(shapes, (2, 3, 4)):
        yield Candidate(case.name, FORWARD, "forward", Config(queries, keys, warps, stages, apart=True))
    for (queries, keys, warps), stages in itertools.product((*shapes, (128, 32, 8), (128, 32, 4)), (2, 3)):
        yield Candidate(case.name, TRAINING, "queries", Config(queries, keys, warps, stages, apart=True))
    tiles = ((64, 64, 4), (32, 64, 4), (32, 128, 4), (64, 128, 8), (64, 128, 4), (128, 64, 8), (128, 128, 8))
    for (queries, keys, warps), stages in itertools.product((*tiles, (64, 64, 8), (16, 128, 4)), (1, 2, 3)):
        yield Candidate(case.name, TRAINING, "keys", Config(queries, keys, warps, stages, apart=True))


SUBJECTS: dict[str, tuple[Subject, Any, Any]] = {
    "window_attention": (WINDOW_ATTENTION, window_cases, window_candidates),
    "latent_attention": (LATENT_ATTENTION, latent_cases, latent_candidates),
}


@contextlib.contextmanager
def forcing(candidate: Candidate) -> Iterator[None]:
    """Within, the launchers take the candidate."""
    if candidate.kernel != "own":
        launch.forced[candidate.kernel] = candidate.config
    try:
        yield
    finally:
        launch.forced.clear()


class Bench:
    """The inputs of one case at a time."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.cases = {case.name: case for case in SUBJECTS[subject][1]()}
        self.now: tuple[str, str] | None = None

    def prepare(self, candidate: Candidate, sets: int | None = None) -> None:
        """Inputs and function for the candidate's case and mode."""
        if self.now == (candidate.case, candidate.mode):
            return
        case, self.now = self.cases[candidate.case], (candidate.case, candidate.mode)
        self.problem = Problem(case, candidate.mode, torch.bfloat16)
        self.function = SUBJECTS[self.subject][0].peer("triton").build(case, "cuda", torch.bfloat16)
        first = case.inputs("cuda", torch.bfloat16, 0)
        size = sum(t.numel() * t.element_size() for t in first.values())
        count = sets or sets_needed(size, "cuda", machine.cache_bytes("cuda"))
        self.inputs = [first, *(case.inputs("cuda", torch.bfloat16, s) for s in range(1, count))]
        self.cotangents: list[Tensor | None] = [None] * count
        if candidate.mode == TRAINING:
            with torch.no_grad():
                out = self.function(*first.values())
            self.cotangents = [cotangent_of(out, self.problem, s) for s in range(count)]

    def results(self, candidate: Candidate) -> dict[str, Tensor]:
        """Of the first inputs."""
        with forcing(candidate):
            return results(self.function, self.inputs[0], self.problem)

    def timer(self, candidate: Candidate) -> GraphTimer:
        """The graph keeps the launches that were made under the candidate."""
        pairs = zip(self.inputs, self.cotangents, strict=True)
        with forcing(candidate):
            return GraphTimer([bind(self.function, *pair, candidate.mode) for pair in pairs])


WORKER: dict[str, Bench] = {}


def compile_one(subject: str, candidate: Candidate) -> str:
    """In a process of its own: why the candidate does not run, or ""."""
    bench = WORKER.setdefault(subject, Bench(subject))
    try:
        bench.prepare(candidate, sets=1)
        bench.results(candidate)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:160]
    return ""


def close(found: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """ "", or what is not the same."""
    for name, mine in own.items():
        error = (found[name].float() - mine.float()).norm() / mine.float().norm()
        if not error < CLOSE:
            return f"{name} differs by {error:.3g}"
    return ""


def time_case(bench: Bench, mine: Sequence[Candidate], why: dict[Candidate, str]) -> list[dict[str, Any]]:
    """Rows of one case in one mode, the fastest first."""
    bench.prepare(mine[0])
    own = bench.results(mine[0])
    timers: dict[Candidate, GraphTimer] = {}
    for candidate in mine:
        if why[candidate]:
            continue
        try:
            why[candidate] = close(bench.results(candidate), own)
            if not why[candidate]:
                timers[candidate] = bench.timer(candidate)
        except Exception as error:
            why[candidate] = f"{type(error).__name__}: {error}"[:160]
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in timers}
    order = list(timers)
    for _ in range(ROUNDS + 1):
        random.shuffle(order)
        for candidate in order:
            timer = timers[candidate]
            seconds[candidate].append(timer(timer.length) / timer.length)
    medians = {candidate: statistics.median(some[1:]) for candidate, some in seconds.items()}
    base = medians.get(mine[0], float("nan"))
    rows = [
        {
            "case": c.case, "mode": c.mode, "kernel": c.kernel, "config": c.config and list(c.config), "why": why[c],
            "ms": 1e3 * medians[c] if c in medians else None, "ratio": medians[c] / base if c in medians else None,
        }
        for c in mine
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (row["kernel"], row["ms"] is None, row["ms"] or 0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the best of each kernel, writes all."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("subject", choices=[*SUBJECTS])
    parser.add_argument("--case", nargs="*", help="these alone")
    parser.add_argument("--out", type=file_path, default=Path("runs/tune.json"))
    parser.add_argument("--show", type=positive_int, default=4, help="so many rows of each kernel")
    parser.add_argument("--workers", type=positive_int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args(arguments)
    if machine.device() != "cuda":
        parser.error("torch finds no CUDA device here")
    subject, begin = options.subject, time.monotonic()
    every = SUBJECTS[subject][1]()
    if strange := set(options.case or ()) - {case.name for case in every}:
        names = ", ".join(case.name for case in every)
        parser.error(f"--case {' '.join(sorted(strange))}: the cases of {subject} are {names}")
    chosen = [case for case in every if not options.case or case.name in options.case]
    candidates = [c for case in chosen for c in SUBJECTS[subject][2](case)]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        said = list(pool.map(compile_one, itertools.repeat(subject), candidates))
    why = dict(zip(candidates, said, strict=True))
    bad = sum(map(bool, said))
    print(
        f"{len(candidates)} candidates compiled in {time.monotonic() - begin:.0f} s, {bad} do not run",
        flush=True,
    )
    bench, rows = Bench(subject), []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for (name, mode), group in itertools.groupby(
        sorted(candidates, key=lambda c: (c.case, c.mode)), key=lambda c: (c.case, c.mode)
    ):
        some = sorted(group, key=lambda c: c.kernel != "own")
        work = bench.cases[name].work(mode, torch.bfloat16)
        found = time_case(bench, some, why)
        rows += found
        options.out.write_text(
            json.dumps(
                {"device": machine.device_name("cuda"), "versions": machine.versions(), "rows": rows},
                indent=0,
            )
            + "\n"
        )
        own = next(row for row in found if row["kernel"] == "own")
        print(f"\n{name} {mode}: {bench.cases[name].shape}; {time.monotonic() - begin:.0f} s")
        if own["ms"]:
            rate = f"{work.bytes / own['ms'] / 1e9:.2f} TB/s, {work.flops / own['ms'] / 1e9:.0f} TFLOP/s"
            print(f"  own {own['ms']:.4f} ms, {rate}")
        for kernel, of in itertools.groupby(found, key=lambda row: row["kernel"]):
            for row in list(of)[: options.show]:
                if row["ms"]:
                    print(f"  {row['ms']:.4f} ms x{row['ratio']:.3f} {kernel} {row['config']}")
                else:
                    print(f"  - {kernel} {row['config']} {row['why']}")
        sys.stdout.flush()
    print(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    end_with(main)
