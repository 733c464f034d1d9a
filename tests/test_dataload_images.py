from __future__ import annotations

import csv
import io
import json
import math
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dataload import images
from dataload.images import BrokenImage, decode, mirror_caption
from dataload.sandbox import Sandbox

RNG = np.random.default_rng(0)
PHOTO = np.asarray(  # smooth, so that lossy formats stay close
    Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(
        (48, 32), Image.Resampling.BICUBIC
    )
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "WEBP", "JPEG2000", "ICO"])
def test_formats(kind: str) -> None:
    image = Image.fromarray(PHOTO)
    options = {"WEBP": {"lossless": True}, "ICO": {"sizes": [image.size]}}.get(kind, {})
    expected = np.asarray(image.quantize().convert("RGB")) if kind == "GIF" else PHOTO
    result = pixels(encoded(image, kind, **options))
    assert result.shape == PHOTO.shape
    assert np.abs(result.astype(int) - expected).max() <= (20 if kind == "GIF" else 0)


def test_jpeg_is_what_pillow_decodes() -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG", quality=90)
    assert (pixels(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PHOTO), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (pixels(data) == np.asarray(expected)).all()
    assert decode(data).size == ((32, 48) if orientation >= 5 else (48, 32))


def test_unreadable_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(PHOTO), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert (pixels(data) == PHOTO).all()


def test_cmyk_jpeg() -> None:
    image = Image.fromarray(PHOTO).convert("CMYK")
    assert np.abs(pixels(encoded(image, "JPEG", quality=98)).astype(int) - PHOTO).mean() < 3


def test_alpha_is_composited_over_white() -> None:
    alpha = np.linspace(0, 255, 48 * 32).reshape(32, 48).round().astype(np.uint8)
    image = Image.fromarray(np.dstack([PHOTO, alpha]))
    share = alpha[..., None] / 255
    expected = PHOTO * share + 255 * (1 - share)
    assert np.abs(pixels(encoded(image)) - expected).max() <= 1
    grey = Image.merge("LA", (Image.fromarray(PHOTO[..., 0].copy()), Image.fromarray(alpha)))
    assert np.abs(pixels(encoded(grey)) - expected[..., :1].repeat(3, 2)).max() <= 1


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    for kind in ("PNG", "GIF"):
        assert pixels(encoded(image, kind, transparency=0)).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    expected = np.rint(values / 257)[..., None].repeat(3, 2)
    for kind in ("PNG", "TIFF"):
        assert (pixels(encoded(Image.fromarray(values), kind)) == expected).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 200.0], [0, 100, 200]),
        ([-1.0, 0.0, 3.0], [0, 64, 255]),
        ([math.nan, 0.0, 1.0], [0, 0, 255]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert pixels(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    frames = [Image.new("RGB", (8, 8), color) for color in colors]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bomb_is_refused_by_its_header() -> None:
    tracemalloc.start()
    started = time.process_time()
    for side, limit in ((30_000, images.MAX_PIXELS), (30_000, 10**10), (8000, 8000**2 - 1)):
        with pytest.raises(BrokenImage, match="limit|exceeds"):  # the second is stopped by Pillow's own limit
            decode(png_bomb(side), max_pixels=limit)
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_limit_of_pixels_is_exact() -> None:
    data = encoded(Image.new("1", (1000, 1000)))
    assert decode(data, max_pixels=1_000_000).size == (1000, 1000)
    with pytest.raises(BrokenImage, match="1000x1000 is 1000000 pixels, over the limit of 999999"):
        decode(data, max_pixels=999_999)


def png_bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that declares side x side grey pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_and_empty_files_are_broken(kind: str) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), kind)
    for size in (0, 1, 10, len(data) // 3, len(data) // 2):
        with pytest.raises(BrokenImage):
            decode(data[:size])


def test_postscript_is_not_run() -> None:
    assert "EPS" not in images.formats()
    with pytest.raises(BrokenImage, match="in no format that is read here"):
        decode(encoded(Image.fromarray(PHOTO), "EPS"))


CHECK = """
import csv, json, sys, time, warnings
from pathlib import Path
from dataload.images import BrokenImage, decode
warnings.simplefilter("ignore")
results = {}
for name in json.load(sys.stdin):
    started = time.process_time()
    try:
        image = decode(Path(sys.argv[1], name).read_bytes())
        result = image.mode
    except BrokenImage as error:
        result = "broken: " + str(error)
    except BaseException as error:
        result = "WRONG: " + repr(error)
    results[name] = result, time.process_time() - started
print(json.dumps(results))
"""


def test_corpus_of_broken_images(real_data: Path) -> None:
    """Fuzzed, truncated, odd: each decodes to RGB or is broken, in a process of their own, in bounded
    time."""
    folder = real_data / "broken_images"
    rows = list(csv.DictReader((folder / "manifest.csv").open(encoding="utf-8")))
    names = [row["path"] for row in rows]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(folder)],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(names) > 300
    assert not [name for name, (result, _) in results.items() if not result.startswith(("RGB", "broken: "))]
    assert max(seconds for _, seconds in results.values()) < 20
    # What Pillow loads whole must not be lost. Two PNGs of the list end inside a chunk, and count as
    # truncated.
    good = [row["path"] for row in rows if row["pil_load"] == row["pil_convert_rgb"] == "ok"]
    lost = [name for name in good if results[name][0] != "RGB"]
    assert len(lost) <= 2, {name: results[name] for name in lost}
    # And what it cannot load must not pass.
    bad = [row["path"] for row in rows if row["pil_open"] != "ok" or row["pil_load"] != "ok"]
    assert not [name for name in bad if results[name][0] == "RGB"]


