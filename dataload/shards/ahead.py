"""The next group's shards, downloaded while samples of this one are read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence

from dataload.shards.shard import Shard

Begun = Callable[[Sequence[int], Sequence[int]], None]


class ReadAhead:
    """One thread, while there is something to download: remote shards of the groups to come, one after another, as long as the
    cache has room for them beside those that are being read. What fails is left to whoever reads it, who tries again and says
    what is wrong."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[Shard], list[Shard]]] = []
        """of each source, those that it reads and those that it reads next"""
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._tried: set[Shard] = set()
        self._running = self._closed = False

    def of(self, shards: Sequence[Shard]) -> Begun:
        """What an `order.Source` over these shards calls with the numbers of those that it begins to read, and of the next."""
        place = len(self._groups)
        self._groups.append(([], []))

        def begun(now: Sequence[int], coming: Sequence[int]) -> None:
            self._want(place, [shards[i] for i in now], [shards[i] for i in coming])

        return begun

    def close(self) -> None:
        """Downloads nothing more, but for the shard that is under way."""
        self._closed = True

    def _want(self, place: int, now: list[Shard], coming: list[Shard]) -> None:
        if self._process != os.getpid():  # a fork has neither the thread nor, for certain, the lock
            self._begin()
        with self._lock:
            self._groups[place] = now, coming
            self._tried.difference_update(coming)
            if not self._running and self._next() is not None:
                self._running = True
                threading.Thread(target=self._run, name="dataload-ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                shard = None if self._closed else self._next()
                if shard is None:
                    self._running = False
                    return
                self._tried.add(shard)
            with contextlib.suppress(Exception):  # see the class
                shard.open().close()

    def _next(self) -> Shard | None:
        for _, coming in self._groups:
            for shard in coming:
                if shard.facts is not None and shard not in self._tried and self._room(shard):
                    return shard
        return None

    def _room(self, shard: Shard) -> bool:
        """Whether the shard's cache holds all groups at once: else one would push another out."""
        wanted = {one for group in self._groups for part in group for one in part if one.facts is not None}
        size = sum(one.size for one in wanted if one.cache.directory == shard.cache.directory)
        return size <= shard.cache.max_bytes
