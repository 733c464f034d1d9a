"""One pass over a tar shard: where each sample's files lie, and which samples have captions.

Layout of a sample (img2dataset, WebDataset): files KEY.EXTENSION, where KEY ends at the first dot of the
file's name: at least one picture, sound or video; a caption in KEY.txt, or in KEY.json as "caption" (a
string) or "captions" (a list), or in both; and anything else. Nothing is unpacked to disk, so that the names
inside are labels and never paths. The index is kept beside the tar (indexfile.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from dataload.captions import json_captions, txt_captions
from dataload.shards import tarheaders

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp dib tif tiff avif avifs jp2 j2k j2c jpc jpf jpx ppm pgm pbm pnm pfm tga icb "
    "vda vst ico icns cur qoi psd pcx dcx sgi rgb rgba bw dds blp fit fits fli flc ftc ftu gbr im "
    "msp pcd pxr ras xbm xpm".split()
)
AUDIO_EXTENSIONS = frozenset("wav flac mp3 ogg oga opus m4a aac aif aiff aifc wma amr ac3 au caf".split())
VIDEO_EXTENSIONS = frozenset("mp4 m4v mkv webm mov avi mpg mpeg ts m2ts wmv flv 3gp ogv y4m".split())
MEDIA = ("image", "audio", "video")
KINDS = (*MEDIA, "txt", "json")
_NAMES = {"image": "picture", "audio": "sound", "video": "video", "txt": "txt", "json": "json"}
KIND_OF = {
    **dict.fromkeys(IMAGE_EXTENSIONS, "image"),
    **dict.fromkeys(AUDIO_EXTENSIONS, "audio"),
    **dict.fromkeys(VIDEO_EXTENSIONS, "video"),
    "txt": "txt",
    "json": "json",
}
BIT = {kind: 1 << place for place, kind in enumerate(KINDS)}
"""bit of `flags` that says whether a sample has a file of that kind"""
TXT_CAPTIONS, JSON_CAPTIONS = 32, 64
"""bits of `flags`: this file has to be read for the captions (a file that adds none to the other has not)"""
CAPTIONED = TXT_CAPTIONS | JSON_CAPTIONS
MAX_TEXT = 16 << 20
"""bytes of a txt or json that are read"""
_PROBLEMS_KEPT = 1000
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$", re.DOTALL)  # WebDataset's rule for key and extension
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class BrokenShard(ValueError):
    """The file holds no whole sample: it is no tar, is compressed, or is damaged from the start."""


@dataclass(frozen=True, eq=False)
class Table:
    """The files of n samples, m in all; those of one sample are neighbours, in the order of the tar."""

    keys: bytes
    """all keys, one after another, UTF-8 (surrogateescape)"""
    key_ends: np.ndarray
    """uint32 [n]"""
    file_ends: np.ndarray
    """uint32 [n]: sample i has the files file_ends[i - 1] .. file_ends[i]"""
    kinds: np.ndarray
    """uint16 [m]: which of `extensions` a file has"""
    offsets: np.ndarray
    """int64 [m]: of the contents, in bytes"""
    sizes: np.ndarray
    """int64 [m]: bytes"""
    extensions: tuple[str, ...]

    def key(self, row: int) -> str:
        """Key of a sample."""
        start = int(self.key_ends[row - 1]) if row else 0
        return self.keys[start : int(self.key_ends[row])].decode("utf-8", "surrogateescape")

    def files(self, row: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of a sample's files."""
        start, end = (int(self.file_ends[row - 1]) if row else 0), int(self.file_ends[row])
        names = [self.extensions[kind] for kind in self.kinds[start:end].tolist()]
        return list(zip(names, self.offsets[start:end].tolist(), self.sizes[start:end].tolist(), strict=True))

    def find(self, row: int, kind: str) -> tuple[int, int] | None:
        """(offset, size) of a sample's first file of a kind."""
        for file in range(int(self.file_ends[row - 1]) if row else 0, int(self.file_ends[row])):
            if KIND_OF.get(self.extensions[self.kinds[file]].lower()) == kind:
                return int(self.offsets[file]), int(self.sizes[file])
        return None

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays, in the order in which they are stored."""
        return self.key_ends, self.file_ends, self.kinds, self.offsets, self.sizes


@dataclass(frozen=True, eq=False)
class Scanned:
    """What one pass over a tar found: n samples, in the order of their first file."""

    size: int
    """bytes of the tar"""
    flags: np.ndarray
    """uint8 [n]: BIT of each kind of file, TXT_CAPTIONS, JSON_CAPTIONS"""
    table: Table
    problems: tuple[tuple[str, str], ...]
    """(key, reason) for everything that was left out or is suspect"""
    ignored: dict[str, int]
    """files of no kind that is known here, counted by extension"""
    digest: str
    """SHA-256 of flags and table: what the tar holds, wherever it lies"""


@dataclass
class _Scan:
    rows: dict[str, int] = field(default_factory=dict)
    files: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """per sample: (extension's number, offset, size)"""
    extensions: dict[str, int] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)
    last_key: str | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    unlisted: int = 0

    def problem(self, key: str, reason: str) -> None:
        """Notes one; only the first thousand of a shard are kept, the others are counted."""
        if len(self.problems) < _PROBLEMS_KEPT:
            self.problems.append((key, reason))
        else:
            self.unlisted += 1