SHAPES = [(64, 64), (500, 375), (375, 500), (1000, 200), (90, 900)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0)])
def test_crops_are_distributed_as_torchvisions(
    timm: ModuleType, width: int, height: int, scale: tuple[float, float]
) -> None:
    """Two-sample Kolmogorov-Smirnov, alpha = 0.001, of the boxes' area, aspect and place."""
    from torchvision.transforms import RandomResizedCrop  # importable after timm, see conftest

    count, ratio = 2000, (3 / 4, 4 / 3)
    torch.manual_seed(0)
    empty = torch.empty(3, height, width)
    theirs = [RandomResizedCrop.get_params(empty, list(scale), list(ratio)) for _ in range(count)]
    rng = np.random.default_rng(0)
    ours = [images.crop_box(width, height, rng, scale, ratio) for _ in range(count)]
    for left, top, box_width, box_height in ours:
        assert 0 <= left <= left + box_width <= width and 0 <= top <= top + box_height <= height
    a = np.array([(x, y, w, h) for y, x, h, w in theirs], dtype=float)
    b = np.array(ours, dtype=float)
    measures: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] + box[:, 2] / 2,
        lambda box: box[:, 1] + box[:, 3] / 2,
    ]
    for measure in measures:
        first, second = np.sort(measure(a)), np.sort(measure(b))
        at = np.concatenate([first, second])
        distance = np.abs(
            np.searchsorted(first, at, "right") / count - np.searchsorted(second, at, "right") / count
        ).max()
        assert distance < 1.95 * math.sqrt(2 / count)


