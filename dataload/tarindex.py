"""One pass over a tar shard: where each sample's files lie, and which samples have captions. Cached beside
the tar.

Layout of a sample (img2dataset, WebDataset): files KEY.EXTENSION, where KEY ends at the first dot of the
file's name: one picture, and a caption in KEY.txt, or in KEY.json as "caption" (a string) or "captions" (a
list), or in both. Nothing is unpacked to disk, so the names inside are labels and never paths.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataload.files import write_atomically

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp dib tif tiff avif jp2 j2k jpx ppm pgm pbm pnm tga ico qoi".split()
)
VERSION = 1
_NAME = re.compile(r"^((?:.*/|)[^./]+)\.([^/]*)$", re.DOTALL)  # WebDataset's rule for key and extension
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class BrokenShard(ValueError):
    """The file holds no whole sample: it is no tar, is compressed, or is damaged from the start."""


@dataclass(frozen=True)
class Shard:
    """The index of one tar with n samples, in the order of their first file."""

    path: Path
    size: int
    """bytes of the tar"""
    keys: tuple[str, ...]
    members: np.ndarray
    """int64 [n, 6]: offset and size of the picture, the txt, the json; size -1 where the file is not there or
    adds no caption to the other"""
    captioned: np.ndarray
    """bool [n]"""
    problems: tuple[tuple[str, str], ...]
    """(key, reason) for everything that was left out or is suspect"""
    ignored: dict[str, int]
    """files that belong to no picture-caption sample, counted by extension"""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        """The file's name without ".tar"."""
        return self.path.name.removesuffix(".tar")


def load_shard(path: Path) -> Shard:
    """The index of a tar, from NAME.tar.index.json if that fits the tar's size and time, or else from one
    pass.

    The cache is written atomically; where it cannot be written, the index stays in memory. A tar that is cut
    short or damaged keeps the samples that are whole; the damage is in `problems`. Raises BrokenShard when no
    sample is whole, FileNotFoundError when there is no file.
    """
    status = path.stat()
    cache = path.with_name(path.name + ".index.json")
    cached = _read_cache(cache, path, status)
    if cached is not None:
        return cached
    shard = scan(path)
    _write_cache(cache, shard, status)
    return shard


@dataclass
class _Files:
    """(offset, size) of the files of one sample while the tar is read."""

    image: tuple[int, int] | None = None
    txt: tuple[int, int] | None = None
    json: tuple[int, int] | None = None


@dataclass
class _Scan:
    samples: dict[str, _Files] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    last_key: str | None = None


def scan(path: Path) -> Shard:
    """Indexes a tar without looking at or writing a cache; errors as in `load_shard`."""
    size = path.stat().st_size
    found = _Scan()
    with open(path, "rb") as file:
        _refuse_compressed(path, file)
        damage = _read_headers(file, size, found)
        if damage and found.last_key is not None:
            # Its other files may be behind the damage: a pair that lost its caption must not pass as
            # uncaptioned.
            del found.samples[found.last_key]
            found.problems.append((found.last_key, f"left out, the tar is damaged here: {damage}"))
        elif damage:
            raise BrokenShard(f"{path}: {damage}")
        return _finish(path, size, found, file)


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    start = file.read(6)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            raise BrokenShard(
                f"{path} is compressed ({kind}); samples are read by offset, which needs a plain tar"
            )
    file.seek(0)


def _read_headers(file: BinaryIO, size: int, found: _Scan) -> str | None:
    """Collects the members; returns what is damaged, or None. (tarfile itself ends quietly at a bad
    header.)"""
    if size == 0:
        return "the file is empty"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                if member.offset_data + member.size > size:
                    found.last_key = _key_of(member.name) or found.last_key
                    found.samples.setdefault(found.last_key or member.name, _Files())
                    return f"{member.name} is cut short by the end of the file"
                _add(member, found)
            end = tar.offset
    except tarfile.TarError as error:
        return f"no readable tar header ({error})"
    file.seek(end)
    rest = file.read(_BLOCK)
    if any(rest):
        return f"no readable tar header at byte {end}"
    # tarfile takes a missing end mark for an end, but a download that stopped between two files looks like
    # this.
    return None if len(rest) == _BLOCK else "the file ends without the end mark of a tar"


def _key_of(name: str) -> str | None:
    match = _NAME.match(name)
    return match[1] if match else None


def _add(member: tarfile.TarInfo, found: _Scan) -> None:
    if member.isdir():
        return
    match = _NAME.match(member.name)
    if not member.isreg() or member.issparse():
        found.problems.append(
            (member.name, "left out: neither a plain file nor a folder (a link or a device)")
        )
        return
    if match is None:
        found.ignored["(no key)"] += 1
        return
    key, extension = match[1], match[2].lower()
    place = (member.offset_data, member.size)
    kind = "image" if extension in IMAGE_EXTENSIONS else extension
    if kind not in ("image", "txt", "json"):
        found.ignored[extension] += 1
        return
    files = found.samples.setdefault(key, _Files())
    found.last_key = key
    if getattr(files, kind) is None:
        setattr(files, kind, place)
    else:
        found.problems.append((key, f"a second {kind} file ({member.name}) is left out"))


