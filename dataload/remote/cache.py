"""Where remote shards lie on this machine: whole files under names that say what they hold.

A cached file's name is a hash of address, size and stamp (ETag or time). So a file under that name is the right
one, whole (it gets the name when the last byte has been checked), and a shard that changes gets another name.
Several processes may share a folder: a lock per file makes one of them download while the others wait, an
unfinished download is continued by the next, and what was used least recently goes when the limit is passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dataload import remote
from dataload.remote.address import Facts, NoRanges, Remote

GIB = 1 << 30
_STALE = 24 * 3600.0  # seconds after which an unfinished download is given up
_POLL = 0.05
_GRACE = 5.0  # seconds of pauses between two tries, and to spare


def default_directory() -> Path:
    """AURORAIO_CACHE, or auroraio/shards in the user's cache folder."""
    if named := os.environ.get("AURORAIO_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "auroraio" / "shards"


def _default_bytes() -> int:
    return int(float(os.environ.get("AURORAIO_CACHE_GIB") or 64) * GIB)


_ROUNDS = 3
"""downloads of a shard that is removed again before it is open"""


@dataclass(frozen=True)
class Cache:
    """A folder for remote shards, `max_bytes` at most (and one shard at least)."""

    directory: Path = field(default_factory=default_directory)
    max_bytes: int = field(default_factory=_default_bytes)
    """0 = keep indexes alone and read each sample by a range request"""
    timeout: float = field(default_factory=remote.timeout_default)
    """seconds for a connection, an answer, and each 8 MiB; a request is tried four times"""

    def path(self, address: Remote, facts: Facts) -> Path:
        """Where the shard lies, or will."""
        return self.directory / f"{_digest(address, facts)}.tar"

    def index_path(self, address: Remote, facts: Facts) -> Path:
        """Where the index of a remote shard is kept."""
        return self.directory / f"{_digest(address, facts)}.tar.index"

    def open(self, address: Remote, facts: Facts) -> TarFile:
        """The shard as a local file, open; downloaded where it is not here yet.

        Raises OSError (FileNotFoundError where it is gone) naming the address: where the server's file is
        not the one that `facts` are of, where it hangs, where the disk is full.
        """
        path = self.path(address, facts)
        file = _opened(path, facts)
        if file is not None:
            return file
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with _locked(path.with_suffix(".lock"), partial, address, self.timeout):
            file = _opened(path, facts)  # another process may have brought it
            for _ in range(_ROUNDS):  # one that makes room may take it away before it is open
                if file is None:
                    self._download(address, facts, partial)
                    os.replace(partial, path)
                    file = _opened(path, facts)
            if file is None:
                raise OSError(
                    f"{address.shown}: {path} is removed as fast as it is downloaded; the cache is too small"
                )
        self._evict(keep=path)
        return file

    def _download(self, address: Remote, facts: Facts, partial: Path) -> None:
        self.must_be(address, facts)
        # Without a stamp nothing says that the server's file is still the one of which a part is here.
        mode = "r+b" if partial.exists() and facts.stamp else "w+b"
        with open(partial, mode) as file:
            file.seek(0, os.SEEK_END)
            at = file.tell() if file.tell() <= facts.size else 0
            file.seek(at)
            file.truncate()
            try:
                while at < facts.size:
                    end = min(at + remote.BLOCK, facts.size)
                    at += file.write(remote.read(address, at, end, self.timeout))
                    file.flush()
            except NoRanges:
                remote.stream(address, facts.size, file, self.timeout)
            file.flush()
            size = os.fstat(file.fileno()).st_size
        try:
            if size != facts.size:
                raise OSError(f"{address.shown}: {size} bytes came; the server announced {facts.size}")
            self.must_be(address, facts)  # parts of two files must not become one
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def must_be(self, address: Remote, facts: Facts) -> None:
        """Raises OSError unless the server's file is still the one that `facts` are of."""
        now = remote.facts(address, self.timeout)
        if (now.size, now.stamp) != (facts.size, facts.stamp):
            raise OSError(
                f"{address.shown} has changed since it was indexed: {facts.size} bytes ({facts.stamp}) then, "
                f"{now.size} ({now.stamp}) now"
            )

    def _evict(self, keep: Path) -> None:
        """Removes the shards that were not used for longest until the rest fits the limit."""
        files = []
        now = time.time()
        for path in self.directory.glob("*.*"):
            with contextlib.suppress(OSError):  # others may be evicting too
                status = path.stat()
                if path.suffix == ".partial" and now - status.st_mtime > _STALE:
                    path.unlink()
                elif path.suffix in (".tar", ".partial"):
                    files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            if path.suffix == ".tar" and path != keep:
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                total -= size


class TarFile(io.FileIO):
    """A tar that is open for reading, unbuffered; closed when it is no longer used."""

    def __del__(self) -> None:
        self.close()


def _opened(path: Path, facts: Facts) -> TarFile | None:
    try:
        file = TarFile(path)
        if os.fstat(file.fileno()).st_size != facts.size:
            return None
        os.utime(path)  # what was used last stays longest
    except FileNotFoundError:
        return None
    return file


def _digest(address: Remote, facts: Facts) -> str:
    words = f"{address.shown}\0{facts.size}\0{facts.stamp}"
    return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()[:40]


@contextlib.contextmanager
def _locked(lock: Path, partial: Path, address: Remote, timeout: float) -> Iterator[None]:
    """Holds the lock on a download. Waits for another holder as long as its download grows, and raises
    OSError when it has not for longer than all of its tries can take."""
    patience = (1 + remote.RETRIES) * (timeout + _GRACE)
    seen, since = -1, time.monotonic()
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        if _try_lock(file):
            # The lock's file may have been removed with an evicted shard while this waited: then it locks
            # nothing.
            if _same_file(file, lock):
                break
        os.close(file)
        size = partial.stat().st_size if partial.exists() else 0
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > patience:
            raise OSError(
                f"{address.shown}: another process has been downloading it, and got nothing for {patience:g} s"
            )
        time.sleep(_POLL)
    try:
        yield
    finally:
        _unlock(file)  # not by closing alone: a process that was forked meanwhile has the file open too
        os.close(file)  # and where this process dies, the lock goes with it


def _try_lock(file: int) -> bool:
    try:
        import fcntl
    except (
        ImportError
    ):  # Windows: downloads of several processes then write under one name; sizes are checked
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: int) -> None:
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
