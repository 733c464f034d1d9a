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
from dataload.broken import BrokenSample
from dataload.images import normalize
from dataload.tokenizer import Tokenizer
from dataload.views import paint, training_view, whole_view
from models.aurora.segmentation import Segmenter
from train.config import ConfigError
from train.evaluate.result import Score
from train.scores.segmentation import ConfusionMatrix, pair_counts
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.classes import with_ids
from train.tasks.config import FinetuneConfig, TaskConfig
from train.tasks.data import classes_beside
from train.tasks.detection import view_of

BACKGROUND = "background"


class Segmentation:
    """A class per pixel: of KEY.seg.png, or the objects' masks over a background."""

    name, media = "segmentation", "image"
    families: tuple[str, ...] = ("Aurora",)
    needs: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ("pyramid",)

    def parts(self, one: Annotations) -> int:
        return 1 if one.has & {"segmentation", "objects"} else 0

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        """classes.json's list for label maps (`class_ids` are their values), or the objects' categories behind a background
        (`class_ids` begin with "" then), or those of them that the task names."""
        try:
            found = read_classes(classes_beside(items))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the classes of the pixels are not known: {error}") from error
        maps = any("segmentation" in one.has for one in items.all())
        if maps and found.segmentation:
            listed, behind = {str(value): name for value, name in found.segmentation.items()}, False
        elif found.objects:
            listed, behind = {str(number): name for number, name in found.objects.items()}, True
        else:
            raise ConfigError(f"{classes_beside(items)}/classes.json lists neither label maps nor objects")
        if behind and task.class_ids[:1] == ("",):  # complete already: its background comes again below
            task = replace(task, classes=task.classes[1:], class_ids=task.class_ids[1:])
        elif behind and BACKGROUND in task.classes and BACKGROUND not in listed.values():
            task = replace(task, classes=tuple(name for name in task.classes if name != BACKGROUND))
            if not task.classes:
                raise ConfigError("task.classes has the background alone; objects' classes are needed")
        task = with_ids(task, listed, f"{classes_beside(items)}/classes.json")
        if behind:
            task = replace(task, classes=(BACKGROUND, *task.classes), class_ids=("", *task.class_ids))
        if len(task.classes) > IGNORE:
            raise ConfigError(f"{len(task.classes)} classes; label maps of 8 bits hold {IGNORE}")
        return task

    def model(self, config: FinetuneConfig) -> nn.Module:
        return Segmenter(config.model, len(config.task.classes))

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size, data, view_config = config.model.image_size, config.data, view_of(config, keep_shape=True)
        truth = Truth(config.task)

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            encoded = items.index.image(item.sample)
            if rng is None:
                view = whole_view(encoded, size, data.interpolation)
                # `predict` reads the truth again: it may be large, and batches go to the device. One that cannot be read
                # shows here, where a broken sample is counted and left out
                truth(items.annotations(item, label_map=True), *view.picture)
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
        """Label maps of the stored pictures' size. What is kept is which pairs of classes each has, so that ranks send each
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
            pairs = pair_counts(found, truth(known, width, height), len(config.task.classes))
            predictions.append(Prediction(number, (pairs, shrink(found))))
        return predictions

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        classes, truth = config.task.classes, Truth(config.task)
        matrix, alone = ConfusionMatrix(classes), []
        for one in predictions:
            matrix.add_counts(one.value[0])
            single = ConfusionMatrix(classes)
            single.add_counts(one.value[0])
            alone.append((single.scores().mIoU if single.pixels.any() else 1.0, one))
        scored = matrix.scores()
        common = ConfusionMatrix(classes)  # every pixel the most common class
        common.pixels[:, matrix.pixels.sum(1).argmax()] = matrix.pixels.sum(1)
        constant = common.scores()
        alone.sort(key=lambda one: one[0])
        examples = []
        for value, one in alone[:24]:
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
        baseline = f"all pixels {classes[int(matrix.pixels.sum(1).argmax())]}"
        scores = {
            "mIoU": Score(scored.mIoU, {baseline: constant.mIoU}),
            "pixel accuracy": Score(scored.pixel_accuracy, {baseline: constant.pixel_accuracy}),
            "mean accuracy": Score(scored.mean_accuracy),
            "frequency-weighted IoU": Score(scored.frequency_weighted_IoU),
        }
        about = {"absent_classes": list(scored.absent)}
        return TaskResult(self.name, scores, dict(scored.counts), examples, scored.per_class, about)


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
        """Raises BrokenSample for a label map of another size, for a mask that cannot be read, and for a sample with the other
        kind of truth: its numbers mean other classes."""
        if ("segmentation" in known.has) == self.objects:
            asked, there = ("objects", "a label map") if self.objects else ("a label map", "objects")
            raise BrokenSample(
                f"it has {there}, and this task's truth is {asked}: keep one kind in a set of shards"
            )
        stored = paint(known, self.numbers, width, height)
        if stored.shape != (height, width):
            down, across = stored.shape
            raise BrokenSample(f"its label map is {across}x{down}, the picture {width}x{height}")
        return stored if self.objects else self.table[stored]


def shrink(label_map: np.ndarray, most: int = 160) -> np.ndarray:
    """Every n-th pixel, so that no side is longer than `most`: for the page."""
    step = -(-max(label_map.shape) // most)
    return np.ascontiguousarray(label_map[::step, ::step])
