"""Where a picture is cropped. Apart from images.py, whose torch takes seconds to import in a decoder's process."""

from __future__ import annotations

import math

import numpy as np


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop: the area's share is uniform in `scale`, the aspect
    (width/height) log-uniform in `ratio`; after ten boxes that do not fit, the largest centred one within
    `ratio` (Inception's crop, arXiv:1409.4842, with the semantics of torchvision's RandomResizedCrop).
    """
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        box_width = round(math.sqrt(target * aspect))
        box_height = round(math.sqrt(target / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.random() * (width - box_width + 1))
            top = int(rng.random() * (height - box_height + 1))
            return left, top, box_width, box_height
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        box_width = max(1, round(height * ratio[1]))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
