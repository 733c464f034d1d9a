"""Draws a scene: anti-aliased shapes on a soft background with slight light, hue, place and noise jitter.

Legend: S side of the picture in pixels, K side of the supersampled window around one object.
"""

from __future__ import annotations

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from dataload.scenes.text import THIRDS, Scene, SceneObject

Array = NDArray[np.float32]

# name -> (the color itself, the second shade of its textures); RGB, 0..255. The second shade is a darker one
# of the same hue (black's is lighter), so that a texture hides neither the color nor the outline of its shape.
PAINT: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "red": ((228, 30, 38), (166, 15, 24)),
    "green": ((30, 155, 55), (15, 110, 38)),
    "blue": ((45, 90, 235), (26, 52, 166)),
    "yellow": ((255, 226, 30), (196, 164, 15)),
    "purple": ((155, 50, 200), (108, 28, 146)),
    "orange": ((250, 128, 10), (200, 95, 5)),
    "black": ((14, 14, 18), (80, 80, 86)),
    "brown": ((122, 72, 32), (82, 46, 18)),
}
GROUND: dict[str, tuple[int, int, int]] = {
    "gray": (202, 202, 205),
    "pink": (250, 208, 220),
    "tan": (236, 216, 182),
    "mint": (196, 240, 214),
    "sky": (190, 222, 252),
}
# Fractions of the side. With these, objects that text._places allows cannot touch, and after any crop
# that keeps 85% of the area (even all of it cut off one edge) the middle of every object is still inside the
# picture and in the third that its place names.
CENTERS = (0.25, 0.5, 0.75)
RADIUS = {"small": 0.155, "large": 0.22}
SHIFT = 0.015
CELL = 0.068  # scale of the textures: a stripe and its gap are two of them wide
SUPERSAMPLE = 3


