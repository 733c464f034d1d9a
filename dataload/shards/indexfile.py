"""The index of a shard as a file: NAME.tar.index, made for opening thousands of them at once.

    8 bytes   "AURORAIX"
    16 bytes  version, length of the head, n, CRC-32 of head and flags (little-endian uint32)
    head      JSON: size and stamp of the tar, how long the parts are, the digest, problems, ignored
    flags     uint8 [n]
    table     key_ends, file_ends (uint32), kinds (uint16), offsets, sizes (int64), keys

Opening reads head and flags, a few kilobytes; the table, a hundred times as much, is read when a sample of the
shard is first asked for. Each has a checksum. Whatever does not fit (a foreign file, a cut one, a flipped bit,
another version) is no index: None, and the caller makes a new one.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload.files import write_atomically
from dataload.shards.tarindex import Scanned, Table

SUFFIX = ".index"
VERSION = 2
_MAGIC = b"AURORAIX"
_START = struct.Struct("<8sIIII")
_FIRST_READ = 1 << 14  # as much as a shard of 10,000 samples has before its table
_MAX_HEAD = 1 << 28
_DTYPES = ("<u4", "<u4", "<u2", "<i8", "<i8")


@dataclass(frozen=True, eq=False)
class Head:
    """What is known of a shard before its table is read."""

    size: int
    """bytes of the tar"""
    stamp: str
    """what changes when the tar changes: its time, or a server's ETag"""
    tail: str
    """SHA-256 of the tar's last bytes (see dataload.remote)"""
    flags: np.ndarray
    """uint8 [n], see tarindex"""
    files: int
    key_bytes: int
    table_at: int
    """where the table starts in the index file"""
    table_crc: int
    extensions: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    ignored: dict[str, int]
    digest: str

    @property
    def lengths(self) -> tuple[int, ...]:
        """Bytes of each part of the table."""
        n, m = len(self.flags), self.files
        return 4 * n, 4 * n, 2 * m, 8 * m, 8 * m, self.key_bytes


def pack(scanned: Scanned, stamp: str, tail: str) -> bytes:
    """The file's contents."""
    table = scanned.table
    parts = [
        array.astype(dtype, copy=False).tobytes()
        for array, dtype in zip(table.arrays(), _DTYPES, strict=True)
    ]
    body = b"".join([*parts, table.keys])
    flags = scanned.flags.tobytes()
    content = {
        "size": scanned.size, "stamp": stamp, "tail": tail,
        "files": len(table.kinds), "key_bytes": len(table.keys), "table_crc": zlib.crc32(body),
        "extensions": table.extensions, "problems": scanned.problems, "ignored": scanned.ignored,
        "digest": scanned.digest,
    }  # fmt: skip
    head = json.dumps(content, separators=(",", ":")).encode()
    crc = zlib.crc32(flags, zlib.crc32(head))
    return _START.pack(_MAGIC, VERSION, len(head), len(flags), crc) + head + flags + body


def write(path: Path, data: bytes) -> bool:
    """Writes an index in one step; False where the folder cannot be written to."""
    try:
        write_atomically(path, data)
    except OSError:
        return False
    return True


def read_head(path: Path) -> Head | None:
    """Head and flags, or None where this is no whole index."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        size = os.fstat(file).st_size
        data = os.read(file, _FIRST_READ)
        if len(data) < _START.size:
            return None
        _, _, length, samples, _ = _START.unpack_from(data)
        wanted = min(size, _START.size + length + samples, _MAX_HEAD)
        while len(data) < wanted and (more := os.read(file, wanted - len(data))):
            data += more
        return unpack_head(data, size)
    except OSError:
        return None
    finally:
        os.close(file)


def unpack_head(data: bytes, size: int) -> Head | None:
    """Head and flags from the first bytes of an index file of `size` bytes, or None."""
    try:
        magic, version, length, samples, crc = _START.unpack_from(data)
        if magic != _MAGIC or version != VERSION or _START.size + length > len(data):
            return None
        raw = data[_START.size : _START.size + length]
        content: dict[str, Any] = json.loads(raw)
        end = _START.size + length + samples
        flags = data[_START.size + length : end]
        if len(flags) != samples or zlib.crc32(flags, zlib.crc32(raw)) != crc:
            return None
        head = Head(
            size=content["size"],
            stamp=content["stamp"],
            tail=content["tail"],
            flags=np.frombuffer(flags, dtype=np.uint8),
            files=content["files"],
            key_bytes=content["key_bytes"],
            table_at=end,
            table_crc=content["table_crc"],
            extensions=tuple(content["extensions"]),
            problems=tuple((key, reason) for key, reason in content["problems"]),
            ignored=content["ignored"],
            digest=content["digest"],
        )
        return head if head.table_at + sum(head.lengths) == size else None
    except (ValueError, KeyError, TypeError, struct.error, RecursionError):
        return None


def read_table(path: Path, head: Head) -> Table | None:
    """The table that belongs to `head`, or None where the file has changed or is damaged."""
    try:
        with open(path, "rb") as file:
            file.seek(head.table_at)
            data = file.read(sum(head.lengths) + 1)
    except OSError:
        return None
    return unpack_table(data, head)


def unpack_table(data: bytes, head: Head) -> Table | None:
    """The table from its bytes, or None where they are not whole or do not fit the tar."""
    if len(data) != sum(head.lengths) or zlib.crc32(data) != head.table_crc:
        return None
    arrays = []
    at = 0
    for length, dtype in zip(head.lengths, _DTYPES, strict=False):
        arrays.append(np.frombuffer(data, dtype=dtype, offset=at, count=length // np.dtype(dtype).itemsize))
        at += length
    key_ends, file_ends, kinds, offsets, sizes = arrays
    table = Table(data[at:], key_ends, file_ends, kinds, offsets, sizes, head.extensions)
    return table if _sound(table, head) else None


def _sound(table: Table, head: Head) -> bool:
    """Whether no number in it points out of the table or the tar (a checksum is no proof of good will)."""
    for ends, total in ((table.key_ends, head.key_bytes), (table.file_ends, head.files)):
        if len(ends) and (int(ends[-1]) != total or (np.diff(ends.astype(np.int64), prepend=0) < 0).any()):
            return False
    if not len(table.kinds):
        return True
    inside = (table.offsets >= 0) & (table.sizes >= 0) & (table.sizes <= head.size - table.offsets)
    return int(table.kinds.max()) < len(table.extensions) and bool(inside.all())
