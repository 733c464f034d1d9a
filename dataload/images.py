"""Pictures: bytes to RGB, crops to uint8, uint8 to what a model takes. Letters: B batch, H W height and
width.

Policies, in one place:
- EXIF orientation is applied. Unreadable EXIF is ignored (the pixels are whole).
- Alpha is composited over white; of an animation the first frame counts; colour profiles are not applied.
- 16-bit grey is scaled to 8 bits, never clipped. JPEGs are decoded at full scale (no reduced-scale decoding, and no
  two-step resizing: neither stays within a level or two of the plain result).
- A crop is cut out before it is resized (see resize.py): pixels outside do not show at its edge.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageEnhance

from dataload.decode.crops import crop_box
from dataload.decode.picture import (
    MAX_PIXELS,
    UPRIGHT,
    BrokenImage,
    broken,
    decode,
    decode_array,
    formats,
    open_picture,
    orientation_of,
    to_rgb,
)
from dataload.jpeg_header import everyday_size
from dataload.resize import resize
from dataload.scratch import scratch
from dataload.squares import boxes

if TYPE_CHECKING:
    from dataload.sandbox import Sandbox

__all__ = [
    "INTERPOLATIONS", "MAX_PIXELS", "MEAN", "STD", "BrokenImage", "Picture", "color_jitter", "crop_box", "decode",
    "decode_array", "denormalize", "formats", "mirror_caption", "normalize", "random_resized_crop", "read",
    "resize_center_crop", "to_rgb", "turn_upright", "views",
]  # fmt: skip

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's mean and standard deviation per RGB channel, for pixels in 0..1."""
CHILD = "dataload.decode.picture:decode_array"
MANY_SCANS = 100
"""of a JPEG; encoders write 1 to 20"""
_SCAN = b"\xff\xda"
TIMEOUT = 30.0
"""seconds that a sandbox gets for a picture"""
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Pillow's filters, which widen with the scale (antialiased)."""


@dataclass(frozen=True)
class Picture:
    """An encoded picture whose header is whole and within the limit."""

    data: bytes
    width: int
    height: int
    """as it is seen, upright"""
    orientation: int = 1
    """EXIF's: how the stored pixels are to be turned (1 to 8); 1 where `pixels` are there"""
    pixels: np.ndarray | None = None
    """uint8 [H, W, 3]; None for JPEGs of 8-bit grey or RGB, which are decoded when a box of them is wanted"""
    max_pixels: int = MAX_PIXELS

    def cut(self, box: tuple[int, int, int, int], *, lend: bool = False) -> np.ndarray:
        """uint8 [height, width, 3] of the box (left, top, width, height), upright; decodes what is not decoded yet. `lend`: the
        pixels may stand in memory that this thread's next `cut` overwrites. Raises BrokenImage."""
        left, top, width, height = box
        if self.pixels is not None:
            return self.pixels[top : top + height, left : left + width]
        pixels = self._jpeg(lend)
        if pixels is None:  # Pillow is more lenient with odd files, and has the last word on broken ones
            pixels = decode_array(self.data, self.max_pixels)
            return pixels[top : top + height, left : left + width]
        left, top, width, height = self.stored(box)
        return turn_upright(pixels[top : top + height, left : left + width], self.orientation)

    def stored(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """The box (left, top, width, height) in the pixels as they are stored, before they are turned."""
        left, top, width, height = box
        right, below = self.width - left - width, self.height - top - height
        x = {1: left, 2: right, 3: right, 4: left, 5: top, 6: top, 7: below, 8: below}[self.orientation]
        y = {1: top, 2: top, 3: below, 4: below, 5: left, 6: right, 7: right, 8: left}[self.orientation]
        return (x, y, width, height) if self.orientation < 5 else (x, y, height, width)

    def _jpeg(self, lend: bool) -> np.ndarray | None:
        """All stored pixels, the same as Pillow's, in less time; None where there is anything unusual."""
        import simplejpeg  # here, so that what decodes nothing (a model's steps, a plan) does without

        buffer = scratch("jpeg", 3 * self.width * self.height) if lend else None
        try:
            pixels = simplejpeg.decode_jpeg(self.data, "RGB", strict=True, buffer=buffer)
        except ValueError:
            return None
        turned = (self.height, self.width) if self.orientation < 5 else (self.width, self.height)
        return pixels if pixels.shape[:2] == turned else None


def read(data: bytes, max_pixels: int = MAX_PIXELS, sandbox: Sandbox | None = None) -> Picture:
    """A picture of which boxes can be cut. Raises BrokenImage for what its header shows, and for all that is broken in
    anything but a JPEG; the rest of a JPEG is looked at by `Picture.cut`.

    With a `sandbox`, formats other than JPEG, PNG and WebP, and JPEGs of very many scans, are decoded in a child process:
    their readers are less tested, and a file that crashes or occupies one must not take this process with it."""
    size = everyday_size(data)
    if size is not None and size[0] * size[1] <= max_pixels:
        return Picture(data, *size, max_pixels=max_pixels)
    if data[:3] == b"\xff\xd8\xff" and not (sandbox is not None and data.count(_SCAN) > MANY_SCANS):
        try:
            image = open_picture(data, max_pixels)
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                turn = orientation_of(image)
                turn = turn if turn in UPRIGHT else 1
                width, height = image.size if turn < 5 else image.size[::-1]
                return Picture(data, width, height, turn, max_pixels=max_pixels)
        except Exception as error:
            raise broken(error, data) from None
    pixels = _all_pixels(data, max_pixels, sandbox)
    return Picture(data, pixels.shape[1], pixels.shape[0], pixels=pixels, max_pixels=max_pixels)


def _all_pixels(data: bytes, max_pixels: int, sandbox: Sandbox | None) -> np.ndarray:
    well_tested = data.startswith(b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    if data[:3] == b"\xff\xd8\xff":
        well_tested = (
            data.count(_SCAN) <= MANY_SCANS
        )  # more take minutes, in a file of a few hundred kilobytes
    if sandbox is None or well_tested:
        return decode_array(data, max_pixels)
    pixels = sandbox.call(CHILD, data, max_pixels, timeout=TIMEOUT, broken=BrokenImage)
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape[2:] == (3,)
        and pixels.size
    ):
        raise BrokenImage("the decoder answered with something else than a picture")
    return pixels


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored pixels [H, W, 3] as EXIF's orientation says that they are to be seen."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> Image.Image:
    """A random box of an RGB picture (see `crop_box`), cut out and resized to size x size."""
    left, top, width, height = crop_box(image.width, image.height, rng, scale, ratio)
    crop = np.asarray(image)[top : top + height, left : left + width]
    return Image.fromarray(resize(crop, size, interpolation))


def resize_center_crop(image: Image.Image, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """The largest centred square of an RGB picture, resized to uint8 [size, size, 3] in one step."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation], box=box))


def views(image: Image.Image, size: int, count: int, interpolation: str = "bilinear") -> np.ndarray:
    """The squares of an RGB picture that `dataload.squares.boxes` names, resized to uint8 [count, size, size, 3]; the first is
    the whole of the largest centred square. The mean of what a model makes of them sees more than one look (multi-crop
    evaluation, Krizhevsky et al. 2012, section 4.1). Raises ValueError for a count that there is not."""
    out = np.empty((count, size, size, 3), np.uint8)
    for view, box in zip(out, boxes(*image.size, count), strict=True):
        view[:] = np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation], box=box))
    return out


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