def scan(file: BinaryIO, size: int, name: str) -> Scanned:
    """Indexes an open tar of `size` bytes; `name` is for messages.

    A tar that is cut short or damaged keeps the samples that are whole; the damage is in `problems`. Raises
    BrokenShard where no sample is whole.
    """
    found = _Scan()
    _refuse_compressed(name, file)
    damage = _read_headers(file, size, found)
    if damage and found.last_key is not None:
        # Its other files may be behind the damage: a pair that lost its caption must not pass as uncaptioned.
        found.files[found.rows[found.last_key]].clear()
        found.problem(found.last_key, f"left out, the tar is damaged here: {damage}")
    elif damage:
        raise BrokenShard(f"{name}: {damage}")
    return _finish(name, size, found, file, found.last_key if damage else None)


def _refuse_compressed(name: str, file: BinaryIO) -> None:
    file.seek(0)
    start = file.read(6)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise BrokenShard(
                f"{name} is compressed ({kind}); samples are read by offset, which needs a plain tar"
            )


def _read_headers(file: BinaryIO, size: int, found: _Scan) -> str | None:
    """Collects the members; returns what is damaged, or None."""
    try:
        for member in tarheaders.members(file, size):
            _add(member, found)
    except tarheaders.DamagedTar as damage:
        match = _NAME.match(damage.name)
        if match:
            found.last_key = match[1]
            _row(match[1], found)
        return str(damage)
    return None


def _row(key: str, found: _Scan) -> int:
    row = found.rows.setdefault(key, len(found.files))
    if row == len(found.files):
        found.files.append([])
    return row


def _add(member: tarheaders.Member, found: _Scan) -> None:
    if member.refused:
        found.problem(member.name, f"left out: {member.refused}")
        return
    match = _NAME.match(member.name)
    if match is None:
        found.ignored["(no key)"] += 1
        return
    key, extension = match[1], match[2]
    kind = KIND_OF.get(extension.lower())
    if kind is None:
        found.ignored[extension.lower()] += 1
    else:
        found.last_key = key
    number = found.extensions.setdefault(extension, len(found.extensions))
    if number > 0xFFFF:
        raise tarheaders.DamagedTar("more than 65,536 different extensions")
    files = found.files[_row(key, found)]
    if any(number == other for other, _, _ in files):
        found.problem(key, f"a second {kind or extension} file of the same name ({member.name}) is left out")
    else:
        files.append((number, member.offset, member.size))


