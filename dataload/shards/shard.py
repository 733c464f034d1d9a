"""One shard: its index, from wherever that is, and its bytes, from wherever those are."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataload import remote
from dataload.remote.address import Facts, NoRanges, Remote
from dataload.remote.cache import Cache, TarFile
from dataload.shards import indexfile
from dataload.shards.indexfile import Head
from dataload.shards.tarindex import Table, scan

Address = Path | Remote
"""where a shard is: a local file, or an address"""


@dataclass(frozen=True, eq=False)
class Shard:
    """The index of one tar with n samples, in the order of their first file."""

    path: Address
    head: Head
    cache: Cache
    facts: Facts | None = None
    """what the server said, for a remote shard"""
    store: Path | None = None
    """the index file that has the table"""
    held: Table | None = None
    """the table, where no index could be written"""
    rows: np.ndarray | None = None
    """int64 [n]: rows of the table that are left when some samples are excluded"""

    def __len__(self) -> int:
        return len(self.head.flags) if self.rows is None else len(self.rows)

    @property
    def name(self) -> str:
        """The file's name without ".tar"."""
        return self.path.name.removesuffix(".tar")

    @property
    def shown(self) -> str:
        """Path or address, for reports."""
        return self.path.shown if isinstance(self.path, Remote) else str(self.path)

    @property
    def size(self) -> int:
        """Bytes of the tar."""
        return self.head.size

    @property
    def flags(self) -> np.ndarray:
        """uint8 [n], see tarindex."""
        return self.head.flags if self.rows is None else self.head.flags[self.rows]

    @property
    def excluded(self) -> int:
        """Samples that an exclude list leaves out."""
        return len(self.head.flags) - len(self)

    @property
    def problems(self) -> tuple[tuple[str, str], ...]:
        """(key, reason) of everything that indexing left out or found suspect."""
        return self.head.problems

    @property
    def ignored(self) -> dict[str, int]:
        """Files of no kind that is known here, counted by extension."""
        return self.head.ignored

    @property
    def digest(self) -> str:
        """SHA-256 of what it holds and what of it is excluded."""
        if self.rows is None:
            return self.head.digest
        return hashlib.sha256(self.head.digest.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

    def table(self) -> Table:
        """Where the files are, read anew each time. An index file that was damaged meanwhile is made again;
        OSError where the tar then turns out to be another."""
        if self.held is not None:
            return self.held
        if self.store is not None:
            table = indexfile.read_table(self.store, self.head)
            if table is not None:
                return table
        again = load_shard(self.path, self.cache, self.facts, fresh=True)
        if again.head.digest != self.head.digest:
            raise OSError(f"{self.shown} has changed since it was indexed")
        if again.held is not None:
            return again.held
        table = indexfile.read_table(again.store, again.head) if again.store else None
        if table is None:
            raise OSError(f"{again.store}: an index that was just written cannot be read")
        return table

    def open(self) -> TarFile:
        """The tar as a local file, unbuffered. OSError where it is gone or has changed."""
        if isinstance(self.path, Remote):
            assert self.facts is not None
            return self.cache.open(self.path, self.facts)
        return TarFile(self.path)

    def check(self, file: TarFile) -> None:
        """Raises OSError unless `file`, which `open` gave, is the tar that was indexed."""
        status = os.fstat(file.fileno())
        if status.st_size < self.size:
            raise OSError(
                f"{self.shown} is shorter than when it was indexed ({status.st_size} of {self.size} bytes)"
            )
        if self.facts is None and (status.st_size, str(status.st_mtime_ns)) != (self.size, self.head.stamp):
            raise OSError(f"{self.shown} has changed since it was indexed")

    @property
    def by_range(self) -> bool:
        """Whether each sample is a request of its own."""
        return self.facts is not None and self.facts.ranges and self.cache.max_bytes == 0


def load_shard(
    path: Address, cache: Cache | None = None, facts: Facts | None = None, *, fresh: bool = False
) -> Shard:
    """The index of a tar: from the index file beside it or in the cache, if that fits the tar's size and time
    (or ETag), or else from one pass, which writes it. `fresh` = from one pass in any case.

    The index file is written in one step; where no folder can be written to, the index stays in memory.
    Raises BrokenShard where the tar has no whole sample, OSError where it cannot be read.
    """
    cache = cache or Cache()
    if isinstance(path, Remote):
        return _load_remote(path, cache, facts or remote.facts(path, cache.timeout), fresh)
    status = path.stat()
    places = (lambda: path.with_name(path.name + indexfile.SUFFIX), lambda: _store_elsewhere(path, cache))
    stores = []
    for place in places:
        stores.append(place())
        head = None if fresh else indexfile.read_head(stores[-1])
        if head is not None and (head.size, head.stamp) == (status.st_size, str(status.st_mtime_ns)):
            return Shard(path, head, cache, store=stores[-1])
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        data = _index(file, status.st_size, str(path), str(status.st_mtime_ns))
        after = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(f"{path} changed while it was being indexed")
    return _kept(path, cache, None, data, stores)


def _store_elsewhere(path: Path, cache: Cache) -> Path:
    """For shards on a disk that cannot be written to."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:40]
    return cache.directory / f"local-{place}{indexfile.SUFFIX}"


def _load_remote(address: Remote, cache: Cache, facts: Facts, fresh: bool) -> Shard:
    store = cache.index_path(address, facts)
    if not fresh:
        head = indexfile.read_head(store)
        if head is not None and head.size == facts.size:
            return Shard(address, head, cache, facts, store)
        data = remote.small_file(address.beside(indexfile.SUFFIX), cache.timeout)
        if data is not None and _belongs(data, address, cache, facts):
            return _kept(address, cache, facts, data, [store])
    if cache.max_bytes == 0 and facts.ranges:
        with _ranged(address, facts, cache.timeout) as file:
            data = _index(file, facts.size, address.shown, facts.stamp)
    else:
        with io.BufferedReader(cache.open(address, facts)) as file:
            data = _index(file, facts.size, address.shown, facts.stamp)
    return _kept(address, cache, facts, data, [store])


def _index(file: BinaryIO, size: int, name: str, stamp: str) -> bytes:
    """The index file's contents from one pass over a tar."""
    return indexfile.pack(scan(file, size, name), stamp, _tail(file, size))


def _tail(file: BinaryIO, size: int) -> str:
    def part(start: int, end: int) -> bytes:
        file.seek(start)
        return file.read(end - start)

    return remote.tail_of(part, size)


def _kept(address: Address, cache: Cache, facts: Facts | None, data: bytes, stores: list[Path]) -> Shard:
    """The shard of an index's bytes, which are written to the first place that takes them."""
    head = indexfile.unpack_head(data, len(data))
    assert head is not None
    for store in stores:
        if store.parent == cache.directory:
            try:
                cache.directory.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
        if indexfile.write(store, data):
            return Shard(address, head, cache, facts, store)
    return Shard(address, head, cache, facts, held=indexfile.unpack_table(data[head.table_at :], head))


def _belongs(data: bytes, address: Remote, cache: Cache, facts: Facts) -> bool:
    """Whether an index that lies beside a remote shard is whole and was made of this very tar."""
    head = indexfile.unpack_head(data, len(data))
    if head is None or head.size != facts.size or indexfile.unpack_table(data[head.table_at :], head) is None:
        return False
    try:
        tail = remote.tail_of(lambda at, end: remote.read(address, at, end, cache.timeout), facts.size)
    except NoRanges:
        with io.BufferedReader(cache.open(address, facts)) as file:
            tail = _tail(file, facts.size)
    return head.tail == tail


class _Ranges(io.RawIOBase):
    """A remote file, read by ranges."""

    def __init__(self, address: Remote, facts: Facts, timeout: float) -> None:
        self._address, self._size, self._timeout, self._at = address, facts.size, timeout, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + min(len(buffer), remote.BLOCK), self._size)
        data = remote.read(self._address, self._at, end, self._timeout) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _ranged(address: Remote, facts: Facts, timeout: float) -> BinaryIO:
    return io.BufferedReader(_Ranges(address, facts, timeout), 1 << 18)
