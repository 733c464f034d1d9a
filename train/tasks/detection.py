"""Detection: a head on Aurora's feature pyramid, scored by COCO's AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations, Object, read_classes
from dataload.images import normalize
from dataload.tokenizer import Tokenizer
from dataload.views import ViewConfig, seen_objects, training_view, unseen, whole_view
from models.aurora.detection import NOTHING, Detector, assign
from models.boxes import iou
from train.config import ConfigError
from train.evaluate.result import Score
from train.scores.detection import check, score_detections, truth_of
from train.tasks.base import Drawn, Example, Prediction, TaskResult, item_of
from train.tasks.classes import with_ids
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.data import classes_beside

SURE = 0.3  # boxes of at least this confidence are drawn


class Detection:
    """Boxes of objects."""

    name, media = "detection", "image"
    families: tuple[str, ...] = ("Aurora",)
    needs: tuple[str, ...] = ("objects",)
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ("pyramid",)

    def parts(self, one: Annotations) -> int:
        return 1

    def plan(self) -> None:
        """Before any compute: ImportError without what scores boxes."""
        check("bbox")

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        try:
            listed = object_classes(items)
        except ConfigError:
            if not (task.classes and task.class_ids):
                raise
            listed = dict(zip(task.class_ids, task.classes, strict=False))  # all that there is to know
        return with_ids(task, listed, f"{classes_beside(items)}/classes.json")

    def model(self, config: FinetuneConfig) -> nn.Module:
        return Detector(config.model, len(config.task.classes))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, data = config.model.image_size, config.data
        view_config = view_of(config, keep_shape=True)
        numbers = {int(number): i for i, number in enumerate(config.task.class_ids)}

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            if rng is None:
                view = whole_view(encoded, size, data.interpolation)
                return {"images": view.pixels, "shown": np.array([*view.shown, *view.picture])}
            known = [one for one in items.annotations(item).objects if one.category_id in numbers]
            view = training_view(encoded, view_config, rng)
            boxes, kept = seen_objects(view, known)
            classes = torch.tensor([numbers[known[i].category_id] for i in kept], dtype=torch.int64)
            asked, sides = assign(torch.from_numpy(boxes), classes, size, size)
            return {"images": view.pixels, "classes": asked.numpy(), "boxes": sides.numpy()}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        return [float((batch["classes"] != NOTHING).sum())]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = module(
            normalize(batch["images"]), batch["classes"], batch["boxes"], shares[0]
        )
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        found = model.detect(normalize(batch["images"]))
        predictions = []
        for number, one, shown in zip(batch.items, found, batch["shown"].tolist(), strict=True):
            across, down, width, height = shown
            boxes = unseen((across, down), (width, height)).back(one.boxes.cpu().double().numpy())
            value = (boxes, one.scores.cpu().double().numpy(), one.classes.cpu().numpy())
            predictions.append(Prediction(number, value))
        return predictions

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        task = config.task
        names = {int(number): name for number, name in zip(task.class_ids, task.classes, strict=True)}
        ids = list(names)
        truth, others = [], 0
        for one in predictions:
            known = items.annotations(item_of(items, one))
            asked = tuple(thing for thing in known.objects if thing.category_id in names)
            others += len(known.objects) - len(asked)
            truth.append(replace(known, objects=asked))
        found = [
            [(ids[int(c)], box.tolist(), float(s)) for box, s, c in zip(*one.value, strict=True)]
            for one in predictions
        ]
        detections = [
            {"image_id": known.key if known.image_id is None else known.image_id, "category_id": number,
             "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            for known, boxes in zip(truth, found, strict=True)
            for number, (x0, y0, x1, y1), score in boxes
        ]  # fmt: skip
        scored = score_detections(detections, truth_of(truth, names))
        examples = [
            example(one.item, known, boxes, names)
            for one, known, boxes in zip(predictions, truth, found, strict=True)
        ]
        absent = {
            name: "the truth has nothing of that size" for name, v in scored.scores.items() if v is None
        }
        return TaskResult(
            self.name,
            {name: Score(value) for name, value in scored.scores.items() if value is not None},
            dict(scored.counts),
            sorted(examples, key=lambda one: one.score),
            scored.per_category,
            {
                "not_scored": absent,
                "absent_classes": list(scored.absent),
                "objects_of_other_classes": others,
            },
            {"detection_results.json": detections},
        )


def view_of(config: FinetuneConfig, *, keep_shape: bool = False) -> ViewConfig:
    """How training pictures are cropped."""
    data = config.data
    return ViewConfig(
        config.model.image_size,
        data.crop_scale,
        data.crop_ratio,
        data.flip,
        data.color_jitter,
        data.interpolation,
        keep_shape,
    )


def object_classes(items: Items) -> dict[str, str]:
    """Id -> name of the categories that classes.json beside the shards lists. Raises ConfigError without it."""
    try:
        found = read_classes(classes_beside(items)).objects
    except (OSError, ValueError) as error:
        raise ConfigError(f"the classes of the objects are not known: {error}") from error
    if not found:
        raise ConfigError(f"{classes_beside(items)}/classes.json lists no objects")
    return {str(number): name for number, name in found.items()}


def example(
    item: int, known: Annotations, found: list[tuple[int, list[float], float]], names: dict[int, str]
) -> Example:
    """A picture with its boxes; the score is the F1 of the boxes that are sure, at an overlap of one half."""
    true = [one for one in known.objects if not one.iscrowd]
    sure = [one for one in found if one[2] >= SURE]
    hits = matched(true, sure)
    score = 2 * hits / (len(true) + len(sure)) if true or sure else 1.0
    boxes = [Drawn(corners(one), one.category, True) for one in true]
    boxes += [Drawn(tuple(box), f"{names[number]} {s:.2f}", False) for number, box, s in sure]  # type: ignore[arg-type]
    said = ", ".join(f"{names[number]} {s:.2f}" for number, _, s in sure) or "nothing"
    return Example(
        item, score, [("found", said), ("true", ", ".join(one.category for one in true) or "nothing")], boxes
    )


def corners(one: Object) -> tuple[float, float, float, float]:
    """Left, top, right, bottom."""
    left, top, width, height = one.bbox
    return left, top, left + width, top + height


def matched(true: list[Object], found: list[tuple[int, list[float], float]]) -> int:
    """How many true objects have a box of their class that overlaps by one half; each box serves one."""
    if not true or not found:
        return 0
    overlaps = iou(
        torch.tensor([corners(one) for one in true], dtype=torch.float64),
        torch.tensor([box for _, box, _ in found], dtype=torch.float64),
    )
    taken: set[int] = set()
    for i, one in enumerate(true):
        able = [
            (-float(overlaps[i, j]), j)
            for j, (number, _, _) in enumerate(found)
            if number == one.category_id and j not in taken and overlaps[i, j] >= 0.5
        ]
        if able:
            taken.add(min(able)[1])
    return len(taken)
