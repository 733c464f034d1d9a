"""Resizing on the CPU: a crop, uint8 [H, W, 3], to a square of uint8, antialiased, within one level of Pillow.

Pillow resizes one direction, rounds to uint8, then the other, and rounds again. So does this, at a quarter of the cost:

- Along rows by torch's vectorised resampler. Its weights have 15 bits, so that now and then a value which lies between two
  levels is rounded the other way.
- Along columns, bilinear: exactly. A weighted sum of whole rows is what `embedding_bag` does, on bytes, with float32
  weights. (With 15 bits in both directions, one value in some ten million is two levels off.)
- Along columns, bicubic: by torch as well. Its overshoots are clipped between the directions, so that their order shows, and
  torch alone takes the cheaper order. So it is called once for each, in Pillow's order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL import __version__ as pillow_version

from dataload.scratch import scratch

_PILLOW = int(pillow_version.split(".")[0])
_STEP = 192
"""Lengths of rows are rounded up to multiples of this: torch compiles `embedding_bag` once for each length."""

_SCALE_BIAS = np.array([1, 0.5], dtype=np.float32).view(np.uint8)
"""What ends each row of bytes that `embedding_bag` reads: value = byte * 1 + 0.5. The weights of a pixel sum to 1, so that the
half rounds the sum."""


def resize(
    crop: np.ndarray,
    size: int,
    interpolation: str = "bilinear",
    *,
    mirror: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [H, W, 3] of any size and strides, as uint8 [size, size, 3], mirrored if asked; in `out` if it is given, which must
    be contiguous. `interpolation` is bilinear or bicubic; both widen with the scale (antialiasing), as Pillow's do."""
    if out is None:
        out = np.empty((size, size, 3), dtype=np.uint8)
    height, width = crop.shape[:2]
    with one_thread():
        image = crop if crop.flags.c_contiguous else _copied(crop)
        if interpolation == "bilinear" and _has_ties(width, height, size):
            image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
            np.copyto(out, _mirrored(image) if mirror else image)
        elif _columns_first(width, height, size):
            image = _rows(_columns(image, size, interpolation), size, interpolation)
            np.copyto(out, _mirrored(image) if mirror else image)
        else:
            image = _rows(image, size, interpolation)
            _columns(_mirrored(image) if mirror else image, size, interpolation, out)
    return out


def _copied(crop: np.ndarray) -> np.ndarray:
    image = scratch("crop", crop.size).reshape(crop.shape)
    np.copyto(image, crop)
    return image


def _has_ties(width: int, height: int, size: int) -> bool:
    """Whether both directions have so few different weights (192 to 224 pixels: sevenths) that values right between two levels
    are common. Pillow does those itself: a tie that falls the other way in both directions makes two levels."""
    return (
        width != size != height and max(size // math.gcd(width, size), size // math.gcd(height, size)) <= 32
    )


def _columns_first(width: int, height: int, size: int) -> bool:
    """Pillow's order, which shows in the rounding: rows first, unless it is 13 or newer and the height loses over twice as
    much as the width."""
    return _PILLOW >= 13 and height > size and height - size > 2 * (width - size)


def _rows(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """uint8 [H, W, 3] to [H, size, 3]"""
    return image if image.shape[1] == size else _by_torch(image, (image.shape[0], size), interpolation)


def _columns(image: np.ndarray, size: int, interpolation: str, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [H, W, 3] to [size, W, 3], in `out` if it is given"""
    height, width = image.shape[:2]
    if height != size and interpolation == "bilinear":
        sums = _weighted_rows(image.reshape(height, 3 * width), size)
        out = np.empty((size, width, 3), dtype=np.uint8) if out is None else out
        np.copyto(out.reshape(size, 3 * width), sums, casting="unsafe")
        return out
    if height != size:
        image = _by_torch(image, (size, width), interpolation)
    if out is None:
        return image
    np.copyto(out, image)
    return out


def _by_torch(image: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
    channels_last = _tensor(image)[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    resized = F.interpolate(channels_last, shape, mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _mirrored(image: np.ndarray) -> np.ndarray:
    channels_last = _tensor(image)[None].permute(
        0, 3, 1, 2
    )  # torch mirrors these ten times faster than numpy
    return channels_last.flip(3)[0].permute(1, 2, 0).contiguous().numpy()


def _tensor(image: np.ndarray) -> torch.Tensor:
    if not image.flags.writeable:  # a picture of Pillow's; torch warns, though nothing here is written to
        image = image.copy()
    return torch.from_numpy(image)


def _weighted_rows(rows: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, N] to float32 [size, N]: bilinear, plus 0.5, so that cutting off the fraction rounds."""
    height, length = rows.shape
    padded = -(-length // _STEP) * _STEP
    table = scratch("table", height * (padded + _SCALE_BIAS.size)).reshape(height, -1)
    table[:, :length] = rows
    table[:, length:padded] = 0
    table[:, padded:] = _SCALE_BIAS
    indices, weights, starts = _triangles(height, size)
    total = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        torch.from_numpy(table), indices, starts, False, 0, False, weights, None, False
    )
    return total.numpy()[:, :length]


@functools.lru_cache(maxsize=1024)
def _triangles(length: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each of `size` outputs the inputs it sees, their weights, and where its own begin: Pillow's bilinear
    filter (ImagingResample's triangle, as wide as the scale, cut at the borders)."""
    scale = length / size
    support = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)  # exclusive
    places = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(1 - np.abs((places + 0.5 - centers[:, None]) / support), 0)
    weights[places >= last[:, None]] = 0
    weights /= weights.sum(1, keepdims=True)
    starts = np.arange(0, places.size, places.shape[1])
    return (
        torch.from_numpy(np.minimum(places, length - 1).reshape(-1)),
        torch.from_numpy(weights.astype(np.float32).reshape(-1)),
        torch.from_numpy(starts),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from splitting one picture over its own threads: there is a thread per picture already, and teams of
    threads that wait for each other burn more than the work."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
