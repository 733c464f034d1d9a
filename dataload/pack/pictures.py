"""One picture file on its way into a shard: kept as it is, converted, resized, or found broken."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

# Formats whose bytes are packed as they are, with the suffix in the shard. MPO is a JPEG with further
# pictures behind it.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height"""


@dataclass(frozen=True)
class Prepared:
    """The bytes to pack, or why there are none."""

    digest: bytes
    """of the file as it was found, to tell duplicates"""
    suffix: str = ""
    data: bytes = b""
    change: str = ""
    """what was done to it, for counting; empty = nothing"""
    broken: str = ""
    """why it cannot be packed"""
    kind: str = "image"
    source_size: tuple[int, int] = (0, 0)
    """width and height of the picture as it was found, upright; only where `measure` asks for it"""
    size: tuple[int, int] = (0, 0)
    """... and as it is packed"""


def prepare(data: bytes, *, resize: int | None, verify: bool, measure: bool = False) -> Prepared:
    """Checks the header of a picture file (`verify`: decodes all of it), and converts or resizes where that
    is asked for.

    Formats other than JPEG, PNG and WebP become PNG. `resize`: pictures whose shortest side is longer than
    that many pixels are scaled down to it (Lanczos) and stored as JPEG of quality 95; smaller ones stay as
    they are. Both turn pictures upright and apply the other policies of dataload.images. `measure`: sizes are wanted.
    """
    from dataload import images  # here, as it brings torch, which those who only write shards can do without

    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        with Image.open(io.BytesIO(data), formats=images.formats()) as image:
            kind, (width, height) = image.format or "?", image.size
            if width * height > images.MAX_PIXELS:
                return Prepared(digest, broken=f"{width}x{height} is over {images.MAX_PIXELS} pixels")
            if kind in KEPT:
                image.verify()  # PNG: all checksums; the others: no more than the header
        upright = _upright_size(data) if measure else (0, 0)
        shrink = resize is not None and min(width, height) > resize
        if kind in KEPT and not shrink and not verify:
            return Prepared(digest, KEPT[kind], data, source_size=upright, size=upright)
        picture = images.decode(data)
    except UnidentifiedImageError:  # whose message has an address in it, another one each time
        return Prepared(digest, broken=f"{len(data)} bytes in no format that is read here")
    except Exception as error:  # Pillow's readers raise nearly anything for bytes that are no whole picture
        return Prepared(digest, broken=f"{type(error).__name__}: {error}")
    if shrink and resize is not None:
        scale = resize / min(picture.size)
        size = (max(resize, round(picture.width * scale)), max(resize, round(picture.height * scale)))
        small = picture.resize(size, Image.Resampling.LANCZOS)
        change = f"resized to {resize} pixels (JPEG)"
        return Prepared(
            digest, "jpg", _encode(small, "JPEG", quality=95), change, source_size=picture.size, size=size
        )
    if kind in KEPT:
        return Prepared(digest, KEPT[kind], data, source_size=picture.size, size=picture.size)
    change, png = f"converted from {kind} to PNG", _encode(picture, "PNG")
    return Prepared(digest, "png", png, change, source_size=picture.size, size=picture.size)


def _upright_size(data: bytes) -> tuple[int, int]:
    """Width and height as the picture is seen; opened anew, as to look for EXIF may read more than the header."""
    from dataload import images
    from dataload.decode.picture import orientation_of

    with Image.open(io.BytesIO(data), formats=images.formats()) as image:
        width, height = image.size
        return (height, width) if orientation_of(image) in SIDEWAYS else (width, height)


def _encode(picture: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