def test_crop_is_the_box_resized_and_full_scale_keeps_the_picture() -> None:
    image = Image.fromarray(PHOTO)
    box = images.crop_box(48, 32, np.random.default_rng(3), (0.3, 0.6), (0.75, 1.33))
    crop = images.random_resized_crop(image, 16, np.random.default_rng(3), (0.3, 0.6), (0.75, 1.33))
    cut = image.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
    plain = np.asarray(cut.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    # Resizing with a box also sees the pixels around it, which changes the edge only.
    assert np.abs(np.asarray(crop).astype(int) - plain)[2:-2, 2:-2].max() <= 1
    square = Image.fromarray(PHOTO[:32, :32].copy())
    whole = images.random_resized_crop(square, 32, np.random.default_rng(0), (1.0, 1.0), (1.0, 1.0))
    assert (np.asarray(whole) == PHOTO[:32, :32]).all()


def test_interpolation_is_followed() -> None:
    image = Image.fromarray(PHOTO)
    for name, resample in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        expected = image.resize((20, 20), resample, box=(8, 0, 40, 32))
        assert (images.resize_center_crop(image, 20, name) == np.asarray(expected)).all()


def test_center_crop_of_a_tall_picture() -> None:
    tall = np.zeros((100, 20, 3), dtype=np.uint8)
    tall[40:60] = 200
    result = images.resize_center_crop(Image.fromarray(tall), 20)
    assert result.dtype == np.uint8 and result.shape == (20, 20, 3) and (result == 200).all()


def test_views_are_the_whole_square_and_smaller_ones() -> None:
    image = Image.fromarray(PHOTO)  # 48x32: the middle square begins at 8
    boxes = [(8, 0, 40, 32)]
    boxes += [(x, y, x + 24, y + 24) for y in (0, 8) for x in (8, 16)]
    boxes += [(x, y, x + 16, y + 16) for y in (0, 8, 16) for x in (8, 16, 24)]
    for name, resample in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        expected = [np.asarray(image.resize((12, 12), resample, box=box)) for box in boxes]
        for count in (1, 5, 14):
            assert np.array_equal(images.views(image, 12, count, name), np.stack(expected[:count]))
    with pytest.raises(ValueError, match="3 views of a picture; supported: 1, 5, 14"):
        images.views(image, 12, 3)


def test_color_jitter_stays_within_its_strength() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))  # contrast and saturation leave one grey as it is
    rng = np.random.default_rng(0)
    values = [np.asarray(images.color_jitter(grey, 0.3, rng))[0, 0, 0] for _ in range(300)]
    assert 70 <= min(values) < 75 and 125 < max(values) <= 130


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a dog on the left of a cat", "a dog on the right of a cat"),
        ("Left: a man. RIGHT, a boy", "Right: a man. LEFT, a boy"),
        ("the right-hand side", "the left-hand side"),
        ("leftmost and rightmost", "rightmost and leftmost"),
        ("turns leftward, lefthanded, rightwards", "turns rightward, righthanded, leftwards"),
        ("left and right", "right and left"),
        ("a bright copyright sign, leftovers, rights", "a bright copyright sign, leftovers, rights"),
        ("", ""),
    ],
)
def test_mirror_caption(text: str, mirrored: str) -> None:
    assert mirror_caption(text) == mirrored
    assert mirror_caption(mirrored) == text


def test_normalize_matches_its_definition_and_is_inverted() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    result = images.normalize(levels)
    assert result.shape == (2, 3, 16, 16) and result.dtype == torch.float32 and result.is_contiguous()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (levels[..., channel].double() / 255 - mean) / std
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=1e-5, atol=1e-5)
    assert (images.denormalize(result) == levels).all()
    assert images.normalize(levels[:0]).shape == (0, 3, 16, 16)


