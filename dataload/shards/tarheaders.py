"""The headers of a tar, one after another, read with suspicion.

A shard may come from anywhere, so that nothing in a header is believed before it is checked: a size is never
negative and never beyond the file's end, a name is never absolute and never climbs with "..", and no header
makes this read more than a megabyte. Links, devices and sparse files are given with the reason why they are
refused. Nothing is unpacked. Reads USTAR, GNU (long names, sizes in base 256) and PAX.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

BLOCK = 512
MAX_NAME = 4096
"""bytes of a member's name"""
MAX_EXTENDED = 1 << 20
"""bytes of one PAX header or long name that are read"""
MAX_HEADERS = 4_000_000
"""headers in one tar"""
_ZEROS = bytes(BLOCK)
_REGULAR = (b"0", b"\0", b"7")
_REFUSED = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
    b"S": "a sparse file", b"M": "a part of a file in another tar",
}  # fmt: skip
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # their size says nothing about the bytes that follow
_ABOUT_OTHERS = (b"L", b"K", b"x", b"X", b"g")
_NOT_PLAIN = "neither a plain file nor a folder"


class DamagedTar(ValueError):
    """The headers cannot be followed any further. `name`: the member that is cut short, where it is known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


@dataclass(slots=True)
class Member:
    """One file of a tar. `refused` says why it must not be used; empty for a plain file."""

    name: str
    offset: int
    """of its contents"""
    size: int
    refused: str = ""


@dataclass(slots=True)
class _Extended:
    """What the headers in front of a member say about it."""

    name: bytes | None = None
    size: int | None = None
    refused: str = ""


@dataclass(slots=True)
class _Walk:
    at: int = 0
    pending: _Extended = field(default_factory=_Extended)
    for_all: str = ""
    """why every member from here on is refused"""


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The files of a tar of `size` bytes in order, folders left out; those that are refused too.

    Raises DamagedTar, after the members before the damage, where a header is unreadable, a member is cut
    short, the end mark is missing, or there are more than MAX_HEADERS headers.
    """
    if size == 0:
        raise DamagedTar("the file is empty")
    walk = _Walk()
    for _ in range(MAX_HEADERS):
        file.seek(walk.at)
        block = file.read(BLOCK)
        if block == _ZEROS:
            return
        if not block:
            # A download that stopped between two files looks like this.
            raise DamagedTar("the file ends without the end mark of a tar")
        member = _next(file, size, block, walk)
        if member is not None:
            yield member
    raise DamagedTar(f"more than {MAX_HEADERS:,} headers in one tar")


def _next(file: BinaryIO, size: int, block: bytes, walk: _Walk) -> Member | None:
    """The member whose header is `block`, or None for a folder and for headers about other headers."""
    here = walk.at
    if len(block) < BLOCK or not checksum_fits(block):
        raise DamagedTar(f"no readable tar header at byte {here}")
    kind = block[156:157]
    try:
        length = number(block[124:136])
    except ValueError as error:
        raise DamagedTar(f"no readable tar header at byte {here} ({error})") from None
    if kind in _ABOUT_OTHERS:
        _extend(file, size, kind, here + BLOCK, length, walk)
        return None
    pending, walk.pending = walk.pending, _Extended()
    raw = _name(block) if pending.name is None else pending.name
    name = raw.decode("utf-8", "surrogateescape")
    length = length if pending.size is None else pending.size
    start = here + BLOCK
    if kind == b"S":
        start = _behind_sparse_blocks(file, size, block, start)
    folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
    if folder or kind in _NO_DATA:
        length = 0
    if start + length > size:
        raise DamagedTar(f"{_shown(name)} is cut short by the end of the file", name)
    walk.at = start + _padded(length)
    if folder:
        return None
    refused = walk.for_all or pending.refused or _why_not(kind, name, len(raw))
    return Member(_shown(name) if refused else name, start, length, refused)


