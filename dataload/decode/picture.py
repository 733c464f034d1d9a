"""Any picture by Pillow: bytes to upright RGB, with the policies at the top of images.py.

Apart from images.py, whose torch takes seconds to import in a decoder's process.
"""

from __future__ import annotations

import functools
import io
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

from dataload.broken import BrokenSample

MAX_PIXELS = 89_478_485
"""Default limit on width * height; Pillow's own, at which it begins to warn."""
_EXIF_ORIENTATION = 0x0112
UPRIGHT = {
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
        image = open_picture(data, max_pixels)
        image.load()
        # Again: an ICO's or ICNS's directory may promise less than the picture inside has.
        _check_size(image, max_pixels)
        # After load(): PNG may carry EXIF behind the pixels, and TIFF and AVIF come upright already.
        turn = UPRIGHT.get(orientation_of(image))
        image = to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except Exception as error:
        raise broken(error, data) from None


def decode_array(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """`decode`, as uint8 [H, W, 3]."""
    return np.asarray(decode(data, max_pixels))


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """The picture with its header read, within the limit; raises whatever Pillow raises, see `broken`."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
    _check_size(image, max_pixels)
    return image


def broken(error: Exception, data: bytes) -> BrokenImage:
    """Pillow's readers raise OSError, SyntaxError, struct.error, IndexError, NotImplementedError, zlib.error,
    DecompressionBombError and others: for bytes from outside they all mean the same."""
    if isinstance(error, BrokenImage):
        return error
    if isinstance(error, UnidentifiedImageError):
        # Pillow's message has the address of our buffer in it: another one each time.
        return BrokenImage(f"{len(data)} bytes in no format that is read here")
    return BrokenImage(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenImage(f"{width}x{height} is {width * height} pixels, over the limit of {max_pixels}")
    if width < 1 or height < 1:
        raise BrokenImage(f"{width}x{height} has no pixels")


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it cannot be read."""
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
