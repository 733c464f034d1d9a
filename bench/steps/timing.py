"""The file of a row, and what is measured of a call: time, memory, kernels."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.steps.cases import Case
from bench.steps.plain import NAMES
from bench.steps.trace import profiled

ROUNDS = 5
CLOSING = 0.35  # of the seconds of a row, kept for the profile and for freeing memory


class Row:
    """The file of one row."""

    def __init__(self, case: Case, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.content: dict[str, Any] = {"name": case.name, "status": "cut off", "variants": {}, "notes": []}
        self.describe(case)

    def describe(self, case: Case) -> None:
        """Say which case it is, also after it has become a smaller one."""
        self.content |= {
            "title": case.title, "preset": case.preset, "kind": case.kind, "samples": case.samples,
            "accumulation": case.accumulation, "ranks": case.ranks, "checkpointing": case.checkpointing,
        }  # fmt: skip
        self.write()

    def add(self, **more: Any) -> None:
        """Put it down at once."""
        self.content |= more
        self.write()

    def variant(self, name: str, **more: Any) -> None:
        """The same of one of the compared implementations."""
        self.content["variants"].setdefault(name, {}).update(more)
        self.write()

    def note(self, text: str) -> None:
        """A sentence about the row."""
        self.content["notes"].append(text)
        self.write()

    def write(self) -> None:
        """Whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)


def clear(device: torch.device) -> None:
    """Give back what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- memory and time ---------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def held(device: torch.device) -> int:
    """Bytes of tensors, 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


@contextmanager
def peak(device: torch.device, found: dict[str, float]) -> Iterator[None]:
    """The most bytes of tensors at once in here, and that the allocator had for them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield
    wait(device)
    if device.type == "cuda":
        found |= {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
        }


def rounds(calls: Mapping[str, Callable[[], object]], row: Row, end: float) -> None:
    """Every call in turn, each once to warm up, while its memory is measured; then in rounds until the time is up."""
    alive = dict(calls)
    for name, call in calls.items():
        found: dict[str, float] = {"before": held(row.device)}
        start = time.monotonic()
        try:
            with peak(row.device, found):
                call()
        except torch.OutOfMemoryError:
            if name == NAMES[0]:
                raise
            del alive[name]
        if name in alive:
            row.variant(name, first_seconds=time.monotonic() - start)
        else:
            row.variant(name, error="out of memory")
            row.note(f"{name}: out of memory with {row.content['samples']} samples")
            clear(row.device)
    taken: dict[str, list[float]] = {name: [] for name in alive}
    keep = CLOSING * max(end - time.monotonic(), 0)
    for turn in range(ROUNDS):
        if turn and time.monotonic() + sum(max(x) for x in taken.values()) > end - keep:
            break
        for name, call in alive.items():
            found = {"before": held(row.device)}
            wait(row.device)
            with peak(row.device, found):
                start = time.perf_counter()
                call()
                wait(row.device)
                taken[name].append(time.perf_counter() - start)
            row.variant(name, times=taken[name], **found)


def rate(row: Row, name: str, flops: float, samples: int, tokens: float = 0.0) -> None:
    """What follows from the times: model FLOPs (nothing that is recomputed) per second, as shares of both ceilings."""
    times = row.content["variants"].get(name, {}).get("times")
    if not times:
        return
    seconds = statistics.median(times)
    sheet = row.content["sheet"]
    row.variant(
        name, seconds=seconds, samples_per_second=samples / seconds, flops=flops, flop_rate=flops / seconds,
        mfu=flops / seconds / row.content["matmul"], sheet_mfu=flops / seconds / sheet if sheet else None,
        tokens_per_second=tokens / seconds if tokens else None,
    )  # fmt: skip


def trace(row: Row, calls: Mapping[str, Callable[[], object]], end: float) -> None:
    """Profiles, while there is time."""
    for name, call in calls.items():
        if row.device.type != "cuda" or "times" not in row.content["variants"].get(name, {}):
            continue
        if time.monotonic() > end - 5:
            row.note(f"{name}: no time was left for a profile")
            continue
        try:
            found = profiled(call)
        except Exception as error:  # the figures are there; a profile is more
            row.note(f"{name}: no profile ({type(error).__name__}: {str(error)[:200]})")
            continue
        if found["kernels"]:
            row.variant(name, profile=found)
        else:
            row.note(f"{name}: the profiler saw no kernel")
