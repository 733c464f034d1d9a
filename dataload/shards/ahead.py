"""The next group's shards, downloaded while samples of this one are read."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dataload.shards.shard import Shard

Begun = Callable[[Sequence[int], Sequence[int]], None]


@dataclass
class _Groups:
    """Of one source. Other ranks, and batches that are being made, may still read the group before."""

    before: list[Shard] = field(default_factory=list)
    now: list[Shard] = field(default_factory=list)
    coming: list[Shard] = field(default_factory=list)


class ReadAhead:
    """One thread, while there is something to download: remote shards of the groups to come, one after another, if the cache
    has room for them beside those that are read and those that were read before. What fails is left to whoever reads it, who
    tries again and says what is wrong. The thread ends with this object."""

    def __init__(self) -> None:
        self._groups: list[_Groups] = []
        """of each source"""
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._tried: set[Shard] = set()
        self._running = False

    def of(self, shards: Sequence[Shard]) -> Begun:
        """What an `order.Source` over these shards calls with the numbers of those that it begins to read, and of the next."""
        groups = _Groups()
        self._groups.append(groups)

        def begun(now: Sequence[int], coming: Sequence[int]) -> None:
            self._want(groups, [shards[i] for i in now], [shards[i] for i in coming])

        return begun

    def close(self) -> None:
        """Downloads nothing more, but for the shard that is under way."""
        self._closed = True

    def _want(self, groups: _Groups, now: list[Shard], coming: list[Shard]) -> None:
        if self._closed:
            return
        if self._process != os.getpid():  # a fork has neither the thread nor, for certain, the lock
            self._begin()
        with self._lock:
            groups.before, groups.now, groups.coming = groups.now, now, coming
            self._tried.difference_update(coming)
            if self._running or self._next() is None:
                return
            thread = threading.Thread(
                target=_run, args=(weakref.ref(self),), name="dataload-ahead", daemon=True
            )
            with contextlib.suppress(
                RuntimeError
            ):  # the system has no thread to give: whoever reads downloads
                thread.start()
                self._running = True

    def _take(self) -> Shard | None:
        """The next shard to download; None ends the thread."""
        with self._lock:
            shard = None if self._closed else self._next()
            if shard is None:
                self._running = False
            else:
                self._tried.add(shard)
            return shard

    def _next(self) -> Shard | None:
        wanted = (shard for groups in self._groups for shard in groups.coming)
        left = [shard for shard in wanted if shard.facts is not None and shard not in self._tried]
        return left[0] if left and self._room(left[0]) else None

    def _room(self, shard: Shard) -> bool:
        """Whether the shard's cache holds all groups at once: else one would push another out."""
        sizes = {
            (one.path, one.facts): one.size
            for groups in self._groups
            for one in (*groups.before, *groups.now, *groups.coming)
            if one.facts is not None and one.cache.directory == shard.cache.directory
        }
        return sum(sizes.values()) <= shard.cache.max_bytes


def _run(ahead: weakref.ref[ReadAhead]) -> None:
    while True:
        alive = ahead()
        shard = alive._take() if alive is not None else None
        del alive
        if shard is None:
            return
        with contextlib.suppress(Exception):  # see the class
            shard.open().close()
