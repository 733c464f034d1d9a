"""Samples held out of training: a share of a source becomes the split "val".

A hash of a sample's name decides, so the others, their order and their number do not matter, and what a share holds out a
larger one holds out, too. Only samples with the same bytes go together, where the name that sorts first would go.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path

from dataload.pack.source import Picture

TRAIN, HELD = "train", "val"
TAIL = 4096  # bytes at a file's end that tell most files of one size apart


def divide(pictures: Sequence[Picture], share: float, workers: int) -> dict[str, list[Picture]]:
    """The samples of "train" and of "val" in their order; a split without any is left out.

    Raises ValueError for a share that is not inside (0, 1), and for samples that have splits already.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"a share to hold out is more than 0 and less than 1 (0.1 is a tenth), not {share:g}"
        )
    if splits := sorted({one.split for one in pictures} - {TRAIN}):
        raise ValueError(
            f"the samples have splits already ({', '.join(splits)[:200]}); a share is held out of {TRAIN!r} alone"
        )
    first = {place: place for place in range(len(pictures))}
    for same in _copies(pictures, workers):
        first |= dict.fromkeys(same, min(same, key=lambda place: pictures[place].name))
    parts: dict[str, list[Picture]] = {TRAIN: [], HELD: []}
    for place, one in enumerate(pictures):
        split = HELD if _is_held(pictures[first[place]].name, share) else TRAIN
        parts[split].append(replace(one, split=split))
    return {split: some for split, some in parts.items() if some}


def told(parts: Mapping[str, Sequence[Picture]]) -> str:
    """A hash of which samples are held out, for the journal."""
    names = "\0".join(one.name for one in parts.get(HELD, ()))
    return sha256(names.encode("utf-8", "surrogateescape")).hexdigest()


def said(share: float, train: int, held: int) -> str:
    """What became of it, for the summary, from the numbers of packed samples."""
    text = f"--holdout {share:g}: {held:,} of {train + held:,} samples went to {HELD}, {train:,} to {TRAIN}"
    if not held:
        return f"{text}. There are no {HELD} shards: the share is too small for so few samples"
    return (
        text if train else f"{text}. There are no {TRAIN} shards: the share is too large for so few samples"
    )


def _is_held(name: str, share: float) -> bool:
    digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _copies(pictures: Sequence[Picture], workers: int) -> list[list[int]]:
    """Places of samples with the same bytes. Few files are read whole: those whose size and end another one has."""
    groups = [list(range(len(pictures)))]
    with ThreadPoolExecutor(workers) as pool:
        for look in (_size, _tail, _whole):
            parts: dict[Hashable, list[int]] = {}
            for number, group in enumerate(groups):
                seen = pool.map(partial(_looks, look), [pictures[place] for place in group])
                for place, what in zip(group, seen, strict=True):
                    if what is not None:
                        parts.setdefault((number, what), []).append(place)
            groups = [part for part in parts.values() if len(part) > 1]
    return groups


def _looks(look: Callable[[Path], Hashable], picture: Picture) -> Hashable:
    """What `look` sees of the sample's files; None where one cannot be read (packing will say so)."""
    try:
        return tuple(look(path) for path in picture.paths)
    except OSError:
        return None


def _size(path: Path) -> int:
    return path.stat().st_size


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        return blake2b(file.read(), digest_size=16).digest()


def _whole(path: Path) -> bytes:
    return blake2b(path.read_bytes(), digest_size=16).digest()
