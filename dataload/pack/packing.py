"""Writes a source as shards with a dataset.json beside them, and says what became of every sample."""

from __future__ import annotations

import json
import os
import random
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path

from dataload.pack.journal import Journal, PackError, describe
from dataload.pack.kinds import kind_of, suffix_of
from dataload.pack.pictures import Prepared, prepare
from dataload.pack.sounds import fault
from dataload.pack.source import Picture, Source
from dataload.pack.summary import Outcome, Summary
from dataload.pack.writer import ShardWriter
from dataload.progress import Progress


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
    restart: bool = False,
    workers: int | None = None,
) -> Summary:
    """Writes output/<split>-%06d.tar for every split of `source`, and output/dataset.json.

    The order is that of the source, or a random one that depends on `shuffle_seed`; the same source and
    options give the same bytes. Keys are running numbers per split. All files appear at the end, or none
    does. Where a packing was interrupted, the same call goes on from its last whole shard, and gives the bytes
    that it would have given; another source or other options are refused, unless `restart` throws away what
    is there. `overwrite` replaces what an earlier packing put into `output` (and nothing else there).
    `workers`: threads that read and check files (None = one per core).

    Raises PackError when `output` is not empty, holds another interrupted packing, a split's name cannot be
    part of a file name, or nothing could be packed.
    """
    splits: dict[str, list[Picture]] = {}
    for picture in source.pictures:
        splits.setdefault(picture.split, []).append(picture)
    for name, pictures in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise PackError(f"split {name!r} cannot name a shard: letters, digits, - and _ are allowed")
        if shuffle_seed is not None:
            random.Random(f"{shuffle_seed} {name}").shuffle(pictures)
    options = {
        "max_samples": max_samples, "max_bytes": max_bytes, "resize": resize, "verify": verify,
        "shuffle_seed": shuffle_seed,
    }  # fmt: skip
    summary = Summary(source.kind, notes=source.notes, problems=source.problems)
    seen: dict[str, Picture] = {}
    limits = (max_samples, max_bytes)
    with Journal(output, describe(source, options), overwrite=overwrite, restart=restart) as journal:
        _replay(journal, splits, summary, seen)
        done = sum(journal.done(name) for name in splits)
        with Progress("samples", len(source.pictures), done) as progress:
            if done:
                shards = sum(map(len, journal.shards.values()))
                progress.say(f"goes on after {done:,} samples, in {shards:,} whole shards")
            for name, pictures in splits.items():
                loading = partial(load, resize=resize, verify=verify)
                ahead = _ahead(pictures[journal.done(name) :], loading, workers or os.cpu_count() or 1)
                _write_split(name, pictures, ahead, journal, limits, summary, seen, progress)
        for name, split in summary.splits.items():
            split.shards = journal.shards[name]
        if not summary.splits:
            raise PackError(_nothing(source, summary))
        listing = json.dumps(asdict(summary), ensure_ascii=False, indent=1) + "\n"
        journal.publish(listing.encode())
    return summary


def _replay(
    journal: Journal, splits: dict[str, list[Picture]], summary: Summary, seen: dict[str, Picture]
) -> None:
    """Accounts for what an interrupted packing has finished."""
    first = dict.fromkeys(splits, 0)
    for name, samples, outcomes in journal.lines:
        for picture, outcome in zip(splits[name][first[name] : samples], outcomes, strict=True):
            summary.account(picture, outcome, seen)
        first[name] = samples


def _write_split(
    name: str,
    pictures: list[Picture],
    loaded: Iterator[tuple[Picture, list[Prepared] | None]],
    journal: Journal,
    limits: tuple[int, int],
    summary: Summary,
    seen: dict[str, Picture],
    progress: Progress,
) -> None:
    """Writes what is not yet finished of a split; the journal gets a line with every shard."""
    done = journal.done(name)
    waiting: list[Outcome] = []  # of the samples since the journal's last line

    def finished(shard: Path | None) -> None:
        journal.add(name, shard, done, waiting)
        waiting.clear()

    before = [journal.folder / shard for shard in journal.shards.get(name, ())]
    with ShardWriter(journal.folder, name, *limits, shards=before, finished=finished) as writer:
        number = summary.splits[name].samples if name in summary.splits else 0
        for picture, prepared in loaded:
            outcome = _outcome(prepared)
            if prepared and not outcome.broken:
                # May finish the shard before, without this sample: `done` and `waiting` do not have it yet.
                writer.write_files(
                    f"{number:08d}", {p.suffix: p.data for p in prepared}, picture.captions, picture.facts
                )
                number += 1
            done += 1
            waiting.append(outcome)
            summary.account(picture, outcome, seen)
            progress.step()
    if waiting:
        finished(None)


def _outcome(prepared: list[Prepared] | None) -> Outcome:
    if prepared is None:
        return Outcome(missing=True)
    if broken := next((one.broken for one in prepared if one.broken), ""):
        return Outcome(broken=broken)
    digests = [one.digest for one in prepared]
    digest = digests[0] if len(digests) == 1 else blake2b(b"".join(digests), digest_size=16).digest()
    change = next((one.change for one in prepared if one.change), "")
    kinds = tuple(one.kind for one in prepared)
    return Outcome(digest.hex(), kinds, sum(len(one.data) for one in prepared), change)


def load(picture: Picture, *, resize: int | None, verify: bool) -> list[Prepared] | None:
    """What to pack of a sample's files, or None where its first is missing."""
    found = []
    for path in picture.paths:
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if path is picture.path:
                return None
            found.append(Prepared(b"", broken=f"{path.name} is missing"))
        except OSError as error:  # a folder, no permission, a failing disk
            found.append(Prepared(b"", broken=f"{type(error).__name__}: {error.strerror}"))
        else:
            kind = kind_of(path)
            if kind in ("audio", "video"):
                digest = blake2b(data, digest_size=16).digest()
                broken = fault(data, kind, verify=verify)
                found.append(Prepared(digest, suffix_of(path), data, broken=broken, kind=kind))
            else:  # also a file whose name says nothing: its bytes may be those of a picture
                found.append(prepare(data, resize=resize, verify=verify))
    return found


def _ahead(
    pictures: list[Picture], loading: partial[list[Prepared] | None], workers: int
) -> Iterator[tuple[Picture, list[Prepared] | None]]:
    """(sample, its files), in order; threads work a few samples ahead."""
    ahead: deque[tuple[Picture, Future[list[Prepared] | None]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for picture in pictures:
            ahead.append((picture, pool.submit(loading, picture)))
            if len(ahead) > 4 * workers:
                first, job = ahead.popleft()
                yield first, job.result()
        while ahead:
            first, job = ahead.popleft()
            yield first, job.result()


def _nothing(source: Source, summary: Summary) -> str:
    if not source.pictures:
        return "the source holds no pictures, sounds or videos"
    message = (
        f"none of the {len(source.pictures):,} pictures could be packed: {len(summary.missing):,} are missing"
    )
    message += f" and {len(summary.broken):,} broken."
    if summary.missing:
        return f"{message} The first was looked for at {source.pictures[0].path}: is --images right?"
    return f"{message} The first: {', '.join(summary.broken[0])}"
