"""COCO's AP of boxes, by pycocotools: from annotations and detections in memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dataload.annotations import Annotations

NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


def score_boxes(
    truth: Sequence[Annotations],
    found: Sequence[Sequence[tuple[int, list[float], float]]],
    names: Mapping[int, str],
) -> tuple[dict[str, float], dict[str, float]]:
    """(AP, AP50, AP75 and by size; AP50 per class). found: of each picture (category id, corners, score).

    A size that no object has is left out. Raises ImportError without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError(f"COCO's AP needs pycocotools: pip install 'auroraio[eval]' ({error})") from error
    ground: Any = {
        "images": [{"id": i + 1} for i in range(len(truth))],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
        "annotations": [],
    }
    for i, known in enumerate(truth):
        for one in known.objects:
            ground["annotations"].append(
                {"id": len(ground["annotations"]) + 1, "image_id": i + 1, "category_id": one.category_id,
                 "bbox": list(one.bbox), "area": one.area, "iscrowd": int(one.iscrowd)}
            )  # fmt: skip
    results = [
        {"image_id": i + 1, "category_id": number, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for i, boxes in enumerate(found)
        for number, (x0, y0, x1, y1), score in boxes
    ]
    if not results:
        return dict.fromkeys(NAMES[:3], 0.0), {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = {
        name: float(value)
        for name, value in zip(NAMES, evaluation.stats[:6], strict=True)
        if value >= 0 or name in NAMES[:3]
    }
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # [recalls, classes] at an overlap of one half
    per_class = {}
    for k, number in enumerate(evaluation.params.catIds):
        values = precision[:, k][precision[:, k] > -1]
        if len(values):
            per_class[names[number]] = float(np.mean(values))
    return scores, per_class
