"""Writes a source as shards with a dataset.json beside them, and says what became of every sample."""

from __future__ import annotations

import json
import os
import random
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dataload.annotations import CLASSES, SEGMENTATION
from dataload.pack import holdout as held_out
from dataload.pack.geometry import map_bytes, scaled
from dataload.pack.journal import Journal, PackError, describe
from dataload.pack.kinds import kind_of, suffix_of
from dataload.pack.pictures import Prepared, prepare
from dataload.pack.sounds import fault
from dataload.pack.source import Picture, Source
from dataload.pack.summary import Outcome, Summary
from dataload.pack.writer import ShardWriter
from dataload.progress import Progress

MAP = "map"
"""kind of a label map among a sample's files"""


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
    require_all: bool = False,
    holdout: float | None = None,
    workers: int | None = None,
) -> Summary:
    """Writes output/<split>-%06d.tar for every split of `source`, and output/dataset.json.

    The order is that of the source, or a random one that depends on `shuffle_seed`; the same source and
    options give the same bytes. Keys are running numbers per split. All files appear at the end, or none
    does. Where a packing was interrupted, the same call goes on from its last whole shard, and gives the bytes
    that it would have given; another source or other options are refused, unless `restart` throws away what
    is there. `overwrite` replaces what an earlier packing put into `output` (and nothing else there).
    `workers`: threads that read and check files (None = one per core). `holdout`: this share of the samples becomes the
    split "val", and the others stay "train", by a hash of each one's name; for a source whose samples are all "train".

    Before any work it looks whether the files are there; `require_all`: one that is missing ends it.

    Raises PackError when `output` is not empty, holds another interrupted packing, a split's name cannot be
    part of a file name, a file is missing that is required, or nothing could be packed; and for a `holdout` outside
    (0, 1) or of a source with other splits.
    """
    if (absent := missing(source)) and (require_all or len(absent) == len(source.pictures)):
        raise PackError(
            _nothing(source) if len(absent) == len(source.pictures) else missing_said(source, absent)
        )
    workers = workers or os.cpu_count() or 1
    options: dict[str, Any] = {
        "max_samples": max_samples, "max_bytes": max_bytes, "resize": resize, "verify": verify,
        "shuffle_seed": shuffle_seed, "holdout": holdout,
    }  # fmt: skip
    splits: dict[str, list[Picture]] = {}
    if holdout is None:
        for picture in source.pictures:
            splits.setdefault(picture.split, []).append(picture)
    else:
        try:
            splits = held_out.divide(source.pictures, holdout, workers)
        except ValueError as error:
            raise PackError(f"holdout: {error}") from error
        options["held"] = held_out.told(splits)
    for name, pictures in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise PackError(f"split {name!r} cannot name a shard: letters, digits, - and _ are allowed")
        if shuffle_seed is not None:
            random.Random(f"{shuffle_seed} {name}").shuffle(pictures)
    summary = Summary(source.kind, notes=[*source.notes], problems=source.problems)
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
                ahead = _ahead(pictures[journal.done(name) :], loading, workers)
                _write_split(name, pictures, ahead, journal, limits, summary, seen, progress)
        for name, split in summary.splits.items():
            split.shards = journal.shards[name]
        if not summary.splits:
            raise PackError(_nothing(source, summary))
        if holdout is not None:
            train, held = (
                summary.splits[name].samples if name in summary.splits else 0
                for name in (held_out.TRAIN, held_out.HELD)
            )
            summary.notes.append(held_out.said(holdout, train, held))
        beside = {}
        if source.classes:
            beside[CLASSES] = (json.dumps(source.classes, ensure_ascii=False, indent=1) + "\n").encode()
            summary.beside = list(beside)
        listing = json.dumps(asdict(summary), ensure_ascii=False, indent=1) + "\n"
        journal.publish(listing.encode(), beside)
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
                files = {one.suffix: one.data for one in prepared}
                writer.write_files(f"{number:08d}", files, picture.captions, _facts(picture, prepared))
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
    media = [one for one in prepared if one.kind != MAP]
    digests = [one.digest for one in media]
    digest = digests[0] if len(digests) == 1 else blake2b(b"".join(digests), digest_size=16).digest()
    change = next((one.change for one in media if one.change), "")
    kinds = tuple(one.kind for one in media)
    return Outcome(digest.hex(), kinds, sum(len(one.data) for one in media), change)


def _facts(picture: Picture, prepared: list[Prepared]) -> Mapping[str, Any]:
    """What is known of a sample, in pixels of the picture as it is packed."""
    if not picture.is_placed:
        return picture.facts
    image = next(one for one in prepared if one.kind == "image")
    return scaled(picture.facts, image.source_size, image.size)


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
                found.append(prepare(data, resize=resize, verify=verify, measure=picture.is_placed))
    if picture.is_placed and not any(one.broken for one in found):
        found += _placed(picture, next((one for one in found if one.kind == "image"), None))
    return found


def _placed(picture: Picture, image: Prepared | None) -> list[Prepared]:
    """The label map of a sample; or why boxes and maps do not fit its picture."""
    if image is None:
        return [Prepared(b"", broken="boxes or a label map, but no picture")]
    if picture.size is not None and picture.size != image.source_size:
        wanted, found = ("x".join(map(str, size)) for size in (picture.size, image.source_size))
        return [Prepared(b"", broken=f"the annotations are for {wanted} pixels, the picture has {found}")]
    if picture.label_map is None:
        return []
    try:
        return [
            Prepared(b"", SEGMENTATION, map_bytes(picture.label_map, image.source_size, image.size), kind=MAP)
        ]
    except FileNotFoundError as error:
        return [Prepared(b"", broken=f"the label map {Path(str(error.filename)).name} is missing")]
    except (ValueError, OSError) as error:
        return [Prepared(b"", broken=f"the label map cannot be used: {error}")]


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


def missing(source: Source) -> list[Picture]:
    """The samples of which a file is not there."""
    return [
        one
        for one in source.pictures
        if not all(path.is_file() for path in (*one.paths, *(one.label_map.paths if one.label_map else ())))
    ]


def known_before(source: Source) -> str:
    """What can be said before any work: files that are missing, and what the source's own files leave out."""
    lines = [
        f"{len(entries):,} {title}; the first is {entries[0][:150]}"
        for title, entries in source.problems.items()
    ]
    return "\n".join(filter(None, [missing_said(source, missing(source)), *lines]))


def missing_said(source: Source, absent: list[Picture]) -> str:
    """The same in a sentence; empty where nothing is missing."""
    if not absent:
        return ""
    return (
        f"the files of {len(absent):,} of {len(source.pictures):,} samples are missing; the first was looked for at "
        f"{_looked_for(absent[0])}"
    )


def _looked_for(absent: Picture) -> Path:
    paths = (*absent.paths, *(absent.label_map.paths if absent.label_map else ()))
    return next((path for path in paths if not path.is_file()), absent.path)


def _nothing(source: Source, summary: Summary | None = None) -> str:
    if not source.pictures:
        return "the source holds no pictures, sounds or videos"
    summary = summary or Summary(source.kind, missing=[one.name for one in source.pictures])
    message = (
        f"none of the {len(source.pictures):,} pictures could be packed: {len(summary.missing):,} are missing"
    )
    message += f" and {len(summary.broken):,} broken."
    if summary.missing:
        return f"{message} The first was looked for at {_looked_for(source.pictures[0])}: is --images right?"
    return f"{message} The first: {', '.join(summary.broken[0])}"
