"""Start-up: seconds until a loader stands before its first batch, with millions of samples in a thousand shards.

The shards are never read for that, so that they are files of the right size with nothing in them (holes), and their
indexes are the same for each but for the name. What is timed is `Loader(...)`, which finds the shards, opens their
indexes, sorts samples with and without captions and draws the order; and for "resume" also `load_state_dict` of a
state at the middle (which hashes what the shards hold), and the first key that comes next. Indexes are in the page
cache. The clock counts the CPU seconds of the process, all threads together: no less than a quiet machine takes, and
other work does not matter. Each has to be done in GOAL seconds.

There is no peer: webdataset keeps no index, and gets to sample 5,000,000 by reading those before it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench import measure
from bench.record import Row

MISSING = ""  # why nothing here can run, see loading.py
try:
    from dataload.pipeline import Loader, LoaderConfig
    from dataload.shards import indexfile
    from dataload.shards.tarindex import BIT, JSON_CAPTIONS, Scanned, Table, digest
    from dataload.tokenizer import Tokenizer, train_tokenizer
except ImportError as error:
    MISSING = f"{error.name} is not installed"

OPENING = "open_shards"
OPEN, RESUME = "open", "resume"
GOAL = 2.0  # seconds
PEERS = ("auroraio",)
_HOLDERS: list[Any] = []  # temporary folders live as long as the process


@dataclass(frozen=True)
class OpenCase:
    """So many shards of so many samples each; a tenth has no caption."""

    shards: int
    samples: int

    @property
    def name(self) -> str:
        """ "1000-shards-of-10000"."""
        return f"{self.shards}-shards-of-{self.samples}"


def write_indexes(folder: Path, case: OpenCase) -> None:
    """Shards that are holes, and the indexes that real ones of their size would have: a picture of 100 kB and a
    json for each sample."""
    sizes = np.tile(np.array([100_000, 300]), case.samples)
    padded = -(-sizes // 512) * 512
    offsets = np.cumsum(padded + 512) - padded
    flags = np.full(case.samples, BIT["image"] | BIT["json"] | JSON_CAPTIONS, dtype=np.uint8)
    flags[::10] &= ~np.uint8(JSON_CAPTIONS)
    key_bytes = 9 * np.arange(1, case.samples + 1, dtype=np.uint32)
    table = Table(
        keys=b"".join(b"%09d" % number for number in range(case.samples)), key_ends=key_bytes,
        file_ends=np.arange(2, 2 * case.samples + 2, 2, dtype=np.uint32),
        kinds=np.tile(np.array([0, 1], dtype=np.uint16), case.samples),
        offsets=offsets, sizes=sizes, extensions=("jpg", "json"),
    )  # fmt: skip
    size = int(offsets[-1] + padded[-1]) + 1024
    scanned = Scanned(size, flags, table, (), {}, digest(flags, table))
    time = 1_700_000_000_000_000_000
    index = indexfile.pack(scanned, str(time), "")
    for number in range(case.shards):
        path = folder / f"train-{number:06d}.tar"
        with open(path, "wb") as file:
            file.truncate(size)
        os.utime(path, ns=(time, time))
        path.with_name(path.name + indexfile.SUFFIX).write_bytes(index)


@cache
def corpus(case: OpenCase) -> tuple[Path, Tokenizer]:
    """Made once per process, in a folder that goes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="auroraio-bench-")
    _HOLDERS.append(holder)
    folder = Path(holder.name)
    write_indexes(folder, case)
    words = [
        f"{a} {b}" for a in "the small large red green blue".split() for b in "dog cat bird horse".split()
    ]
    return folder, train_tokenizer(words, folder / "tokenizer.model", vocab_size=280)


def new_loader(case: OpenCase) -> Loader:
    """What a training run makes first."""
    folder, tokenizer = corpus(case)
    return Loader(LoaderConfig((str(folder),), 64, 64, 32, workers=0), tokenizer)


def open_(case: OpenCase) -> None:
    """A new loader."""
    with new_loader(case) as loader:
        if sum(loader.counts[kind] for kind in ("captioned", "uncaptioned")) != case.shards * case.samples:
            raise AssertionError(f"samples are missing: {loader.counts}")


def resume(case: OpenCase, state: dict[str, Any]) -> str:
    """A new loader that goes to a state; the key of the captioned sample that comes next."""
    with new_loader(case) as loader:
        loader.load_state_dict(state)
        return loader.index.key(loader._captioned.at(loader.state_dict()["captioned"])[1])


def middle(case: OpenCase) -> dict[str, Any]:
    """A state at half of the samples."""
    with new_loader(case) as loader:
        half = case.shards * case.samples // 2
        return {
            **loader.state_dict(),
            "captioned": half - half // 10,
            "uncaptioned": half // 10,
            "batches": half // 64,
        }


def solve(
    case: OpenCase, mode: str, *, budget: float, peers: Collection[str] | None = None, clock: str = "auto"
) -> list[Row]:
    """The row of one mode; `clock` is always "cpu" here."""
    shape = f"{case.shards:,} shards of {case.samples:,} samples"
    row = Row(
        OPENING, case.name, mode, PEERS[0], "uint8", shape, True, "absent", MISSING,
        items=case.shards * case.samples, unit="samples",
    )  # fmt: skip
    if MISSING:
        return [row]
    state = middle(case)
    call: Callable[[], Any] = (lambda: open_(case)) if mode == OPEN else (lambda: resume(case, state))
    timed = measure.interleave({row.peer: [call]}, device="cpu", budget=budget, clock="cpu", fewest=5)
    used, seconds = timed[row.peer]
    row = replace(row, status="ok", clock=used, seconds=seconds)
    if min(seconds) > GOAL:
        row = replace(
            row, status="wrong", note=f"{min(seconds):.2f} s in the fastest round; the goal is {GOAL:g} s"
        )
    return [row]
