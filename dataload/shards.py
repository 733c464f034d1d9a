"""From patterns to samples: finds the tars, indexes them, and reads pictures and captions by offset."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataload.tarindex import BrokenShard, Shard, iterate_problems, json_captions, load_shard, txt_captions

__all__ = ["BrokenShard", "ShardIndex", "ShardWarning", "expand", "index"]

_OPEN_FILES = 32  # per thread; one group of shards (see order.py) and some more


class ShardWarning(UserWarning):
    """Shards were indexed, but something in them was left out or is suspect."""


def expand(patterns: Sequence[str]) -> list[Path]:
    """The tars that the patterns name, in their order; each is a tar, a folder of tars, a glob, or has braces
    ("train-{000..011}.tar", "{train,extra}.tar"). What a glob or folder finds is sorted by name.

    Raises FileNotFoundError when a pattern finds nothing (or one tar of a brace range is missing), ValueError
    for a tar that is named twice, for addresses (s3://, https://, pipe:), and for no pattern at all.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards is one string, {patterns!r}; a sequence of patterns is needed")
    if not patterns:
        raise ValueError("no shards were given")
    paths: list[Path] = []
    for pattern in patterns:
        if re.match(r"[a-z0-9]+://|pipe:", str(pattern)):
            raise ValueError(f"{pattern!r} is an address; this version reads local tars only")
        for part in _braces(os.path.expanduser(str(pattern))):
            paths.extend(_find(part, str(pattern)))
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is named twice by the shards {list(patterns)}")
        seen.add(path.resolve())
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """Expands {000..011} (zero-padded as written) and {a,b}, from left to right."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    if match[3] is not None:
        choices = match[3].split(",")
    else:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if last < first:
            raise ValueError(f"{match[0]} in {pattern!r} counts down")
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    for choice in choices:
        yield from _braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _find(part: str, pattern: str) -> list[Path]:
    path = Path(part)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise FileNotFoundError(f"the folder {part} holds no .tar file")
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(part, recursive=True))
    if not found:
        raise FileNotFoundError(f"no shard at {part}" + (f" (from {pattern})" if part != pattern else ""))
    return found


def index(paths: Sequence[Path]) -> ShardIndex:
    """Indexes the tars (from their caches where these are fresh); see `tarindex.load_shard`.

    Warns once (ShardWarning) with how much was left out and the first few reasons; all are in
    `ShardIndex.problems`. Raises BrokenShard for a tar without a whole sample.
    """
    with ThreadPoolExecutor(min(8, max(1, len(paths)))) as pool:
        result = ShardIndex(tuple(pool.map(load_shard, paths)))
    if result.problems:
        few = "; ".join(f"{shard}: {key}: {reason}" for shard, key, reason in result.problems[:3])
        more = f" and {len(result.problems) - 3} more" if len(result.problems) > 3 else ""
        warnings.warn(
            f"{len(result.problems)} problems in the shards: {few}{more}", ShardWarning, stacklevel=2
        )
    return result


class ShardIndex:
    """All samples of some shards, numbered 0..len-1 in the order of the shards and of the tars. Thread-safe
    to read."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self.shards = shards
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self._handles = _Handles()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[ShardIndex], tuple[tuple[Shard, ...]]]:
        return ShardIndex, (self.shards,)  # open files stay behind

    @property
    def problems(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of everything that indexing left out or found suspect."""
        return list(iterate_problems(self.shards))

    @cached_property
    def captioned(self) -> np.ndarray:
        """bool [samples]: which samples have at least one caption."""
        return np.concatenate([shard.captioned for shard in self.shards])

    def source(self, captioned: bool) -> list[np.ndarray]:
        """Sample numbers with (or without) captions, one int64 array per shard."""
        return [
            start + np.flatnonzero(shard.captioned == captioned)
            for start, shard in zip(self._starts[:-1], self.shards, strict=True)
        ]

    @cached_property
    def manifest(self) -> dict[str, str | int]:
        """What the shards hold, to compare with a saved state: a few numbers, and a hash over the names of
        the shards, their sizes, keys, offsets and which samples have captions. Folders and times do not
        matter."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.path.name}\0{shard.size}\0{len(shard)}\0".encode())
            digest.update("\0".join(shard.keys).encode("utf-8", "surrogateescape"))
            digest.update(shard.members.astype("<i8").tobytes())
            digest.update(shard.captioned.tobytes())
        captioned = int(self.captioned.sum())
        return {
            "hash": digest.hexdigest(),
            "shards": len(self.shards),
            "captioned": captioned,
            "uncaptioned": len(self) - captioned,
            "bytes": sum(shard.size for shard in self.shards),
        }

    def key(self, sample: int) -> str:
        """'shard-name/sample-key'."""
        shard, row = self._locate(sample)
        return f"{shard.name}/{shard.keys[row]}"

    def where(self, sample: int) -> tuple[str, str]:
        """(path of the shard, key): for reports."""
        shard, row = self._locate(sample)
        return str(shard.path), shard.keys[row]

    def image(self, sample: int) -> bytes:
        """The encoded picture. Raises OSError where the tar is gone, or shorter than when it was indexed."""
        shard, row = self._locate(sample)
        offset, size = shard.members[row, :2].tolist()
        return self._handles.read(shard.path, offset, size)

    def captions(self, sample: int) -> list[str]:
        """All captions: the txt's, unless the json has it too, then the json's. Empty if uncaptioned.

        Raises OSError as `image` does, or where the tar has been overwritten since it was indexed.
        """
        shard, row = self._locate(sample)
        _, _, txt_offset, txt_size, json_offset, json_size = shard.members[row].tolist()
        from_txt: list[str] = []
        from_json: list[str] = []
        if txt_size >= 0:
            from_txt = txt_captions(self._handles.read(shard.path, txt_offset, txt_size))
        if json_size >= 0:
            from_json = json_captions(self._handles.read(shard.path, json_offset, json_size))
        texts = [text for text in from_txt if text not in from_json] + from_json
        if not texts and shard.captioned[row]:
            raise OSError(f"{shard.path} has changed since it was indexed: a caption is gone")
        return texts

    def _locate(self, sample: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.shards[number], sample - int(self._starts[number])


class _Handles(threading.local):
    """The last few open tars of each thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = open(path, "rb", buffering=0)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(path)
        data = _read_at(file, offset, size)
        if len(data) != size:
            raise OSError(
                f"{path} is shorter than when it was indexed ({len(data)} of {size} bytes at {offset})"
            )
        return data


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    if hasattr(os, "pread"):  # leaves the file's position alone, which a forked process would share
        data = os.pread(file.fileno(), size, offset)
        while 0 < len(data) < size and (
            more := os.pread(file.fileno(), size - len(data), offset + len(data))
        ):
            data += more
        return data
    file.seek(offset)
    return file.read(size)
