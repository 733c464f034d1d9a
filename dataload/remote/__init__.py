"""Shards behind an address: s3://, gs://, https:// and whatever else fsspec knows.

Every request has a deadline, is tried again a few times with growing pauses, and ends in an OSError that names
the address: a host that accepts and never answers costs minutes, not the run. HTTP is spoken here, through
fsspec's session, because only the status of an answer tells whether a server took notice of a range.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import io
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Expired
from typing import IO, Any, TypeVar

from dataload.remote import http
from dataload.remote.address import Facts, NoRanges, Remote, bare

T = TypeVar("T")
BLOCK = 8 << 20
"""bytes of one request; they have to come within the deadline"""
TAIL = 16 << 10
"""bytes at the end of a tar that tell one from another of the same size"""
RETRIES = 3
_PAUSE = 0.5  # seconds before the second try; doubles
_NEEDS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_filesystems: dict[tuple[int, str], Any] = {}


def timeout_default() -> float:
    """Seconds for a connection, for an answer, and for each 8 MiB: AURORAIO_TIMEOUT, or 60."""
    return float(os.environ.get("AURORAIO_TIMEOUT") or 60)


def facts(address: Remote, timeout: float) -> Facts:
    """Size and state of a file. Raises FileNotFoundError, or OSError naming the address."""
    if address.protocol in ("http", "https"):
        return _request(address, "asking for its size", timeout, lambda fs: http.facts(fs, address.url))
    info = _request(address, "asking for its size", timeout, lambda fs: _call(fs, "info", _path(fs, address)))
    return facts_of(address, info)


def facts_of(address: Remote, info: dict[str, Any]) -> Facts:
    """The same from an entry of a listing."""
    if info.get("size") is None or info.get("type") == "directory":
        raise OSError(f"{address.shown}: the server does not say how large it is, or it is a folder")
    named = next(
        (info[key] for key in ("ETag", "etag", "md5Hash", "checksum", "ukey") if info.get(key)), None
    )
    stamp = named or next(
        (
            info[key]
            for key in ("LastModified", "mtime", "updated", "last_modified", "created")
            if info.get(key)
        ),
        "",
    )
    return Facts(int(info["size"]), str(stamp).strip('"'), True)


def read(address: Remote, start: int, end: int, timeout: float) -> bytes:
    """Bytes start .. end of a file, at most BLOCK of them. Raises OSError where there are fewer, NoRanges
    where the server gives no parts."""

    def once(fs: Any) -> Coroutine[Any, Any, bytes]:
        if address.protocol in ("http", "https"):
            return http.read(fs, address.url, start, end)
        return _call(fs, "cat_file", _path(fs, address), start=start, end=end)

    data = _request(address, f"reading bytes {start} to {end}", timeout, once)
    if len(data) != end - start:
        raise OSError(f"{address.shown}: {len(data)} bytes came where {end - start} were asked for")
    return data


def read_all(address: Remote, start: int, size: int, timeout: float) -> bytes:
    """`size` bytes from `start`, in as many requests as that takes."""
    return b"".join(
        read(address, at, min(at + BLOCK, start + size), timeout) for at in range(start, start + size, BLOCK)
    )


def stream(address: Remote, size: int, file: IO[bytes], timeout: float) -> None:
    """All of a file from a server that gives no parts; tried again from the start when it breaks."""

    _request(
        address, "reading it", timeout, lambda fs: http.stream(fs, address.url, size, file),
        patience=size / (BLOCK / timeout),
    )  # fmt: skip


def small_file(address: Remote, timeout: float, limit: int = 1 << 28) -> bytes | None:
    """All of a small file beside a shard, or None where there is none (or no permission to see it)."""
    try:
        said = facts(address, timeout)
        if said.size > limit:
            return None
        try:
            return read_all(address, 0, said.size, timeout)
        except NoRanges:
            buffer = io.BytesIO()
            stream(address, said.size, buffer, timeout)
            return buffer.getvalue()
    except (FileNotFoundError, PermissionError):
        return None


def tail_of(read_part: Callable[[int, int], bytes], size: int) -> str:
    """SHA-256 of a tar's last bytes: whether an index from elsewhere belongs to it."""
    return hashlib.sha256(read_part(max(0, size - TAIL), size)).hexdigest()


