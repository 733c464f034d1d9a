"""Label maps of other people's files as uint8 [H, W]: a class per pixel, 255 = none.

folder     NAME.png, a class number per pixel (8-bit grey or palette); ADE20K, VOC, Cityscapes labelTrainIds
stuff      COCO-Stuff's stuffthingmaps: the same, 0 to 181 = COCO's category id - 1, 255 = unlabelled
panoptic   COCO panoptic: segment ids as colours, R + 256 G + 65536 B, and a JSON that says which segment is of which category
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataload.annotations import IGNORE


def read_map(path: Path, *, ignore: Sequence[int] = (), reduce_zero: bool = False) -> np.ndarray:
    """uint8 [H, W] of a file; see `plain_map`. OSError where it cannot be read."""
    try:
        return plain_map(path.read_bytes(), ignore=ignore, reduce_zero=reduce_zero)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def plain_map(data: bytes, *, ignore: Sequence[int] = (), reduce_zero: bool = False) -> np.ndarray:
    """uint8 [H, W] of a map with a class number per pixel (8-bit grey, a palette's numbers, 1-bit, or 16-bit below 256).

    ignore: further values that become 255. reduce_zero: 0 is no class, and the others move down by one (ADE20K).
    ValueError for colours, and for numbers over 255.
    """
    with _open(data) as image:
        if image.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise ValueError(
                f"a label map has one number per pixel, this picture is {image.mode}; a palette of colours has to be "
                "converted to class numbers first"
            )
        values = np.asarray(image).astype(np.int64)
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise ValueError(f"a label map has classes 0 to 254, this one has {values.min()} to {values.max()}")
    values[np.isin(values, list(ignore))] = IGNORE
    if reduce_zero:
        values = np.where((values == 0) | (values == IGNORE), IGNORE, values - 1)
    return values.astype(np.uint8)


def panoptic_map(data: bytes, classes: Mapping[int, int]) -> np.ndarray:
    """uint8 [H, W] of a panoptic PNG. classes: segment id -> class. Pixels of id 0 are void, 255.

    ValueError for a picture that is not of three channels, and for a segment that the JSON does not list.
    """
    with _open(data) as image:
        if image.mode != "RGB":
            raise ValueError(f"a panoptic map is an RGB picture, this one is {image.mode}")
        parts = np.asarray(image).astype(np.int64)
    ids = parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]
    found, inverse = np.unique(ids, return_inverse=True)
    unknown = [int(number) for number in found if number and int(number) not in classes]
    if unknown:
        raise ValueError(f"{len(unknown)} segments are not in the JSON, the first has the id {unknown[0]}")
    table = np.array([classes[int(number)] if number else IGNORE for number in found], dtype=np.uint8)
    result: np.ndarray = table[inverse].reshape(ids.shape)
    return result


def encode_map(values: np.ndarray) -> bytes:
    """An 8-bit grey PNG of uint8 [H, W]."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def resize_map(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """The class of the nearest pixel: classes have no mean."""
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.load()
    except Exception as error:  # Pillow raises nearly anything for bytes that are no whole picture
        raise ValueError(f"not a PNG that can be read: {error}") from None
    return image
