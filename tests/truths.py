"""Boxes and label maps by hand, for tests of scores."""

from __future__ import annotations

from typing import Any

import numpy as np


def boxes_truth() -> dict[str, Any]:
    return {
        "images": [{"id": "b", "width": 100, "height": 80}, {"id": "a", "width": 100, "height": 80}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 0, "image_id": "a", "category_id": 3, "bbox": [10, 10, 20, 20]},
            {"id": 1, "image_id": "b", "category_id": 3, "bbox": [40, 30, 40, 40]},
        ],
    }


def found_box(image: str, box: list[float], score: float, category: int = 3) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def maps(count: int = 5) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(3)
    truth = [rng.integers(0, 4, (13, 9 + n)).astype(np.uint8) for n in range(count)]
    predicted = [np.where(rng.random(one.shape) < 0.6, one, rng.integers(0, 4, one.shape)) for one in truth]
    for one in truth:
        one[rng.random(one.shape) < 0.2] = 255
    return [one.astype(np.uint8) for one in predicted], truth