def test_denormalize_clips() -> None:
    out = images.denormalize(torch.tensor([-100.0, 100.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert (out[0] == 0).all() and (out[1] == 255).all() and out.dtype == torch.uint8


def damaged_jpegs(count: int) -> list[bytes]:
    """Small JPEGs of several kinds with bits flipped, bytes cut out, or the end missing."""
    rng = np.random.default_rng(1)
    photo = Image.fromarray(PHOTO)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [
        encoded(photo, "JPEG", quality=85), encoded(photo, "JPEG", progressive=True, exif=exif),
        encoded(photo.convert("L"), "JPEG"), encoded(photo.convert("CMYK"), "JPEG"),
        encoded(photo, "JPEG", subsampling="4:1:1", restart_marker_blocks=2),
        encoded(photo, "MPO", save_all=True, append_images=[photo]), encoded(photo, "JPEG", keep_rgb=True),
    ]  # fmt: skip
    result = list(whole)
    for i in range(count):
        data = bytearray(whole[i % len(whole)])
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(2, len(data)))
            match int(rng.integers(4)):
                case 0 | 1:
                    data[place] ^= 1 << int(rng.integers(8))
                case 2:
                    del data[place : place + int(rng.integers(1, 9))]
                case 3:
                    data = data[:place] + data[-2:] if rng.random() < 0.5 else data[: max(place, 4)]
            if len(data) < 5:
                break
        result.append(bytes(data))
    return result


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_jpegs_are_judged_and_decoded_as_by_pillow_in_full() -> None:
    """`read` and `cut` go by simplejpeg where they can; the verdicts and pixels are those of Pillow's full decoding."""
    verdicts = {"whole": 0, "broken": 0}
    for data in damaged_jpegs(400):
        try:
            expected = np.asarray(decode(data))
        except BrokenImage as error:
            verdicts["broken"] += 1
            with pytest.raises(BrokenImage) as raised:
                picture = images.read(data)
                picture.cut((0, 0, picture.width, picture.height))
            assert str(raised.value) == str(error)
            continue
        verdicts["whole"] += 1
        picture = images.read(data)
        assert (picture.height, picture.width) == expected.shape[:2]
        assert (picture.cut((0, 0, picture.width, picture.height)) == expected).all()
        left, top, width, height = box = images.crop_box(
            picture.width, picture.height, np.random.default_rng(len(data)), (0.1, 0.5), (0.5, 2.0)
        )
        assert (picture.cut(box) == expected[top : top + height, left : left + width]).all()
    assert min(verdicts.values()) > 60, verdicts


def test_resizing_stays_within_a_level_of_pillow() -> None:
    """Any size and shape, both filters, mirrored too; ties (192 to 224 are sevenths) and Pillow's order of directions."""
    rng = np.random.default_rng(5)
    grain = rng.normal(0, 12, (300, 300, 3))
    field = np.asarray(Image.fromarray(PHOTO).resize((300, 300), Image.Resampling.BICUBIC))
    picture = Image.fromarray(np.clip(field + grain, 0, 255).astype(np.uint8))
    shapes = [
        (192, 208),
        (128, 155),
        (300, 7),
        (1, 1),
        (3, 300),
        (224, 300),
        (300, 224),
        (96, 200),
        (200, 96),
    ]
    shapes += [tuple(rng.integers(1, 301, 2).tolist()) for _ in range(25)]
    for i, (width, height) in enumerate(shapes):
        crop = picture.crop((0, 0, width, height))
        for name, resample in images.INTERPOLATIONS.items():
            for size in (32, 96, 224):
                plain = crop.resize((size, size), resample)
                expected = np.asarray(ImageOps.mirror(plain) if i % 2 else plain)
                result = images.resize(np.asarray(crop), size, name, mirror=i % 2 == 1)
                error = np.abs(result.astype(int) - expected)
                assert error.max() <= (1 if name == "bilinear" else 3), (width, height, size, name)
                assert error.mean() < 0.2


# rare formats, in a process of their own


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF", "PPM", "JPEG2000", "ICO"])
def test_rare_formats_come_through_a_sandbox_unchanged(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(data, kind)
    box = (3, 2, 30, 20)
    with Sandbox() as sandbox:
        here = images.read(data.getvalue()).cut(box)
        assert np.array_equal(images.read(data.getvalue(), sandbox=sandbox).cut(box), here)
        with pytest.raises(images.BrokenImage, match="over the limit of 100"):
            images.read(data.getvalue(), 100, sandbox)
        monkeypatch.setattr(images, "CHILD", "tests.sandboxed:crash_on")
        with pytest.raises(images.BrokenImage, match="SIGSEGV"):
            images.read(data.getvalue(), sandbox=sandbox)
        monkeypatch.undo()
        assert np.array_equal(images.read(data.getvalue(), sandbox=sandbox).cut(box), here)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_usual_formats_are_decoded_here(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Image.new("RGB", (40, 48), (200, 100, 50)).save(data, kind)
    monkeypatch.setattr(images, "CHILD", "tests.sandboxed:crash_on")
    with Sandbox() as sandbox:
        assert images.read(data.getvalue(), sandbox=sandbox).cut((0, 0, 40, 48)).shape == (48, 40, 3)
        assert sandbox.restarts == 0
