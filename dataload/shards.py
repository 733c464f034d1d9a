"""From patterns to samples: finds the tars, here or behind an address, indexes them, and reads their files by
offset."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataload import exclude as excluding
from dataload import remote
from dataload.broken import BrokenSample
from dataload.cache import Cache
from dataload.exclude import ExcludeList
from dataload.remote import Facts, Remote
from dataload.shard import Address, Shard, load_shard
from dataload.tarheaders import BLOCK, is_header_of
from dataload.tarindex import (
    BIT,
    CAPTIONED,
    JSON_CAPTIONS,
    KIND_OF,
    MEDIA,
    TXT_CAPTIONS,
    BrokenShard,
    Table,
    json_captions,
    json_object,
    txt_captions,
)

__all__ = ["Address", "BrokenShard", "Cache", "ShardIndex", "ShardWarning", "expand", "index"]

_OPEN_FILES = 32  # per thread; one group of shards (see order.py) and some more
_TABLES = 64  # per index: four groups
_ASK_EVERY = 60.0  # seconds between two questions whether a shard that is read by ranges is the same
_LIST_FROM = 4  # shards of one remote folder, from which on the folder is listed instead of asking for each


class ShardWarning(UserWarning):
    """Shards were indexed, but something in them was left out or is suspect."""


def expand(patterns: Sequence[str]) -> list[Address]:
    """The tars that the patterns name, in their order; each is a tar, a folder of tars, a glob, or has braces
    ("train-{000..011}.tar", "{train,extra}.tar"), on a disk or behind an address (s3://, gs://, https:// and
    what else fsspec knows). What a glob or folder finds is sorted by name.

    Raises FileNotFoundError when a pattern finds nothing (or one local tar of a brace range is missing; a
    remote one is looked for when it is indexed), ValueError for a tar that is named twice, for pipe:, and for
    no pattern at all, OSError naming the address where a server cannot be asked.
    """
    if isinstance(patterns, str):
        raise ValueError(f"shards is one string, {patterns!r}; a sequence of patterns is needed")
    if not patterns:
        raise ValueError("no shards were given")
    paths: list[Address] = []
    for pattern in map(str, patterns):
        if pattern.startswith("pipe:"):
            raise ValueError(
                f"{pattern!r} is a command; a path or an address is needed (s3://, https:// ...)"
            )
        if pattern.startswith("file://"):
            pattern = pattern.removeprefix("file://")
        for part in _braces(pattern):
            if remote.is_address(part):
                paths.extend(remote.find(part, remote.timeout_default()))
            else:
                paths.extend(_find(os.path.expanduser(part), pattern))
    seen: set[str] = set()
    for path in paths:
        real = path.url if isinstance(path, Remote) else str(path.resolve())
        if real in seen:
            raise ValueError(f"{path} is named twice by the shards {[str(pattern) for pattern in patterns]}")
        seen.add(real)
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


def index(
    paths: Sequence[Address],
    *,
    exclude: Sequence[str | Path] = (),
    cache: Cache | None = None,
    progress: Callable[[], Any] | None = None,
) -> ShardIndex:
    """Indexes the tars (from their index files where these are fresh); see `shard.load_shard`.

    Samples that NAME.tar.exclude beside a shard lists, or one of the files of `exclude`, are left out as if
    the tar did not have them (see exclude.py). `cache` holds remote shards; `progress` is called after each
    shard. Warns once (ShardWarning) with how much was left out and the first few reasons; all are in
    `ShardIndex.problems`. Raises BrokenShard for a tar without a whole sample, OSError for one that cannot be
    read.
    """
    cache = cache or Cache()
    known = _listed(paths, cache)
    many = any(isinstance(path, Remote) for path in paths)

    def load(path: Address) -> tuple[Shard, ExcludeList | None]:
        shard = load_shard(path, cache, known.get(str(path)))
        listed = _exclude_beside(path, cache, known)
        if progress is not None:
            progress()
        return shard, listed

    with ThreadPoolExecutor(min(32 if many else 4, max(1, len(paths)))) as pool:
        loaded = list(pool.map(load, paths))
    beside = [(shard, listed) for shard, listed in loaded if listed is not None]
    problems = []
    excluded = {}
    for shard, listed in beside:
        [one], unmatched = excluding.apply([shard], [listed])
        excluded[id(shard)] = one
        problems += unmatched
    kept = [excluded.get(id(shard), shard) for shard, _ in loaded]
    if exclude:
        kept, unmatched = excluding.apply(kept, [excluding.read(Path(path)) for path in exclude])
        problems += unmatched
    result = ShardIndex(tuple(kept), tuple(problems))
    if result.problems:
        few = "; ".join(f"{shard}: {key}: {reason}" for shard, key, reason in result.problems[:3])
        more = f" and {len(result.problems) - 3} more" if len(result.problems) > 3 else ""
        warnings.warn(
            f"{len(result.problems)} problems in the shards: {few}{more}", ShardWarning, stacklevel=2
        )
    return result


def _listed(paths: Sequence[Address], cache: Cache) -> dict[str, Facts]:
    """What listings of their folders say of remote shards, and of the files beside them. (A web server's
    listing says nothing.)"""
    folders: dict[str, int] = {}
    for path in paths:
        if isinstance(path, Remote) and path.protocol not in ("http", "https"):
            folder = path.url.rsplit("/", 1)[0]
            folders[folder] = folders.get(folder, 0) + 1
    known: dict[str, Facts] = {}
    for folder, count in folders.items():
        if count >= _LIST_FROM:
            entries = remote.listing(Remote(folder), cache.timeout)
            known |= {f"{folder}/{name}": facts for name, facts in entries.items()}
    return known


def _exclude_beside(path: Address, cache: Cache, known: dict[str, Facts]) -> ExcludeList | None:
    if isinstance(path, Path):
        beside = path.with_name(path.name + excluding.SUFFIX)
        return excluding.read(beside) if beside.is_file() else None
    there = path.beside(excluding.SUFFIX)
    if str(path) in known and str(there) not in known:
        return None
    data = remote.small_file(there, cache.timeout)
    return None if data is None else excluding.parse(data.decode("utf-8", "surrogateescape"), there.shown)


class ShardIndex:
    """All samples of some shards, numbered 0..len-1 in the order of the shards and of the tars. Thread-safe
    to read."""

    def __init__(self, shards: tuple[Shard, ...], problems: tuple[tuple[str, str, str], ...] = ()) -> None:
        self.shards = shards
        self._problems = problems
        self._starts = np.cumsum([0, *(len(shard) for shard in shards)])
        self._handles = _Handles()
        self._tables = _Tables(shards)
        self._said: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.shards, self._problems)  # open files stay behind

    @property
    def problems(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of everything that indexing left out or found suspect."""
        found = [(shard.shown, key, reason) for shard in self.shards for key, reason in shard.problems]
        return found + list(self._problems)

    @property
    def excluded(self) -> int:
        """Samples that exclude lists leave out; they have no number here."""
        return sum(shard.excluded for shard in self.shards)

    @cached_property
    def _flags(self) -> np.ndarray:
        return np.concatenate([shard.flags for shard in self.shards] or [np.zeros(0, dtype=np.uint8)])

    @cached_property
    def captioned(self) -> np.ndarray:
        """bool [samples]: which samples have at least one caption."""
        return (self._flags & CAPTIONED) != 0

    def has(self, *kinds: str) -> np.ndarray:
        """bool [samples]: which samples have a file of each of the kinds image, audio, video, txt, json."""
        mask = sum(BIT[kind] for kind in dict.fromkeys(kinds))
        return (self._flags & mask) == mask

    def source(self, captioned: bool, needs: Sequence[str] = ("image",)) -> list[np.ndarray]:
        """Numbers of the samples with (or without) captions that have a file of each kind in `needs`, one
        int64 array per shard.

        What lacks one is counted in a ShardWarning, once. Raises BrokenShard where no sample has all.
        """
        able = self.has(*needs)
        lacking = len(able) - int(np.count_nonzero(able))
        if lacking and tuple(needs) not in self._said:
            self._said.add(tuple(needs))
            what = " and ".join(needs)
            if lacking == len(able):
                raise BrokenShard(f"none of the {len(able):,} samples has {what}")
            warnings.warn(
                f"{lacking:,} of {len(able):,} samples are left out: they lack {what}",
                ShardWarning,
                stacklevel=2,
            )
        samples = np.flatnonzero(able & (self.captioned == captioned))
        return np.split(samples, np.searchsorted(samples, self._starts[1:-1]))

    @cached_property
    def manifest(self) -> dict[str, str | int]:
        """What the shards hold, to compare with a saved state: a few numbers, and a hash over the names of
        the shards, their sizes, keys, files, offsets, which samples have captions and which are excluded.
        Folders, addresses and times do not matter."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.path.name}\0{shard.size}\0{len(shard)}\0{shard.digest}\0".encode())
        captioned = int(np.count_nonzero(self.captioned))
        return {
            "hash": digest.hexdigest(),
            "shards": len(self.shards),
            "captioned": captioned,
            "uncaptioned": len(self) - captioned,
            "excluded": self.excluded,
            "bytes": sum(shard.size for shard in self.shards),
        }

    def key(self, sample: int) -> str:
        """'shard-name/sample-key'."""
        shard, table, row = self._locate(sample)
        return f"{shard.name}/{table.key(row)}"

    def where(self, sample: int) -> tuple[str, str]:
        """(path or address of the shard, key): for reports."""
        shard, table, row = self._locate(sample)
        return shard.shown, table.key(row)

    def offset(self, sample: int) -> int:
        """Byte of the tar at which the contents of the sample's first picture, sound or video begin."""
        _, table, row = self._locate(sample)
        return next(at for name, at, _ in table.files(row) if KIND_OF.get(name.lower()) in MEDIA)

    def files(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of all files of a sample, in the order of the tar."""
        _, table, row = self._locate(sample)
        return table.files(row)

    def read(self, sample: int, extension: str) -> bytes:
        """One file of a sample by its extension. KeyError where there is none; OSError as for `media`."""
        shard, table, row = self._locate(sample)
        for name, offset, size in table.files(row):
            if name == extension:
                return self._handles.read(shard, offset, size)
        raise KeyError(f"{shard.shown}: {table.key(row)} has no {extension!r}")

    def media(self, sample: int, kind: str) -> bytes:
        """The contents of the sample's first file of a kind: image, audio, video, txt or json.

        Raises OSError where the tar is gone, or is shorter than or another than when it was indexed, and
        BrokenSample where the sample has no such file.
        """
        shard, table, row = self._locate(sample)
        place = table.find(row, kind)
        if place is None:
            raise BrokenSample(f"it has no {kind}")
        return self._handles.read(shard, *place)

    def image(self, sample: int) -> bytes:
        """The encoded picture; errors as for `media`."""
        return self.media(sample, "image")

    def record(self, sample: int) -> dict[str, Any]:
        """The sample's json; empty where it has none. Errors as for `media`; BrokenSample where it is no JSON
        object."""
        shard, table, row = self._locate(sample)
        place = table.find(row, "json")
        if place is None:
            return {}
        try:
            return json_object(self._handles.read(shard, *place))
        except ValueError as error:
            raise BrokenSample(f"the json is {error}") from None

    def captions(self, sample: int) -> list[str]:
        """All captions: the txt's, unless the json has it too, then the json's. Empty if uncaptioned.

        Raises OSError as `media` does.
        """
        shard, table, row = self._locate(sample)
        flags = int(shard.head.flags[row])
        from_txt: list[str] = []
        from_json: list[str] = []
        if flags & TXT_CAPTIONS and (place := table.find(row, "txt")):
            from_txt = txt_captions(self._handles.read(shard, *place))
        if flags & JSON_CAPTIONS and (place := table.find(row, "json")):
            from_json = json_captions(self._handles.read(shard, *place))
        texts = [text for text in from_txt if text not in from_json] + from_json
        if not texts and flags & CAPTIONED:
            raise OSError(f"{shard.shown} has changed since it was indexed: a caption is gone")
        return texts

    def _locate(self, sample: int) -> tuple[Shard, Table, int]:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        shard, row = self.shards[number], sample - int(self._starts[number])
        return shard, self._tables[number], row if shard.rows is None else int(shard.rows[row])


class _Tables:
    """The last few tables that were asked for, shared by the threads."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> Table:
        with self._lock:
            table = self._tables.get(number)
            if table is not None:
                self._tables.move_to_end(number)
                return table
        table = self._shards[number].table()
        with self._lock:
            self._tables[number] = table
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        return table


class _Handles(threading.local):
    """The last few open tars of each thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Address, BinaryIO] = OrderedDict()
        self._asked: dict[Address, float] = {}  # when a server was last asked whether a shard is the same

    def read(self, shard: Shard, offset: int, size: int) -> bytes:
        if shard.by_range:
            return self._request(shard, offset, size)
        file = self._files.get(shard.path)
        if file is None:
            file = self._files[shard.path] = shard.open()
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(shard.path)
        shard.check(file)
        data = _read_at(file, offset, size)
        if len(data) != size:
            raise OSError(
                f"{shard.shown} is shorter than when it was indexed ({len(data)} of {size} bytes at {offset})"
            )
        return data

    def _request(self, shard: Shard, offset: int, size: int) -> bytes:
        """A range of a remote tar, with the header in front of it to see that it is still this file's."""
        assert isinstance(shard.path, Remote) and shard.facts is not None
        now = time.monotonic()
        if now - self._asked.get(shard.path, -_ASK_EVERY) >= _ASK_EVERY:
            shard.cache.must_be(shard.path, shard.facts)
            self._asked[shard.path] = now
        data = remote.read_all(shard.path, offset - BLOCK, BLOCK + size, shard.cache.timeout)
        if not is_header_of(data[:BLOCK], size):
            raise OSError(f"{shard.shown} has changed since it was indexed")
        return data[BLOCK:]


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