def draw(scene: Scene, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of `scene`: uint8 [size, size, 3]."""
    return draw_with_masks(scene, size, rng)[0]


def draw_with_masks(
    scene: Scene, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """The picture, and of each object the pixels of which it covers at least half: bool [size, size]."""
    light = rng.uniform(-1.0, 1.0, size=12).astype(np.float32)
    picture = np.empty((size, size, 3), np.float32)
    picture[:] = np.asarray(GROUND[scene.background], np.float32) + 6.0 * light[:3]
    masks = [_paint(picture, item, rng) for item in scene.objects]
    # A slope of light across the picture, one brightness for all of it, then noise.
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    shade = 1.0 + 0.05 * light[3] + 0.04 * (light[4] * ramp[:, None] + light[5] * ramp[None, :])
    picture *= shade[:, :, None]
    # Uniform noise of -5 to 5 levels straight from random bytes: five times as fast as normal noise.
    noise = np.frombuffer(rng.bytes(picture.size), np.uint8).reshape(picture.shape)
    picture += noise * np.float32(10.0 / 255.0) - np.float32(5.0)
    return np.clip(picture, 0.0, 255.0).astype(np.uint8), masks


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """PNG bytes of uint8 [S, S, 3].

    Written here because it is four times faster than Pillow's writer, which searches noisy pixels for repeats
    in vain: each row is stored as the difference to the row above (PNG's filter 2) and Huffman coded.
    """
    height, width, _ = picture.shape
    rows = picture.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    pixels = packer.compress(filtered.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _paint(picture: Array, item: SceneObject, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Blends one object into `picture` in place, where its words say, with a little jitter; what it covers."""
    side = picture.shape[0]
    jitter = rng.uniform(-1.0, 1.0, size=12)
    row, column = THIRDS[item.place]
    middle_x = (CENTERS[column] + SHIFT * jitter[0]) * side
    middle_y = (CENTERS[row] + SHIFT * jitter[1]) * side
    radius = RADIUS[item.size] * (1.0 + 0.03 * jitter[2]) * side
    return blend(picture, item, (middle_x, middle_y), radius, math.radians(6.0) * jitter[3], jitter[4:10])


def blend(
    picture: Array,
    item: SceneObject,
    middle: tuple[float, float],
    radius: float,
    angle: float,
    jitter: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Blends one object into `picture` [S, S, 3] in place: middle and radius in pixels, turned by `angle`; jitter [6] in -1..1
    shifts its texture and tints its color. Returns the pixels of which it covers at least half, bool [S, S]."""
    side = picture.shape[0]
    middle_x, middle_y = middle
    left, right = max(0, math.floor(middle_x - radius)), min(side, math.ceil(middle_x + radius))
    top, bottom = max(0, math.floor(middle_y - radius)), min(side, math.ceil(middle_y + radius))

    # Supersampled coordinates of the window around the object, turned: x, y [K, K] in units of the radius.
    step = 1.0 / SUPERSAMPLE
    across = (np.arange(left, right, step, dtype=np.float32) + 0.5 * step - middle_x) / radius
    down = (np.arange(top, bottom, step, dtype=np.float32) + 0.5 * step - middle_y) / radius
    cos, sin = math.cos(angle), math.sin(angle)
    x = (cos * across[None, :] - sin * down[:, None]).astype(np.float32)
    y = (sin * across[None, :] + cos * down[:, None]).astype(np.float32)

    inside = _inside(item.shape, x, y)
    unit = radius / (CELL * side)
    second = inside & _marks(item.texture, x * unit, y * unit, jitter[:3])
    cover, mark = _average(inside), _average(second)
    first_paint, second_paint = (
        np.asarray(paint, np.float32) + 8.0 * jitter[3:6] for paint in PAINT[item.color]
    )
    window = picture[top:bottom, left:right]
    window *= 1.0 - cover
    window += (cover - mark) * first_paint.astype(np.float32) + mark * second_paint.astype(np.float32)
    covered = np.zeros((side, side), np.bool_)
    covered[top:bottom, left:right] = cover[:, :, 0] >= 0.5
    return covered


def _average(flags: NDArray[np.bool_]) -> Array:
    """[K, K] -> [K / SUPERSAMPLE, K / SUPERSAMPLE, 1]: the covered share of each pixel."""
    # Sums of shifted slices: five times faster than a reduction over the short axes of a reshaped array.
    counts = flags.view(np.uint8)
    counts = sum((counts[shift::SUPERSAMPLE] for shift in range(1, SUPERSAMPLE)), start=counts[::SUPERSAMPLE])
    counts = sum(
        (counts[:, shift::SUPERSAMPLE] for shift in range(1, SUPERSAMPLE)), start=counts[:, ::SUPERSAMPLE]
    )
    return counts[:, :, None].astype(np.float32) / np.float32(SUPERSAMPLE**2)


def _inside(shape: str, x: Array, y: Array) -> NDArray[np.bool_]:
    """Whether points lie in the shape; x to the right, y down, all shapes fill about the unit circle."""
    match shape:
        case "circle":
            return x * x + y * y <= 0.9
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) <= 0.76
        case "triangle":  # tip up
            return (y <= 0.72) & (np.abs(x) <= 0.56 * (y + 0.98))
        case "cross":
            return (np.minimum(np.abs(x), np.abs(y)) <= 0.32) & (np.maximum(np.abs(x), np.abs(y)) <= 0.92)
        case "ring":
            squared = x * x + y * y
            return (squared <= 0.92) & (squared >= 0.23)
        case "star":
            # Three mirrors fold the plane onto half a point of the star (tip up); its edge runs from the tip
            # (0, 1) to the notch.
            u: Array = np.abs(x)
            v: Array = -y
            sin, cos = np.float32(math.sin(math.pi / 5)), np.float32(math.cos(math.pi / 5))
            for side in (cos, -cos):
                behind: Array = np.float32(2.0) * np.maximum(side * u - sin * v, np.float32(0.0))
                u, v = u - side * behind, v + sin * behind
            notch = 0.47
            return np.abs(u) * (1.0 - notch * cos) + v * notch * sin <= notch * sin
    raise ValueError(f"shape {shape!r} cannot be drawn")


def _marks(texture: str, x: Array, y: Array, phase: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where the second shade goes; x, y in units of CELL."""
    x, y = x + np.float32(phase[0]), y + np.float32(phase[1])
    match texture:
        case "solid":
            return np.zeros(x.shape, np.bool_)
        case "striped":  # a slope of 45 degrees, either way
            along = (x + y if phase[2] > 0 else x - y) * np.float32(0.5)
            return along - np.floor(along) < 0.45
        case "dotted":
            u, v = x * np.float32(1 / 1.5), y * np.float32(1 / 1.5)
            u, v = u - np.rint(u), v - np.rint(v)
            return u * u + v * v < 0.095
    raise ValueError(f"texture {texture!r} cannot be drawn")
