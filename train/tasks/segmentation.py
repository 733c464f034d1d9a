"""Semantic segmentation: a head on Aurora's feature pyramid, scored by the data set's mIoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import IGNORE, Annotations, read_classes
from dataload.images import normalize
from dataload.tokenizer import Tokenizer
from dataload.views import paint, training_view, whole_view
from models.aurora.segmentation import Segmenter
from train.config import ConfigError
from train.result import Score
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.data import classes_beside
from train.tasks.detection import view_of

BACKGROUND = "background"


class Segmentation:
    """A class per pixel: of KEY.seg.png, or the objects' masks over a background."""

    name, family, media = "segmentation", "Aurora", "image"
    needs: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()

    def parts(self, one: Annotations) -> int:
        return 1 if one.has & {"segmentation", "objects"} else 0

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        """classes.json's list for label maps (`class_ids` are their values), or the objects' categories behind a background
        (`class_ids` begin with "" then)."""
        if task.classes:
            return task
        try:
            found = read_classes(classes_beside(items))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the classes of the pixels are not known: {error}") from error
        maps = any("segmentation" in one.has for one in items.all())
        if maps and found.segmentation:
            values, names = tuple(map(str, found.segmentation)), tuple(found.segmentation.values())
        elif found.objects:
            values, names = ("", *map(str, found.objects)), (BACKGROUND, *found.objects.values())
        else:
            raise ConfigError(f"{classes_beside(items)}/classes.json lists neither label maps nor objects")
        if len(names) > IGNORE:
            raise ConfigError(f"{len(names)} classes; label maps of 8 bits hold {IGNORE}")
        return replace(task, classes=names, class_ids=values)

    def model(self, config: FinetuneConfig) -> nn.Module:
        return Segmenter(config.model, len(config.task.classes))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, data, view_config = config.model.image_size, config.data, view_of(config)
        truth = Truth(config.task)

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            if rng is None:
                view = whole_view(encoded, size, data.interpolation)
                return {"images": view.pixels, "shown": np.array([*view.shown, *view.picture])}
            view = training_view(encoded, view_config, rng)
            stored = truth(items.annotations(item, label_map=True), *view.picture)
            return {"images": view.pixels, "label_map": view.label_map(stored)}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        return [float((batch["label_map"] != IGNORE).sum()), float(len(batch))]

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = module(
            normalize(batch["images"]), batch["label_map"], shares[0], shares[1]
        )
        return losses

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        """Label maps of the stored pictures' size. What is scored is the confusion matrix of each, so that ranks send each
        other little."""
        logits = model.logits(normalize(batch["images"])).float()
        truth = Truth(config.task)
        predictions = []
        for number, one, (across, down, width, height) in zip(
            batch.items, logits, batch["shown"].tolist(), strict=True
        ):
            seen = one[None, :, :down, :across]
            large = F.interpolate(seen, size=(height, width), mode="bilinear", align_corners=False)
            found = large[0].argmax(0).to(torch.uint8).cpu().numpy()
            known = items.annotations(items.items[number], label_map=True)
            matrix = confusion(truth(known, width, height), found, len(config.task.classes))
            predictions.append(Prediction(number, (matrix, shrink(found))))
        return predictions

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        classes, truth = config.task.classes, Truth(config.task)
        total = np.sum([one.value[0] for one in predictions], axis=0)
        per_class = overlaps(total)
        there = ~np.isnan(per_class)
        table = {name: float(value) for name, value in zip(classes, per_class, strict=True) if value == value}
        single = [(float(np.nanmean(overlaps(one.value[0]))), one) for one in predictions]
        single.sort(key=lambda one: one[0])
        examples = []
        for value, one in single[:24]:
            known = items.annotations(item_of(items, one), label_map=True)
            width, height = known.width, known.height
            if not width:
                small = one.value[1]
                width, height = small.shape[1], small.shape[0]
            stored = shrink(truth(known, width, height))
            said = ", ".join(classes[i] for i in np.unique(one.value[1]))
            true = ", ".join(classes[i] for i in np.unique(stored) if i != IGNORE)
            examples.append(
                Example(one.item, value, [("found", said), ("true", true)], maps=(stored, one.value[1]))
            )
        common = np.zeros_like(total)
        common[:, int(total.sum(1).argmax())] = total.sum(1)  # every pixel the most common class
        scores = {
            "mIoU": Score(
                float(per_class[there].mean()), {"all pixels one class": float(np.nanmean(overlaps(common)))}
            ),
            "pixel accuracy": Score(
                float(np.trace(total) / max(total.sum(), 1)),
                {"all pixels one class": float(total.sum(1).max() / max(total.sum(), 1))},
            ),
        }
        counts = {"pictures": len(predictions), "pixels": int(total.sum()), "classes": int(there.sum())}
        about = {"absent_classes": [name for name, there_ in zip(classes, there, strict=True) if not there_]}
        return TaskResult(self.name, scores, counts, examples, table, about)


class Truth:
    """(annotations, width, height of the stored picture) -> label map uint8 in the model's classes, 255 = not asked for."""

    def __init__(self, task: TaskConfig) -> None:
        self.objects = bool(task.class_ids) and task.class_ids[0] == ""
        ids = [int(number) if number else -1 for number in task.class_ids]
        self.numbers = {number: i for i, number in enumerate(ids) if number >= 0}
        self.table = np.full(256, IGNORE, np.uint8)
        if not self.objects:
            for value, number in self.numbers.items():
                self.table[value] = number

    def __call__(self, known: Annotations, width: int, height: int) -> np.ndarray:
        stored = paint(known, self.numbers, width, height)
        return stored if self.objects else self.table[stored]


def confusion(true: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: pixels of each true class (rows) by the class that was found."""
    asked = true != IGNORE
    pairs = classes * true[asked].astype(np.int64) + found[asked]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def overlaps(matrix: np.ndarray) -> np.ndarray:
    """IoU of each class [C]; NaN where neither the truth nor the model has a pixel of it."""
    hits = np.diag(matrix).astype(float)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def shrink(label_map: np.ndarray, most: int = 160) -> np.ndarray:
    """Every n-th pixel, so that no side is longer than `most`: for the page."""
    step = -(-max(label_map.shape) // most)
    return np.ascontiguousarray(label_map[::step, ::step])
