"""Writes a source as shards with a dataset.json beside them, and says what became of every picture."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dataload.pack.pictures import Prepared, prepare
from dataload.pack.source import Picture, Source
from dataload.pack.writer import ShardWriter

LISTING = "dataset.json"
SCRATCH = ".packing-"  # starts the name of the folder in which shards are written


class PackError(ValueError):
    """Packing cannot start, or nothing came of it."""


@dataclass
class SplitSummary:
    """What one split holds."""

    pictures: int = 0
    captioned: int = 0
    uncaptioned: int = 0
    captions: int = 0
    bytes: int = 0
    shards: list[str] = field(default_factory=list)

    def add(self, picture: Picture, size: int) -> None:
        """Counts one packed picture of `size` bytes."""
        self.pictures += 1
        self.captions += len(picture.captions)
        self.captioned += bool(picture.captions)
        self.uncaptioned += not picture.captions
        self.bytes += size


@dataclass
class Summary:
    """What was packed, and what was not and why; `dataset.json` holds the same."""

    kind: str
    splits: dict[str, SplitSummary] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    """pictures that were converted or resized, by what was done"""
    missing: list[str] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason)"""
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(name, name of the earlier picture with the same bytes); these are packed all the same"""
    across_splits: int = 0
    """duplicates whose earlier picture is in another split"""
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name, split in self.splits.items():
            lines.append(f"{name}: {split.pictures:,} pictures, {split.bytes / 2**20:,.1f} MiB")
            lines.append(
                f"    {split.captioned:,} with {split.captions:,} captions, {split.uncaptioned:,} without"
            )
            lines.append(f"    in {', '.join(split.shards[:1] + split.shards[1:][-1:])}")
            if len(split.shards) > 2:
                lines[-1] = lines[-1].replace(", ", " ... ") + f" ({len(split.shards):,} shards)"
        lines += [f"{count:,} pictures were {change}" for change, count in sorted(self.changes.items())]
        lines += self.notes
        lists = dict(self.problems)
        lists["pictures missing on disk, not packed"] = self.missing
        lists["broken pictures, not packed"] = [f"{name}: {reason}" for name, reason in self.broken]
        across = f" ({self.across_splits:,} of them in another split)" if self.across_splits else ""
        lists[f"pictures with the same bytes as an earlier one{across}, packed all the same"] = [
            f"{name} = {earlier}" for name, earlier in self.duplicates
        ]
        for title, entries in lists.items():
            if entries:
                lines.append(f"{len(entries):,} {title}:")
                lines += [f"    {entry[:200]}" for entry in entries[:10]]
                if len(entries) > 10:
                    lines.append(f"    ... all are listed in {LISTING}")
        return "\n".join(lines)


def pack(
    source: Source,
    output: Path,
    *,
    max_samples: int = 1000,
    max_bytes: int = 512 * 2**20,
    resize: int | None = None,
    verify: bool = False,
    shuffle_seed: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> Summary:
    """Writes output/<split>-%06d.tar for every split of `source`, and output/dataset.json.

    The order is that of the source, or a random one that depends on `shuffle_seed`; the same source and
    options give the same bytes.
    Keys are running numbers per split. All files appear at the end, or none does. `overwrite` replaces what
    an earlier packing put into `output` (and nothing else there). `workers`: threads that read and check
    pictures (None = one per core).

    Raises PackError when `output` is not empty, a split's name cannot be part of a file name, or no picture
    could be packed.
    """
    old = _clear_to_write(output, overwrite)
    splits: dict[str, list[Picture]] = {}
    for picture in source.pictures:
        splits.setdefault(picture.split, []).append(picture)
    for name in splits:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise PackError(f"split {name!r} cannot name a shard: letters, digits, - and _ are allowed")

    summary = Summary(source.kind, notes=source.notes, problems=source.problems)
    seen: dict[bytes, Picture] = {}
    report = _progress(len(source.pictures))
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=output) as scratch:
        for name, pictures in splits.items():
            if shuffle_seed is not None:
                random.Random(f"{shuffle_seed} {name}").shuffle(pictures)
            part = SplitSummary()
            with ShardWriter(Path(scratch), name, max_samples, max_bytes) as writer:
                for picture, prepared in _prepared(pictures, resize, verify, workers or os.cpu_count() or 1):
                    report()
                    if usable := _account(picture, prepared, summary, seen):
                        key = f"{part.pictures:08d}"
                        writer.write(key, usable.suffix, usable.data, picture.captions, picture.facts)
                        part.add(picture, len(usable.data))
            part.shards = [shard.name for shard in writer.shards]
            if part.pictures:
                summary.splits[name] = part
        if not summary.splits:
            raise PackError(_nothing(source, summary))
        _publish(Path(scratch), output, summary, old)
    return summary


def _publish(scratch: Path, output: Path, summary: Summary, old: list[Path]) -> None:
    """Removes what is to be replaced and moves the new files into their place, dataset.json last."""
    for path in old:
        path.unlink(missing_ok=True)
    for path in sorted(scratch.iterdir()):
        path.rename(output / path.name)
    listing = scratch / LISTING
    listing.write_text(json.dumps(asdict(summary), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    listing.rename(output / LISTING)


def _clear_to_write(output: Path, overwrite: bool) -> list[Path]:
    """The files of an earlier packing, which are to go when the new ones are complete."""
    if output.exists() and not output.is_dir():
        raise PackError(f"{output} is a file; --output names a folder")
    if not output.exists() or not any(output.iterdir()):
        return []
    if not overwrite:
        raise PackError(f"{output} is not empty; choose another folder, or --overwrite an earlier packing")
    for leftover in output.glob(SCRATCH + "*"):  # of a packing that was killed
        shutil.rmtree(leftover)
    listing = output / LISTING
    if not listing.is_file():
        if any(output.glob("*.tar")):
            raise PackError(
                f"{output} holds tar files but no {LISTING}, so they may be no earlier packing and "
                "--overwrite does not touch them; choose another folder"
            )
        return []
    shards = [
        name
        for split in json.loads(listing.read_text("utf-8"))["splits"].values()
        for name in split["shards"]
    ]
    return [listing, *(output / f"{name}{end}" for name in shards for end in ("", ".index"))]


def _account(
    picture: Picture, prepared: Prepared | None, summary: Summary, seen: dict[bytes, Picture]
) -> Prepared | None:
    """Notes what became of a picture; returns what is to be packed, if anything."""
    if prepared is None:
        summary.missing.append(picture.name)
        return None
    if prepared.broken:
        summary.broken.append((picture.name, prepared.broken))
        return None
    earlier = seen.setdefault(prepared.digest, picture)
    if earlier is not picture:
        summary.duplicates.append((picture.name, earlier.name))
        summary.across_splits += earlier.split != picture.split
    if prepared.change:
        summary.changes[prepared.change] = summary.changes.get(prepared.change, 0) + 1
    return prepared


def _prepared(
    pictures: list[Picture], resize: int | None, verify: bool, workers: int
) -> Iterator[tuple[Picture, Prepared | None]]:
    """(picture, what to pack, or None for a missing file), in order; threads work a few pictures ahead."""

    def load(picture: Picture) -> Prepared | None:
        try:
            data = picture.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # a folder, no permission, a failing disk
            return Prepared(b"", broken=f"{type(error).__name__}: {error.strerror}")
        return prepare(data, resize=resize, verify=verify)

    ahead: deque[tuple[Picture, Future[Prepared | None]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for picture in pictures:
            ahead.append((picture, pool.submit(load, picture)))
            if len(ahead) > 4 * workers:
                first, job = ahead.popleft()
                yield first, job.result()
        while ahead:
            first, job = ahead.popleft()
            yield first, job.result()


def _progress(total: int) -> Callable[[], None]:
    """To be called once per picture; says every ten seconds how far it is."""
    started = said = time.monotonic()
    done = 0

    def step() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= 10:
            said = now
            print(
                f"{done:,} of {total:,} pictures, {done / (now - started):,.0f} per second", file=sys.stderr
            )

    return step


def _nothing(source: Source, summary: Summary) -> str:
    if not source.pictures:
        return "the source holds no pictures"
    message = (
        f"none of the {len(source.pictures):,} pictures could be packed: {len(summary.missing):,} are missing"
    )
    message += f" and {len(summary.broken):,} broken."
    if summary.missing:
        return f"{message} The first was looked for at {source.pictures[0].path}: is --images right?"
    return f"{message} The first: {': '.join(summary.broken[0])}"