def _finish(name: str, size: int, found: _Scan, file: BinaryIO, damaged: str | None) -> Scanned:
    kinds = [KIND_OF.get(extension.lower(), "") for extension in found.extensions]
    keys, samples, flags = [], [], []
    for key, row in found.rows.items():
        files = found.files[row]
        if key == damaged:
            continue
        first: dict[str, tuple[int, int]] = {}
        for number, offset, length in files:
            kind = kinds[number]
            if kind and kind in first:
                found.problem(
                    key, f"a second {kind} file ({key}.{list(found.extensions)[number]}) is not used"
                )
            elif kind:
                first[kind] = offset, length
        if not any(kind in first for kind in MEDIA):
            names = ", ".join(f".{list(found.extensions)[number]}" for number, *_ in files[:5])
            found.problem(key, f"left out: no picture, sound or video among its files ({names})")
            continue
        keys.append(key.encode("utf-8", "surrogateescape"))
        samples.append(files)
        flags.append(sum(BIT[kind] for kind in first) | _captions_of(file, key, first, found))
    problems = list(found.problems)
    if found.unlisted:
        problems.append(("", f"{found.unlisted:,} more problems are not listed"))
    if not keys:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in problems[:3])
        others = ", ".join(f"{count} .{extension}" for extension, count in found.ignored.most_common(5))
        raise BrokenShard(
            f"{name} holds no picture, sound or video. {reasons or 'Its files: ' + (others or 'none')}. "
            "Expected are files KEY.jpg (or .png, .flac, .mp4 ...) with KEY.txt and/or KEY.json."
        )
    return _tabulate(size, keys, samples, flags, found, tuple(problems))


def _tabulate(
    size: int,
    keys: list[bytes],
    samples: list[list[tuple[int, int, int]]],
    flags: list[int],
    found: _Scan,
    problems: tuple[tuple[str, str], ...],
) -> Scanned:
    flat = np.array([place for files in samples for place in files], dtype=np.int64).reshape(-1, 3)
    table = Table(
        keys=b"".join(keys),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.uint32),
        file_ends=np.cumsum([len(files) for files in samples], dtype=np.uint32),
        kinds=flat[:, 0].astype(np.uint16),
        offsets=np.ascontiguousarray(flat[:, 1]),
        sizes=np.ascontiguousarray(flat[:, 2]),
        extensions=tuple(found.extensions),
    )
    bits = np.array(flags, dtype=np.uint8)
    ignored = dict(found.ignored.most_common(1000))
    return Scanned(size, bits, table, problems, ignored, digest(bits, table))


def digest(flags: np.ndarray, table: Table) -> str:
    """SHA-256 of what a tar holds: keys, extensions, offsets and sizes of all files, and the flags."""
    summary = hashlib.sha256()
    summary.update(json.dumps([len(flags), len(table.kinds), len(table.keys), *table.extensions]).encode())
    for part in (flags, *table.arrays()):
        summary.update(part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
    summary.update(table.keys)
    return summary.hexdigest()


def _captions_of(file: BinaryIO, key: str, first: dict[str, tuple[int, int]], found: _Scan) -> int:
    """Which of txt and json must be read for all captions: a file that adds none to the other need not."""
    from_txt: list[str] = []
    from_json: list[str] = []
    if "txt" in first:
        data = _read(file, first["txt"])
        if data is None:
            found.problem(key, f"the txt is not used: it is larger than {MAX_TEXT:,} bytes")
        else:
            from_txt = txt_captions(data)
            if b"\xef\xbf\xbd" not in data and any("\ufffd" in text for text in from_txt):
                found.problem(key, "the txt is not UTF-8; what is not is replaced")
    if "json" in first:
        data = _read(file, first["json"])
        try:
            if data is None:
                raise ValueError(f"it is larger than {MAX_TEXT:,} bytes")
            from_json = json_captions(data)
        except ValueError as error:
            found.problem(key, f"the json is not used: {error}")
    if from_txt and from_json in ([], from_txt):
        return TXT_CAPTIONS
    if from_json and from_txt in ([], *([text] for text in from_json)):
        return JSON_CAPTIONS
    return TXT_CAPTIONS * bool(from_txt) | JSON_CAPTIONS * bool(from_json)


def _read(file: BinaryIO, place: tuple[int, int]) -> bytes | None:
    if place[1] > MAX_TEXT:
        return None
    file.seek(place[0])
    return file.read(place[1])
