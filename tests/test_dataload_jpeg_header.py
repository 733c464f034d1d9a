"""Sizes of JPEGs that are told without Pillow are Pillow's; whatever could be unusual is left to it."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataload.images import BrokenImage, decode_array, read
from dataload.jpeg_header import everyday_size


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("L", {}),
        ("RGB", {"subsampling": 0, "quality": 100, "optimize": True}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"comment": b"a picture", "icc_profile": b"x" * 70_000, "restart_marker_rows": 1}),
    ],
)
def test_everyday(mode: str, options: dict[str, object]) -> None:
    data = jpeg(picture(mode=mode), **options)
    assert everyday_size(data) == (40, 24)
    assert np.array_equal(read(data).cut((3, 2, 20, 10)), decode_array(data)[2:12, 3:23])


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"progressive": True}), ("CMYK", {}), ("RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"})],
)
def test_left_to_pillow(mode: str, options: dict[str, object]) -> None:
    assert everyday_size(jpeg(picture(mode=mode), **options)) is None


def test_every_cut_is_left_to_pillow() -> None:
    data = jpeg(picture())
    begin = data.index(b"\xff\xda")
    assert everyday_size(data[: begin + 14]) == (40, 24)  # what is missing shows when it is decoded
    for end in range(begin + 14):
        assert everyday_size(data[:end]) is None


def agrees(data: bytes) -> bool:
    """Whether a size was told; if so, Pillow opens it with the same, or both refuse it."""
    size = everyday_size(data)
    if size is None:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bomb's size; the limit is for the caller
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            return True
        except Image.UnidentifiedImageError:  # damaged tables: they show when it is decoded
            with pytest.raises(BrokenImage):
                read(data).cut((0, 0, *size))
            return True
    assert (image.format, image.size) == ("JPEG", size) and image.mode in ("L", "RGB")
    assert image.getexif().get(0x0112, 1) == 1
    return True


def test_mutated_headers() -> None:
    """One byte of the header at a time: a size that is told is the one that Pillow sees."""
    data = jpeg(picture(), comment=b"c")
    begin = data.index(b"\xff\xda")
    rng = np.random.default_rng(0)
    told = 0
    for at in range(begin + 12):
        for value in {0, 1, 4, 0xC2, 0xE1, 0xFF, int(rng.integers(256))}:
            told += agrees(data[:at] + bytes([value]) + data[at + 1 :])
    assert told > 1000


def test_real_photographs(real_data: Path) -> None:
    files = [*real_data.glob("flickr8k_2000/**/*.jpg")][:60] + [*real_data.glob("coco_mini/**/*.jpg")]
    files += [*real_data.glob("broken_images/files/*")]
    assert sum(agrees(path.read_bytes()) for path in files) > 100


def test_lent_pixels() -> None:
    """They are the same until this thread borrows again; another thread has memory of its own."""
    one, other = jpeg(picture()), jpeg(ImageOps.mirror(picture()))
    lent, own = read(one).cut((0, 0, 40, 24), lend=True), read(one).cut((0, 0, 40, 24))
    assert np.array_equal(lent, own)
    elsewhere = threading.Thread(target=lambda: read(other).cut((0, 0, 40, 24), lend=True))
    elsewhere.start()
    elsewhere.join()
    assert np.array_equal(lent, own)
    read(other).cut((0, 0, 40, 24), lend=True)
    assert not np.array_equal(lent, own) and np.array_equal(own, decode_array(one))
