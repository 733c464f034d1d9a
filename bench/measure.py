"""Timing that can be believed: implementations take turns in short rounds, so that whatever slows the machine for a
while slows all of them, and ratios within a round stay true.

Each implementation has several sets of random inputs, together larger than the last-level cache, and goes round them:
nothing is measured from a warm cache that a model would not find warm. Rounds are shuffled by a seed. What is kept
is every round's seconds per call; medians and intervals come later.

    wall    time.perf_counter around enough calls to fill a few milliseconds (CPU)
    cpu     time.process_time likewise: seconds that this process computed, whoever else wanted the cores (the gate)
    events  CUDA events around as many calls, queued without a wait in between; launches count where they are the limit
    graph   CUDA events around replays of a CUDA graph that holds one call for each set of inputs: no launch overhead
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from train.telemetry import peak

Call = Callable[[], object]
FEWEST_ROUNDS, MOST_ROUNDS = 9, 101
HOST_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHORTEST_ROUND = {"cpu": 4e-3, "cuda": 1e-3}  # seconds: far above a clock's own granularity


class Timer(Protocol):
    """Times `count` consecutive calls of one implementation."""

    clock: str

    def __call__(self, count: int) -> float:
        """Seconds for `count` calls."""
        ...


class HostTimer:
    """A clock of the host, "wall" or "cpu"; goes on with the next set of inputs at each call."""

    def __init__(self, calls: Sequence[Call], clock: str) -> None:
        self.calls, self.next = calls, 0
        self.clock, self.now = clock, HOST_CLOCKS[clock]

    def __call__(self, count: int) -> float:
        start = self.now()
        for _ in range(count):
            self.calls[self.next]()
            self.next = (self.next + 1) % len(self.calls)
        return self.now() - start


class EventTimer:
    """CUDA events; the calls are queued one after the other."""

    clock = "events"

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.next = calls, 0

    def __call__(self, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self.calls[self.next]()
            self.next = (self.next + 1) % len(self.calls)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class GraphTimer:
    """CUDA events around replays of a graph of one call per set of inputs. Raises RuntimeError where a call cannot
    be captured."""

    clock = "graph"

    def __init__(self, calls: Sequence[Call]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()  # lazy initialisation must not be captured
            # A call that waits for the device raises here: in a capture it would leave torch's allocator and random
            # number generator in the middle of it.
            watched = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                calls[-1]()
            finally:
                torch.cuda.set_sync_debug_mode(watched)
        torch.cuda.current_stream().wait_stream(side)
        self.graph, self.length = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def __call__(self, count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        replays = math.ceil(count / self.length)
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 * count / (replays * self.length)


def timer_for(calls: Sequence[Call], device: str, clock: str = "auto") -> Timer:
    """A timer by the name of its clock; "auto": a graph on CUDA, or events where a call cannot be captured; wall on a
    CPU."""
    if clock in HOST_CLOCKS or device != "cuda":
        return HostTimer(calls, "wall" if clock == "auto" else clock)
    if clock in ("auto", "graph"):
        stream = torch.cuda.current_stream()
        try:
            return GraphTimer(calls)
        except RuntimeError:  # a call that waits for the device, or allocates on the host, cannot be captured
            torch.cuda.set_stream(stream)  # a capture that broke off does not give it back
            torch.cuda.synchronize()
    return EventTimer(calls)


def interleave(
    calls: Mapping[str, Sequence[Call]],
    *,
    device: str,
    budget: float,
    clock: str = "auto",
    seed: int = 0,
    fewest: int = FEWEST_ROUNDS,
    apart: Collection[str] = (),
) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Time every implementation in turns for about `budget` seconds in all; name -> (clock, seconds per call of
    each round). At least `fewest` rounds are run, whatever they take.

    All have one clock, or a graph would spare one implementation the launches that another's time includes. Only
    those named in `apart` may have another.
    """
    timers = {name: timer_for(each, device, clock) for name, each in calls.items()}
    if len({timer.clock for name, timer in timers.items() if name not in apart}) > 1:
        timers = {name: timer_for(each, device, EventTimer.clock) for name, each in calls.items()}
    counts = {}
    for name, timer in timers.items():
        timer(1)
        once = statistics.median(timer(1) for _ in range(3))
        counts[name] = max(1, math.ceil(SHORTEST_ROUND[device] / max(once, 1e-7)))
        timer(counts[name])
    collecting = gc.isenabled()
    gc.disable()
    try:
        now = HOST_CLOCKS.get(clock, time.perf_counter)
        return _rounds(timers, counts, budget, random.Random(seed), fewest, now)
    finally:
        if collecting:
            gc.enable()


def _rounds(
    timers: Mapping[str, Timer],
    counts: Mapping[str, int],
    budget: float,
    rng: random.Random,
    fewest: int,
    now: Callable[[], float],
) -> dict[str, tuple[str, tuple[float, ...]]]:
    taken: dict[str, list[float]] = {name: [] for name in timers}
    order, start = list(timers), now()
    for done in range(MOST_ROUNDS):
        if done >= fewest and now() - start > budget:
            break
        rng.shuffle(order)
        for name in order:
            taken[name].append(timers[name](counts[name]) / counts[name])
    return {name: (timers[name].clock, tuple(taken[name])) for name in timers}


def sets_needed(one: int, device: str, cache: int) -> int:
    """How many sets of inputs of `one` bytes it takes to exceed twice the last-level cache, from 2 to 64."""
    return min(64, max(2, math.ceil(2 * cache / max(one, 1))))


def peak_memory(call: Call, device: str) -> int:
    """See train.telemetry.peak; after a call that does not count."""
    call()
    return peak.peak_memory(call, device)


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """Standard normal numbers in the tensor's place, dtype and shape; the same for the same seed in any dtype, up to
    rounding. They are drawn where the tensor is: a GPU's inputs are up to a billion numbers, seconds on a CPU."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    numbers = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device=tensor.device)
    return numbers.to(tensor.dtype)