def _finish(path: Path, size: int, found: _Scan, file: BinaryIO) -> Shard:
    keys, rows, captioned = [], [], []
    for key, files in found.samples.items():
        if files.image is None:
            found.problems.append((key, "left out: no picture"))
            continue
        txt, meta = _caption_files(file, key, files, found.problems)
        keys.append(key)
        rows.append((*files.image, *(txt or (0, -1)), *(meta or (0, -1))))
        captioned.append(txt is not None or meta is not None)
    if not keys:
        reasons = "; ".join(f"{key}: {reason}" for key, reason in found.problems[:3])
        others = ", ".join(f"{count} .{extension}" for extension, count in found.ignored.most_common(5))
        raise BrokenShard(
            f"{path} holds no picture. {reasons or 'Its files: ' + (others or 'none')}. "
            "Expected are files KEY.jpg (or .png, .webp ...) with KEY.txt and/or KEY.json."
        )
    members = np.array(rows, dtype=np.int64).reshape(-1, 6)
    problems = tuple(found.problems)
    return Shard(
        path, size, tuple(keys), members, np.array(captioned, dtype=bool), problems, dict(found.ignored)
    )


def _caption_files(
    file: BinaryIO, key: str, files: _Files, problems: list[tuple[str, str]]
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Which of txt and json must be read for all captions: a file that adds none to the other is dropped."""
    from_txt: list[str] = []
    from_json: list[str] = []
    if files.txt is not None:
        data = _read(file, files.txt)
        from_txt = txt_captions(data)
        if b"\xef\xbf\xbd" not in data and any("\ufffd" in text for text in from_txt):
            problems.append((key, "the txt is not UTF-8; what is not is replaced"))
    if files.json is not None:
        try:
            from_json = json_captions(_read(file, files.json))
        except ValueError as error:
            problems.append((key, f"the json is not used: {error}"))
    if from_txt and from_json in ([], from_txt):
        return files.txt, None
    if from_json and from_txt in ([], *([text] for text in from_json)):
        return None, files.json
    return (files.txt if from_txt else None), (files.json if from_json else None)


def _read(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def txt_captions(data: bytes) -> list[str]:
    """The caption of a KEY.txt: all of it, or none where it is blank. Bytes that are not UTF-8 become
    U+FFFD."""
    text = data.decode("utf-8", "replace").strip().removeprefix("\ufeff")
    return [text] if text else []


def json_captions(data: bytes) -> list[str]:
    """The captions of a KEY.json: "captions" (a list of strings), then "caption" (a string) if it is new.

    Blank ones do not count; one that is in the list twice is a caption twice, as people may have written it.
    Half a surrogate pair, which only JSON can spell, becomes "?". Raises ValueError where it is no JSON
    object, or where these have another type (null is none).
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, not an object")
    many, one = content.get("captions"), content.get("caption")
    if many is not None and not (isinstance(many, list) and all(isinstance(text, str) for text in many)):
        raise ValueError('"captions" is not a list of strings')
    if one is not None and not isinstance(one, str):
        raise ValueError('"caption" is not a string')
    texts = [_clean(text) for text in many or []]
    if one is not None and _clean(one) not in texts:
        texts.append(_clean(one))
    return [text for text in texts if text]


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode().strip()


def _read_cache(cache: Path, path: Path, status: os.stat_result) -> Shard | None:
    """The cached index, or None where there is none, it belongs to another state of the tar, or it is
    unreadable."""
    try:
        content = json.loads(cache.read_bytes())
        made_for = content["version"], content["size"], content["mtime_ns"]
        if made_for != (VERSION, status.st_size, status.st_mtime_ns):
            return None
        return Shard(
            path=path,
            size=content["size"],
            keys=tuple(content["keys"]),
            members=np.array(content["members"], dtype=np.int64).reshape(-1, 6),
            captioned=np.array(content["captioned"], dtype=bool),
            problems=tuple((key, reason) for key, reason in content["problems"]),
            ignored=content["ignored"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(cache: Path, shard: Shard, status: os.stat_result) -> None:
    content: dict[str, Any] = {
        "version": VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "problems": shard.problems,
        "ignored": shard.ignored,
        "captioned": shard.captioned.astype(int).tolist(),
        "keys": shard.keys,
        "members": shard.members.tolist(),
    }
    try:
        write_atomically(cache, json.dumps(content, separators=(",", ":")).encode())
    except OSError:
        pass  # a folder that cannot be written to is fine: the index stays in memory


def iterate_problems(shards: tuple[Shard, ...]) -> Iterator[tuple[str, str, str]]:
    """(shard path, key, reason) of everything that was left out or is suspect."""
    for shard in shards:
        for key, reason in shard.problems:
            yield str(shard.path), key, reason
