"""What is known of places in a picture, for the picture as it is stored: boxes, polygons, run lengths, label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataload.annotations import IGNORE, mask_tools, run_lengths
from dataload.label_maps import encode_map, panoptic_map, plain_map, resize_map

PLACED = ("objects", "regions")
"""facts that hold boxes"""
Size = tuple[int, int]
"""width, height in pixels"""


@dataclass(frozen=True)
class MapFile:
    """A label map with a class number per pixel."""

    path: Path
    ignore: tuple[int, ...] = ()
    reduce_zero: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that it is made of."""
        return (self.path,)

    def told(self) -> Any:
        """What it is made by, to tell whether a packing is the same."""
        return ["file", self.ignore, self.reduce_zero]

    def read(self, size: Size) -> np.ndarray:
        """uint8 [H, W]. ValueError for a file that is none, OSError where it cannot be read."""
        return plain_map(self.path.read_bytes(), ignore=self.ignore, reduce_zero=self.reduce_zero)


@dataclass(frozen=True)
class PanopticFile:
    """A label map from COCO's panoptic PNG."""

    path: Path
    classes: Mapping[int, int] = field(default_factory=dict)
    """segment id -> class"""

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)

    def told(self) -> Any:
        return ["panoptic", sorted(self.classes.items())]

    def read(self, size: Size) -> np.ndarray:
        """As `MapFile.read`."""
        return panoptic_map(self.path.read_bytes(), self.classes)


@dataclass(frozen=True)
class Painted:
    """A label map from masks, painted one after another: COCO's stuff_*.json."""

    masks: Sequence[tuple[int, Any]]
    """(class, polygons or run lengths)"""

    @property
    def paths(self) -> tuple[Path, ...]:
        return ()

    def told(self) -> Any:
        return ["painted", list(self.masks)]

    def read(self, size: Size) -> np.ndarray:
        """As `MapFile.read`. Needs pycocotools."""
        width, height = size
        tools = mask_tools()
        result = np.full((height, width), IGNORE, dtype=np.uint8)
        for number, mask in self.masks:
            inside = tools.decode(run_lengths(mask, height, width)).astype(bool)
            if inside.shape != result.shape:
                raise ValueError(
                    f"a mask is for {inside.shape[1]}x{inside.shape[0]} pixels, not {width}x{height}"
                )
            result[inside] = number
        return result


LabelMap = MapFile | PanopticFile | Painted


def map_bytes(label_map: LabelMap, source: Size, stored: Size) -> bytes:
    """The PNG of a label map for a picture of `source` pixels that is stored with `stored`. ValueError, OSError."""
    values = label_map.read(source)
    found = (values.shape[1], values.shape[0])
    if found != source:
        raise ValueError(f"it has {found[0]}x{found[1]} pixels, the picture {source[0]}x{source[1]}")
    return encode_map(values if source == stored else resize_map(values, *stored))


def scaled(facts: Mapping[str, Any], source: Size, stored: Size) -> dict[str, Any]:
    """The facts of a picture of `source` pixels for one of `stored` pixels: "width", "height", boxes and masks."""
    result = {**facts, "width": stored[0], "height": stored[1]}
    if source == stored:
        return result
    x, y = stored[0] / source[0], stored[1] / source[1]
    for name in PLACED:
        if name in facts:
            result[name] = [_scaled_entry(entry, x, y, stored) for entry in facts[name]]
    return result


def _scaled_entry(entry: Mapping[str, Any], x: float, y: float, stored: Size) -> dict[str, Any]:
    left, top, width, height = entry["bbox"]
    result = {
        **entry,
        "bbox": [round(left * x, 2), round(top * y, 2), round(width * x, 2), round(height * y, 2)],
    }
    if "area" in entry:
        result["area"] = round(entry["area"] * x * y, 4)
    shape = entry.get("segmentation")
    if isinstance(shape, Mapping):
        tools = mask_tools()
        mask = resize_map(tools.decode(run_lengths(shape, *shape["size"])), *stored)
        packed = tools.encode(np.asfortranarray(mask))
        result["segmentation"] = {"size": list(packed["size"]), "counts": packed["counts"].decode("ascii")}
    elif shape:
        result["segmentation"] = [
            [round(value * (y if place % 2 else x), 2) for place, value in enumerate(polygon)]
            for polygon in shape
        ]
    return result