def find(pattern: str, timeout: float) -> list[Remote]:
    """The files that an address names: a glob (where the server can list), a folder of tars, or the file
    itself, which is not looked for yet."""
    address = Remote(pattern)
    if any(mark in address.name or mark in bare(pattern) for mark in "*["):
        found = _request(address, "listing it", timeout, lambda fs: _call(fs, "glob", _path(fs, address)))
        return _sorted(address, [name for name in found if fnmatch.fnmatch(str(name), "*.tar")] or found)
    if address.name.endswith(".tar"):
        return [address]
    try:
        # A web server lists a folder only where its address ends with a slash.
        slash = "/" if address.protocol in ("http", "https") else ""
        listed = _request(
            address,
            "listing it",
            timeout,
            lambda fs: _call(fs, "ls", _path(fs, address).rstrip("/") + slash, detail=False),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no shard at {address.shown}") from None
    tars = [str(name) for name in listed if bare(str(name)).endswith(".tar")]
    if not tars and not pattern.endswith("/"):
        return [address]
    return _sorted(address, tars)


def listing(folder: Remote, timeout: float) -> dict[str, Facts]:
    """Facts of all files of a folder by name: one request instead of thousands. Empty where it cannot be
    listed."""
    try:
        entries = _request(
            folder, "listing it", timeout, lambda fs: _call(fs, "ls", _path(fs, folder), detail=True)
        )
        result = {}
        for entry in entries:
            name = str(entry["name"]).rsplit("/", 1)[-1]
            if entry.get("type") == "file" and entry.get("size") is not None:
                result[name] = facts_of(folder, entry)
        return result
    except OSError:
        return {}


def _sorted(address: Remote, names: list[Any]) -> list[Remote]:
    if not names:
        raise FileNotFoundError(f"no shard at {address.shown}")
    prefix = "" if address.protocol in ("http", "https") else f"{address.protocol}://"
    return sorted((Remote(prefix + str(name)) for name in names), key=lambda one: one.url)


# ---- requests ----------------------------------------------------------------------------------------------


def _filesystem(address: Remote, timeout: float) -> Any:
    """One per process and protocol: fsspec's own cache has one per thread, each with its connections."""
    key = (os.getpid(), f"{address.protocol} {timeout}")
    if key not in _filesystems:  # no lock, which a fork could leave locked: at worst there are two
        _filesystems[key] = _new_filesystem(address, timeout)
    return _filesystems[key]


def _new_filesystem(address: Remote, timeout: float) -> Any:
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        if address.protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options["client_kwargs"] = {"timeout": limits}
        elif address.protocol in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1},
            }  # fmt: skip
        return fsspec.filesystem(address.protocol, **options)
    except ImportError as error:
        package = _NEEDS.get(address.protocol, "another package")
        raise ImportError(
            f"{address.protocol}:// needs {package}: pip install 'auroraio[cloud]' ({error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{address.shown}: {error}") from None


def _path(fs: Any, address: Remote) -> str:
    return str(fs._strip_protocol(address.url))


async def _call(fs: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a filesystem: awaited where it is asynchronous, in a thread of its own where it is not (a
    pool's threads would keep a process alive that hangs in one)."""
    if fs.async_impl:
        return await getattr(fs, f"_{name}")(*args, **kwargs)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def work() -> None:
        result, error = None, None
        try:
            result = getattr(fs, name)(*args, **kwargs)
        except BaseException as raised:
            error = raised
        loop.call_soon_threadsafe(_settle, future, result, error)

    threading.Thread(target=work, daemon=True, name="dataload-remote").start()
    return await future


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _request(
    address: Remote,
    what: str,
    timeout: float,
    make: Callable[[Any], Coroutine[Any, Any, T]],
    patience: float = 0.0,
) -> T:
    """Runs make(filesystem) with a deadline of timeout + patience seconds, a few times where it fails."""
    from fsspec.asyn import get_loop

    last = ""
    for attempt in range(1 + RETRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1) * random.uniform(0.8, 1.2))
        fs = _filesystem(address, timeout)
        future: Future[T] = asyncio.run_coroutine_threadsafe(make(fs), get_loop())
        try:
            return future.result(timeout + patience)
        except (TimeoutError, Expired):
            said = future.done() and str(future.exception())
            future.cancel()
            last = said or f"no answer within {timeout + patience:g} s"
        except (FileNotFoundError, NoRanges, NotADirectoryError):
            raise
        except PermissionError as error:
            raise PermissionError(f"{address.shown}: {what}: {_said(error, address)}") from None
        except Exception as error:
            last = _said(error, address)
            status = getattr(error, "status", None)
            if status in (401, 403):
                raise PermissionError(f"{address.shown}: {what}: {last}") from None
            fatal = status is not None and 400 <= status < 500 and status not in (408, 429)
            if fatal or type(error).__name__ in ("NoCredentialsError", "NotImplementedError"):
                raise OSError(f"{address.shown}: {what}: {last}") from None
    raise OSError(f"{address.shown}: {what} failed {1 + RETRIES} times; the last time: {last}")


def _said(error: Exception, address: Remote) -> str:
    """What an error says, without what must not be in a log."""
    text = f"{type(error).__name__}: {error}"
    return text.replace(address.url, address.shown).replace(address.url[len(bare(address.url)) :] or "\0", "")
