"""This machine as a device to plan for: what its CPU multiplies and copies, measured in a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from train.devices import Device, Peak
from train.machine import total_memory

SIDE, COPIED = 1024, 256 * 2**20


def local_cpu() -> Device:
    """The CPU with torch's threads, fp32: the best of a few products, and of a few copies far larger than the cache."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    source, target = torch.ones(COPIED // 4), torch.empty(COPIED // 4)
    flops = 2 * SIDE**3 / best(lambda: torch.mm(a, b))
    moved = 2 * COPIED / best(lambda: target.copy_(source))
    peak = Peak("cpu", 1, flops, 1, 8, moved, 0)  # one unit that does it all in one clock
    memory = float(total_memory(torch.device("cpu")) or 0)
    return Device("cpu", peak, memory, 1e9, 1, 1e9, "measured here: bench/results", 0.6)


def best(call: Callable[[], object], tries: int = 5) -> float:
    """Least seconds of some tries, after one that prepares."""
    call()
    taken = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
