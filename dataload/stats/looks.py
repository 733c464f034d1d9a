"""What a picture is and looks like: its format and size, a digest of its bytes, and perceptual hashes.

The hashes are imagehash's `phash` (signs of the low frequencies of the grey picture against their median), of 64
and of 256 bits, of the picture and of its mirror image. They are kept in NAME.tar.looks.npz beside a local shard,
so that the next run reads them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataload import images
from dataload.files import write_atomically

VERSION = 1
ABSENT, WHOLE, BROKEN, FLAT = range(4)
"""states: no picture; one to compare; one that cannot be read; one without anything to see (no hash)"""
LOOK = np.dtype(
    [
        ("state", "u1"),
        ("format", "u1"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("digest", "<u8", 2),
        ("hash", "<u8"),
        ("mirrored", "<u8"),
        ("fine", "<u8", 4),
        ("fine_mirrored", "<u8", 4),
    ]
)
SIDE = 64  # of the grey picture that is hashed, as phash of 16 x 16 wants it
DRAFT = 256  # a JPEG is decoded at a reduced scale, but not below this
FLAT_RANGE = 12  # levels of 255: a picture of less contrast has hashes of its noise


@dataclass
class Looks:
    """Looks of the samples of one shard, in their order."""

    rows: np.ndarray
    """LOOK [n]"""
    formats: list[str]
    """names of the numbers in rows["format"]"""
    reasons: dict[int, str]
    """why a picture is broken, by row"""
    hashed: bool


def needs() -> Any:
    """imagehash. Raises ImportError naming the extra."""
    try:
        import imagehash
    except ImportError as error:
        raise ImportError(
            f"comparing pictures needs imagehash: pip install 'auroraio[data]' ({error})"
        ) from None
    return imagehash


def grey(data: bytes, max_pixels: int = images.MAX_PIXELS) -> tuple[Image.Image, str, int, int]:
    """A picture upright in grey, SIDE x SIDE, with its format, width and height. Raises BrokenImage."""
    try:
        image = _open(data, max_pixels)
        kind, turn = image.format or "?", _turn(image)
        width, height = image.size[::-1] if turn in (5, 6, 7, 8) else image.size
        image.draft("RGB", (DRAFT, DRAFT))
        image.load()
        small = images.to_rgb(image).resize((SIDE, SIDE), Image.Resampling.LANCZOS).convert("L")
        # After the resizing, which is square: turned pixels are what a turned picture would have given.
        upright = _UPRIGHT.get(turn)
        return (small if upright is None else small.transpose(upright)), kind, width, height
    except images.BrokenImage:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything for bytes that are no whole picture
        raise images.BrokenImage(f"{type(error).__name__}: {error}") from error


def hashes(small: Image.Image) -> tuple[np.ndarray, np.ndarray] | None:
    """uint64 [1] and uint64 [4]: the hash of 64 bits and that of 256, of a grey picture of SIDE x SIDE. None for
    one without contrast."""
    imagehash = needs()
    if np.ptp(np.asarray(small)) < FLAT_RANGE:  # of uint8: no overflow, as it is high - low
        return None
    coarse, fine = imagehash.phash(small), imagehash.phash(small, hash_size=16)
    return np.packbits(coarse.hash).view("<u8"), np.packbits(fine.hash).view("<u8")


def look(data: bytes, hashed: bool, max_pixels: int = images.MAX_PIXELS) -> tuple[np.void, str]:
    """One row of LOOK without its format, and the format. Raises BrokenImage."""
    row: Any = np.zeros((), dtype=LOOK)[()]
    if hashed:
        small, kind, width, height = grey(data, max_pixels)
        found = hashes(small)
        mirrored = hashes(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        if found is not None and mirrored is not None:
            row["hash"], row["fine"] = found[0][0], found[1]
            row["mirrored"], row["fine_mirrored"] = mirrored[0][0], mirrored[1]
        row["state"] = WHOLE if found is not None else FLAT
    else:
        kind, width, height = _header(data, max_pixels)
        row["state"] = WHOLE
    row["width"], row["height"] = width, height
    row["digest"] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), dtype="<u8")
    return row, kind


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _open(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=images.formats())
    if image.width * image.height > max_pixels:
        raise images.BrokenImage(f"{image.width}x{image.height} is over the limit of {max_pixels} pixels")
    return image


def _turn(image: Image.Image) -> int:
    if image.format not in ("JPEG", "MPO", "PNG", "WEBP"):  # TIFF and AVIF come upright
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF: the pixels are whole
        return 1


def _header(data: bytes, max_pixels: int) -> tuple[str, int, int]:
    try:
        image = _open(data, max_pixels)
        width, height = image.size[::-1] if _turn(image) in (5, 6, 7, 8) else image.size
        return image.format or "?", width, height
    except images.BrokenImage:
        raise
    except Exception as error:
        raise images.BrokenImage(f"{type(error).__name__}: {error}") from error


def of_shard(
    read: Callable[[int], bytes | None],
    count: int,
    *,
    hashed: bool,
    cache: Path | None,
    key: str,
    pool: ThreadPoolExecutor,
    done: Callable[[], None],
) -> Looks:
    """Looks of `count` samples; `read(i)` gives the picture of sample i, or None where it has none.

    `cache`: where they are kept, under `key`, which says of what state of the shard. Raises OSError as `read`.
    """
    kept = load(cache, key) if cache is not None else None
    if kept is not None and len(kept.rows) == count and (kept.hashed or not hashed):
        for _ in range(count):
            done()
        return kept

    def one(number: int) -> tuple[np.void | None, str]:
        data = read(number)
        if data is None:
            return None, ""
        try:
            return look(data, hashed)
        except images.BrokenImage as error:
            return None, str(error) or "broken"

    looks = Looks(np.zeros(count, dtype=LOOK), [], {}, hashed)
    formats: dict[str, int] = {}
    for number, (row, said) in enumerate(pool.map(one, range(count))):
        if row is not None:
            looks.rows[number] = row
            looks.rows[number]["format"] = formats.setdefault(said, len(formats))
        elif said:
            looks.rows[number]["state"] = BROKEN
            looks.reasons[number] = said
        done()
    looks.formats = list(formats)
    if cache is not None:
        _save(cache, key, looks)
    return looks


def load(cache: Path, key: str) -> Looks | None:
    """What `cache` holds, or None where that is nothing, of another state of the shard, or unreadable."""
    try:
        with np.load(cache, allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if (meta["version"], meta["key"]) != (VERSION, key) or file["rows"].dtype != LOOK:
                return None
            reasons = {int(row): reason for row, reason in meta["reasons"].items()}
            return Looks(file["rows"], meta["formats"], reasons, meta["hashed"])
    except Exception:  # whatever a damaged file makes of zipfile, zlib, numpy and json
        return None


def _save(cache: Path, key: str, looks: Looks) -> None:
    meta = {
        "version": VERSION,
        "key": key,
        "formats": looks.formats,
        "reasons": looks.reasons,
        "hashed": looks.hashed,
    }
    buffer = io.BytesIO()
    np.savez(buffer, rows=looks.rows, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
    try:
        write_atomically(cache, buffer.getvalue())
    except OSError:
        pass  # a folder that cannot be written to is fine: the next run hashes again
