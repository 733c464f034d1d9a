"""What a model sees of an annotated picture, and where its boxes and pixels then lie.

    training     a random crop, resized to a square, mirrored at random     `training_view`
    scoring      the whole picture, at the upper left of a square           `whole_view`

Letters: S side of the square, N boxes; boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dataload import images, sandbox
from dataload.annotations import IGNORE, Annotations, Object
from dataload.decode.crops import crop_box
from dataload.resize import resize

GREY = tuple(round(255 * m) for m in images.MEAN)
SEEN = 0.3  # of a box's area must be in the crop, or the object is left out


@dataclass(frozen=True)
class ViewConfig:
    """How pictures are cropped in training; see `samples.LoaderConfig` for the fields."""

    size: int
    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    interpolation: str = "bilinear"
    keep_shape: bool = False
    """a crop keeps its proportions, with grey beside it, as pictures are scored (`whole_view`); else it fills the square"""


@dataclass(frozen=True)
class View:
    """A square of pixels, and how places of the stored picture come to lie in it."""

    pixels: np.ndarray
    """uint8 [S, S, 3]"""
    box: tuple[int, int, int, int]
    """left, top, width, height of the part of the stored picture that is seen"""
    shown: tuple[int, int]
    """width and height in pixels of that part in the square; the rest is grey"""
    flipped: bool
    picture: tuple[int, int]
    """width and height of the stored picture"""

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes float [N, 4] of the stored picture -> where they are in the square, not clipped."""
        left, top, width, height = self.box
        scale = np.array([self.shown[0] / width, self.shown[1] / height] * 2)
        moved: np.ndarray = (np.asarray(boxes, np.float64).reshape(-1, 4) - [left, top, left, top]) * scale
        if self.flipped:
            moved[:, [0, 2]] = self.shown[0] - moved[:, [2, 0]]
        return moved

    def back(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the square -> where they are in the stored picture, clipped to it."""
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4).copy()
        if self.flipped:
            boxes[:, [0, 2]] = self.shown[0] - boxes[:, [2, 0]]
        left, top, width, height = self.box
        boxes = boxes * ([width / self.shown[0], height / self.shown[1]] * 2) + [left, top, left, top]
        return boxes.clip(0, [*self.picture, *self.picture])

    def label_map(self, stored: np.ndarray) -> np.ndarray:
        """uint8 [S, S] of a label map of the stored picture; 255 where the square shows nothing of it."""
        left, top, width, height = self.box
        out = np.full(self.pixels.shape[:2], IGNORE, np.uint8)
        part = Image.fromarray(stored[top : top + height, left : left + width])
        part_ = np.asarray(part.resize(self.shown, Image.Resampling.NEAREST))
        out[: self.shown[1], : self.shown[0]] = part_[:, ::-1] if self.flipped else part_
        return out


def training_view(data: bytes, config: ViewConfig, rng: np.random.Generator) -> View:
    """A random view of an encoded picture. Raises BrokenImage."""
    picture = images.read(data, sandbox=sandbox.shared(1))
    flipped = bool(rng.random() < config.flip)
    box = crop_box(picture.width, picture.height, rng, config.crop_scale, config.crop_ratio)
    if config.keep_shape and config.crop_scale[0] == 1:  # a whole picture, whatever its proportions
        box = (0, 0, picture.width, picture.height)
    shown = _shown(box, config.size) if config.keep_shape else (config.size, config.size)
    pixels = _square(picture.cut(box), shown, config.size, config.interpolation, flipped)
    if config.color_jitter:
        pixels = np.asarray(images.color_jitter(Image.fromarray(pixels), config.color_jitter, rng))
    return View(pixels, box, shown, flipped, (picture.width, picture.height))


def whole_view(data: bytes, size: int, interpolation: str = "bilinear") -> View:
    """The whole picture, its longer side `size`, grey below or to the right of it. Raises BrokenImage."""
    picture = images.read(data, sandbox=sandbox.shared(1))
    box = (0, 0, picture.width, picture.height)
    shown = _shown(box, size)
    pixels = _square(picture.cut(box), shown, size, interpolation, False)
    return View(pixels, box, shown, False, (picture.width, picture.height))


def unseen(shown: tuple[int, int], picture: tuple[int, int]) -> View:
    """Where places of a picture (width, height) lie in its `whole_view`, of which `shown` is known, without its pixels."""
    return View(np.empty((0, 0, 3), np.uint8), (0, 0, *picture), shown, False, picture)


def _shown(box: tuple[int, int, int, int], size: int) -> tuple[int, int]:
    """Width and height of a box whose longer side becomes `size`."""
    scale = size / max(box[2:])
    return max(1, round(box[2] * scale)), max(1, round(box[3] * scale))


def _square(
    crop: np.ndarray, shown: tuple[int, int], size: int, interpolation: str, mirror: bool
) -> np.ndarray:
    """uint8 [size, size, 3]: the crop at the upper left, grey elsewhere."""
    if shown == (size, size):
        return resize(crop, size, interpolation, mirror=mirror)
    image = np.asarray(Image.fromarray(crop).resize(shown, images.INTERPOLATIONS[interpolation]))
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = np.array(GREY, np.uint8)
    pixels[: shown[1], : shown[0]] = image[:, ::-1] if mirror else image
    return pixels


def squashed_view(data: bytes, size: int, interpolation: str = "bilinear") -> View:
    """The whole picture as a square, whatever its shape. Raises BrokenImage."""
    picture = images.read(data, sandbox=sandbox.shared(1))
    box = (0, 0, picture.width, picture.height)
    pixels = resize(picture.cut(box), size, interpolation)
    return View(pixels, box, (size, size), False, (picture.width, picture.height))


def seen_objects(view: View, objects: Sequence[Object]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [N, 4] in the square, clipped to it, and numbers int64 [N] of those objects of which enough is seen.
    Crowds are left out."""
    if not objects:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    xywh = np.array([one.bbox for one in objects], np.float64)
    moved = view.boxes(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1))
    clipped = moved.clip(0, [*view.shown, *view.shown])
    sides, whole = clipped[:, 2:] - clipped[:, :2], moved[:, 2:] - moved[:, :2]
    good = (sides >= 1).all(1) & (sides.prod(1) >= SEEN * whole.prod(1))
    good &= ~np.array([one.iscrowd for one in objects])
    kept = np.flatnonzero(good)
    return clipped[kept].astype(np.float32), kept


def paint(annotations: Annotations, numbers: dict[int, int], width: int, height: int) -> np.ndarray:
    """uint8 [height, width] of the stored picture: the label map where the sample has one, else the masks of its objects by
    `numbers` (category id -> class), small ones over large ones, 0 elsewhere and 255 in crowds."""
    if annotations.label_map is not None:
        return annotations.label_map
    out = np.zeros((height, width), np.uint8)
    for one in sorted(annotations.objects, key=lambda one: (not one.iscrowd, -one.area)):
        if one.iscrowd or one.category_id in numbers:
            out[one.mask(height, width)] = IGNORE if one.iscrowd else numbers[one.category_id]
    return out
