"""From patterns to samples: finds the tars, here or behind an address, indexes them, and reads their files by
offset."""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dataload import remote
from dataload.broken import BrokenSample
from dataload.captions import json_captions, json_object, txt_captions
from dataload.order import GROUP
from dataload.remote.address import Facts, Remote
from dataload.remote.cache import GIB, Cache
from dataload.shards import exclude as excluding
from dataload.shards.exclude import ExcludeList
from dataload.shards.patterns import expand
from dataload.shards.reading import Handles, SampleNumbers, Tables
from dataload.shards.shard import Address, Shard, load_shard
from dataload.shards.tarindex import (
    BIT,
    CAPTIONED,
    JSON_CAPTIONS,
    KIND_OF,
    MEDIA,
    TXT_CAPTIONS,
    BrokenShard,
    Table,
)

__all__ = ["Address", "BrokenShard", "Cache", "ShardIndex", "ShardWarning", "expand", "index"]

_LIST_FROM = 4  # shards of one remote folder, from which on the folder is listed instead of asking for each


class ShardWarning(UserWarning):
    """Shards were indexed, but something in them was left out or is suspect."""


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
    _check_room(result, cache)
    if result.problems:
        few = "; ".join(f"{shard}: {key}: {reason}" for shard, key, reason in result.problems[:3])
        more = f" and {len(result.problems) - 3} more" if len(result.problems) > 3 else ""
        warnings.warn(
            f"{len(result.problems)} problems in the shards: {few}{more}", ShardWarning, stacklevel=2
        )
    return result


def _check_room(index: ShardIndex, cache: Cache) -> None:
    """Samples are shuffled within groups of shards: where the cache holds less than a group, each sample may cost the
    download of a shard."""
    sizes = sorted((shard.size for shard in index.shards if shard.facts is not None), reverse=True)
    group = sum(sizes[:GROUP])
    if cache.max_bytes and group > cache.max_bytes:
        warnings.warn(
            f"the cache {cache.directory} with {cache.max_bytes / GIB:.1f} GiB holds fewer than "
            f"{len(sizes[:GROUP])} of these shards ({group / GIB:.1f} GiB), which training "
            "reads by turns: set AURORAIO_CACHE_GIB, or reshard",
            ShardWarning,
            stacklevel=3,
        )


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
        self._starts = [0, *accumulate(map(len, shards))]
        self._handles = Handles()
        self._tables = Tables(shards)
        self._said: set[tuple[str, ...]] = set()

    def __len__(self) -> int:
        return self._starts[-1]

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
    def flags(self) -> np.ndarray:
        """uint8 [samples], see tarindex."""
        return np.concatenate([shard.flags for shard in self.shards] or [np.zeros(0, dtype=np.uint8)])

    @cached_property
    def captioned(self) -> np.ndarray:
        """bool [samples]: which samples have at least one caption."""
        return (self.flags & CAPTIONED) != 0

    def has(self, *kinds: str) -> np.ndarray:
        """bool [samples]: which samples have a file of each of the kinds image, audio, video, txt, json."""
        mask = sum(BIT[kind] for kind in dict.fromkeys(kinds))
        return (self.flags & mask) == mask

    def source(self, captioned: bool, needs: Sequence[str] = ("image",)) -> list[SampleNumbers]:
        """Numbers of the samples with (or without) captions that have a file of each kind in `needs`, one
        int64 array per shard, each made when it is used (all of them take long with millions of samples).

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
        chosen = able & (self.captioned == captioned)
        return [SampleNumbers(chosen, *ends) for ends in pairwise(self._starts)]

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

    def read_all(self, sample: int) -> list[tuple[str, bytes]]:
        """(extension, contents) of all files of a sample, in the order of the tar; errors as for `media`."""
        shard, table, row = self._locate(sample)
        return [(name, self._handles.read(shard, offset, size)) for name, offset, size in table.files(row)]

    def hold_tables(self) -> None:
        """Keeps the tables of all shards in memory (about 60 bytes per sample): for reading in any order."""
        self._tables.most = len(self.shards)

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
        number = bisect_right(self._starts, sample) - 1
        shard, row = self.shards[number], sample - self._starts[number]
        return shard, self._tables[number], row if shard.rows is None else int(shard.rows[row])
