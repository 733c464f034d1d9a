"""Pictures: bytes to RGB, crops to uint8, uint8 to what a model takes. Letters: B batch, H W height and
width.

Policies, in one place:
- EXIF orientation is applied. Unreadable EXIF is ignored (the pixels are whole).
- Alpha is composited over white; of an animation the first frame counts; colour profiles are not applied.
- 16-bit grey is scaled to 8 bits, never clipped. JPEGs are decoded in full (no reduced-scale decoding, and no
  two-step resizing: neither stays within a level or two of the plain result).
"""

from __future__ import annotations

import functools
import io
import re
import struct

import numpy as np
import torch
from PIL import Image, ImageEnhance, UnidentifiedImageError

from dataload.broken import BrokenSample
from dataload.crops import crop_box

MAX_PIXELS = 89_478_485
"""Default limit on width * height; Pillow's own, at which it begins to warn."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation per RGB channel, for pixels in 0..1."""
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Pillow's filters, which widen with the scale (antialiased)."""
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(BrokenSample):
    """The bytes are no picture that can be used; the message says why."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Every format that Pillow reads here, the usual ones first. Not EPS: reading it runs Ghostscript on the
    file."""
    Image.init()
    usual = [name for name in ("JPEG", "PNG", "WEBP") if name in Image.OPEN]
    return tuple(usual + [name for name in Image.ID if name not in usual and name != "EPS"])


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an encoded picture to mode RGB, upright, with the policies at the top of this file.

    Raises BrokenImage, and nothing else, for bytes that are no picture, are cut short, or declare more than
    `max_pixels` pixels (checked in the header, before anything is decoded; Pillow's own limit holds as well).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
        _check_size(image, max_pixels)
        image.load()
        # Again: an ICO's or ICNS's directory may promise less than the picture inside has.
        _check_size(image, max_pixels)
        # After load(): PNG may carry EXIF behind the pixels, and TIFF and AVIF come upright already.
        turn = _UPRIGHT.get(_orientation(image))
        image = to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        # Pillow's message has the address of our buffer in it: another one each time.
        raise BrokenImage(f"{len(data)} bytes in no format that is read here") from None
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, struct.error, IndexError, NotImplementedError,
        # zlib.error, DecompressionBombError and others: for bytes from outside they all mean the same.
        raise BrokenImage(
            f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        ) from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenImage(f"{width}x{height} is {width * height} pixels, over the limit of {max_pixels}")
    if width < 1 or height < 1:
        raise BrokenImage(f"{width}x{height} has no pixels")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except (ValueError, TypeError, SyntaxError, KeyError, IndexError, OSError, struct.error):
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any loaded Pillow picture as mode RGB; see the policies at the top of this file."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # premultiplied grey converts only to LA
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as mode L. 16-bit files have a white (65535, or what a TIFF's bit depth says).

    32-bit integers and floats have none that is stored: 0..1, 0..255 and 0..65535 are told apart by the
    largest value, and anything else is stretched from its smallest to its largest value.
    """
    values = np.asarray(image)
    if values.dtype.kind == "u":
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
        values = values.astype(np.float64) * (255 / (2**bits - 1))
    else:
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(values.min()), float(values.max())
        if image.mode == "F" and low >= 0 and high <= 1:
            values = values * 255
        elif image.mode == "F" and low >= 0 and high <= 255:
            pass
        elif low >= 0 and high <= 65535:
            values = values * (255 / 65535)
        else:
            values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> Image.Image:
    """A random box of an RGB picture (see `crop_box`), resized to size x size."""
    left, top, width, height = crop_box(image.width, image.height, rng, scale, ratio)
    box = (left, top, left + width, top + height)
    return image.resize((size, size), INTERPOLATIONS[interpolation], box=box)


def resize_center_crop(image: Image.Image, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """The largest centred square of an RGB picture, resized to uint8 [size, size, 3] in one step."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation], box=box))


def color_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation, in this order, each times a factor uniform in 1 - strength .. 1 +
    strength."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + strength * (2 * rng.random() - 1))
    return image


_SIDES = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed|side|sided)?\b)", re.IGNORECASE)
_OPPOSITE = {"left": "right", "right": "left"}


def mirror_caption(text: str) -> str:
    """Swaps the words left and right, so that the caption of a mirrored picture stays true; case is kept.

    Whole words, also before a hyphen and in leftmost, rightward, left-hand, righthanded and their like;
    "bright" and "leftover" stay. Not a reader of English: "right next to" and "has left" are swapped too.
    """
    return _SIDES.sub(lambda match: _in_case_of(match[0], _OPPOSITE[match[0].lower()]), text)


def _in_case_of(word: str, other: str) -> str:
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W], ImageNet's mean 0 and deviation 1, on the tensor's
    device."""
    mean = torch.tensor([255 * m for m in MEAN], device=images.device)
    scale = torch.tensor([1 / (255 * s) for s in STD], device=images.device)
    return ((images - mean) * scale).permute(0, 3, 1, 2).contiguous()


def denormalize(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalize`: float [B, 3, H, W] to uint8 [B, H, W, 3], rounded, clipped to 0..255."""
    mean = torch.tensor([255 * m for m in MEAN], device=images.device)
    scale = torch.tensor([255 * s for s in STD], device=images.device)
    return (images.float().permute(0, 2, 3, 1) * scale + mean).round().clamp(0, 255).to(torch.uint8)