def _why_not(kind: bytes, name: str, length: int) -> str:
    if kind not in _REGULAR:
        what = _REFUSED.get(kind, f"type {kind!r}")
        return f"{_NOT_PLAIN} ({what})"
    if length > MAX_NAME:
        return f"its name has {length:,} bytes; up to {MAX_NAME:,} are allowed"
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", name):
        return "its name is an absolute path"
    if ".." in name and ".." in re.split(r"[/\\]", name):
        return 'its name climbs out with ".."'
    if re.search(r"[\x00-\x1f\x7f]", name):
        return "its name holds control characters"
    return ""


def _shown(name: str) -> str:
    """For reports: no control characters, and not endless."""
    safe = re.sub(r"[\x00-\x1f\x7f]", "?", name)
    return safe if len(safe) <= 200 else f"{safe[:200]}..."


def _extend(file: BinaryIO, size: int, kind: bytes, start: int, length: int, walk: _Walk) -> None:
    """Notes what a header about the next one (or, type g, about all that follow) says."""
    if start + length > size:
        raise DamagedTar(f"a header at byte {start - BLOCK} is cut short by the end of the file")
    walk.at = start + _padded(length)
    if length > MAX_EXTENDED:
        why = f"a header of {length:,} bytes belongs to it; up to {MAX_EXTENDED:,} are read"
        walk.pending.refused = why
        walk.for_all = why if kind == b"g" else walk.for_all
        return
    if kind == b"K":  # the target of a link, which is refused anyway
        return
    file.seek(start)
    data = file.read(length)
    if kind == b"L":
        walk.pending.name = data.split(b"\0", 1)[0]
        return
    try:
        records = _pax(data)
        claimed = _decimal(records[b"size"]) if b"size" in records else None
    except ValueError as error:
        why = f"its PAX header is malformed ({error})"
        walk.pending.refused = why
        walk.for_all = why if kind == b"g" else walk.for_all
        return
    sparse = any(key.startswith(b"GNU.sparse.") for key in records)
    if kind == b"g":
        if sparse or claimed is not None or b"path" in records:
            walk.for_all = "a global PAX header speaks of names or sizes"
        return
    walk.pending.name = records.get(b"path", walk.pending.name)
    walk.pending.size = claimed
    if sparse:
        walk.pending.refused = f"{_NOT_PLAIN} (a sparse file)"


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a PAX header."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        space = data.find(b" ", at, at + 12)
        if space < 0:
            raise ValueError(f"no length at byte {at}")
        length = _decimal(data[at:space])
        record = data[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if space + 2 > at + length or at + length > len(data) or not equals or not value.endswith(b"\n"):
            raise ValueError(f"no record at byte {at}")
        records[key] = value[:-1]
        at += length
    return records


def _decimal(text: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise ValueError(f"{text[:20]!r} is no size")
    return int(text)


def number(field: bytes) -> int:
    """A number of a header: octal digits, or base 256 where the first bit is set. ValueError for others."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError("a negative number")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", text):
        raise ValueError(f"{text[:12]!r} is no number")
    return int(text or b"0", 8)


def checksum_fits(block: bytes) -> bool:
    """Whether a header of 512 bytes has the checksum that it says; old tars sum signed bytes."""
    try:
        said = number(block[148:156])
    except ValueError:
        return False
    bare = block[:148] + b" " * 8 + block[156:]
    return said == sum(bare) or said == sum(bare) - 256 * sum(byte > 127 for byte in bare)


def is_header_of(block: bytes, size: int) -> bool:
    """Whether these 512 bytes are a header of a file of `size` bytes (or of one whose size stands elsewhere)."""
    return len(block) == BLOCK and checksum_fits(block) and number(block[124:136]) in (size, 0)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # GNU's magic is "ustar  ": it keeps other things where the prefix is
        prefix = block[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _behind_sparse_blocks(file: BinaryIO, size: int, block: bytes, start: int) -> int:
    """Where the contents of a GNU sparse file begin: its map may go on in more blocks."""
    more = block[482]
    while more:
        file.seek(start)
        block = file.read(BLOCK)
        start += BLOCK
        if len(block) < BLOCK or start > size:
            raise DamagedTar("the map of a sparse file is cut short by the end of the file")
        more = block[504]
    return start


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
