"""Reading the files of shards by offset: what an index of many shards keeps at hand while it is used."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from dataload import remote
from dataload.remote.address import Remote
from dataload.remote.cache import TarFile
from dataload.shards.shard import Address, Shard
from dataload.shards.tarheaders import BLOCK, is_header_of
from dataload.shards.tarindex import Table

_OPEN_FILES = 32  # per thread; one group of shards (see order.py) and some more
_TABLES = 64  # per index: four groups
_ASK_EVERY = 60.0  # seconds between two questions whether a shard that is read by ranges is the same


class SampleNumbers:
    """The numbers of those samples from `start` to `end` that are `chosen` (bool [samples]). numpy takes it for an
    int64 array."""

    __slots__ = ("_chosen", "_count", "_end", "_start")

    def __init__(self, chosen: np.ndarray, start: int, end: int) -> None:
        self._chosen, self._start, self._end = chosen, start, end
        self._count = int(np.count_nonzero(chosen[start:end]))

    def __len__(self) -> int:
        return self._count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        numbers = self._start + np.flatnonzero(self._chosen[self._start : self._end])
        return numbers if dtype is None else numbers.astype(dtype, copy=False)

    def tolist(self) -> list[int]:
        """As plain numbers."""
        result: list[int] = self.__array__().tolist()
        return result


class Tables:
    """The last few tables that were asked for, shared by the threads. (There is no lock: a fork could leave it locked, and
    the worst that a race does is to read a table twice.)"""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        self.most = _TABLES
        self._tables: OrderedDict[int, Table] = OrderedDict()

    def __getitem__(self, number: int) -> Table:
        table = self._tables.get(number)
        if table is None:
            table = self._tables[number] = self._shards[number].table()
        with contextlib.suppress(KeyError):  # another thread removed it just now, or the last one
            self._tables.move_to_end(number)
            while len(self._tables) > self.most:
                self._tables.popitem(last=False)
        return table


class Handles(threading.local):
    """The last few open tars of each thread."""

    def __init__(self) -> None:
        self._files: OrderedDict[Address, TarFile] = OrderedDict()
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


def _read_at(file: TarFile, offset: int, size: int) -> bytes:
    if hasattr(os, "pread"):  # leaves the file's position alone, which a forked process would share
        data = os.pread(file.fileno(), size, offset)
        while 0 < len(data) < size and (
            more := os.pread(file.fileno(), size - len(data), offset + len(data))
        ):
            data += more
        return data
    file.seek(offset)
    return file.read(size)
