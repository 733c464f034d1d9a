"""Zero-shot classification: a picture gets the class whose prompts are nearest to it in the joint space; no weight learns.

python -m train.evaluate classify --checkpoint runs/aurora-tiny --data shards/ --templates "a picture of a {}"
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations
from dataload.images import normalize
from dataload.tokenizer import Tokenizer
from dataload.views import squashed_view
from models.pretrained import class_embeddings
from train.config import ConfigError
from train.evaluate.result import Score
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.config import FinetuneConfig, TaskConfig

TEMPLATES = ("{}", "a {}", "a picture of a {}", "there is a {}")

NOTHING = "zero-shot classification trains nothing: python -m train.evaluate classify"


class ZeroShot:
    """An item is a picture with labels; where there are none, with objects, whose categories are its labels."""

    name, media = "classify", "image"
    families: tuple[str, ...] = ("Aurora", "PerceiverIO")
    needs: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __init__(self, templates: Sequence[str] = TEMPLATES, classes: Sequence[str] = ()) -> None:
        """classes: names to tell apart; none = those of the data. Raises ConfigError for a template without {}, for one class
        alone, and for one that comes twice."""
        self.templates, self.classes = tuple(templates), tuple(classes)
        self.seen: Counter[str] = Counter()
        """labels that pictures had"""
        if wrong := [template for template in self.templates if "{}" not in template]:
            raise ConfigError(f"the prompt template {wrong[0]!r} lacks {{}}, the place of the class")
        if twice := [name for name, count in Counter(self.classes).items() if count > 1]:
            raise ConfigError(f"--classes has {twice[0]!r} twice")
        if len(self.classes) == 1:
            raise ConfigError(f"--classes has {self.classes[0]!r} alone; two or more are needed")

    def parts(self, one: Annotations) -> int:
        labels = labels_of(one)
        self.seen.update(labels)
        return 1 if labels & (set(self.classes) or labels) else 0

    def items(self, find: Callable[[], Items]) -> Items:
        """What `find` gives. Raises ConfigError where no picture has one of the classes."""
        self.seen.clear()
        try:
            return find()
        except ValueError:
            if not self.classes or not self.seen:
                raise
        there = ", ".join(sorted(self.seen)[:12]) + (" ..." if len(self.seen) > 12 else "")
        raise ConfigError(
            f"no picture is of one of --classes {', '.join(self.classes)}; the data's are {there}"
        )

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        if self.classes:
            return replace(task, classes=self.classes)
        names = sorted({label for one in items.all() for label in labels_of(one)})
        if len(names) < 2:
            raise ConfigError(f"the pictures have {len(names)} class; two or more are needed")
        return replace(task, classes=tuple(names))

    def model(self, config: FinetuneConfig) -> nn.Module:
        raise ConfigError(NOTHING)

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        size = config.model.image_size

        def make(items: Items, item: Item, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
            return {"images": squashed_view(items.index.image(item.sample), size).pixels}

        return make

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        raise ConfigError(NOTHING)

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        raise ConfigError(NOTHING)

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        base = getattr(model, "base", model)
        if not hasattr(self, "_classes"):
            length, device = config.model.text_length, batch["images"].device

            def embed(texts: Sequence[str]) -> Tensor:
                found: Tensor = base.text_embedding(tokenizer.encode_batch(texts, length).to(device))
                return found

            self._classes = class_embeddings(embed, config.task.classes, self.templates)
        images = base.features(normalize(batch["images"]))[0]
        scores = (images @ self._classes.T).float().cpu().numpy()
        return [Prediction(number, row) for number, row in zip(batch.items, scores, strict=True)]

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        """A picture with several labels is right with any of them. Of a class the share of its pictures is given whose first
        guess it is."""
        classes = config.task.classes
        known = [labels_of(items.annotations(item_of(items, one))) & set(classes) for one in predictions]
        right, right5, examples = [], [], []
        hits: Counter[str] = Counter()
        for one, labels in zip(predictions, known, strict=True):
            order = np.argsort(-one.value, kind="stable")
            right.append(classes[order[0]] in labels)
            right5.append(bool({classes[i] for i in order[:5]} & labels))
            hits.update(labels & {classes[order[0]]})
            odds = torch.from_numpy(one.value * 20).softmax(0)
            said = ", ".join(f"{classes[i]} {odds[i]:.2f}" for i in order[:3])
            best = max(float(one.value[classes.index(label)]) for label in labels)
            examples.append(
                Example(
                    one.item,
                    best - float(one.value.max()),
                    [("said", said), ("true", ", ".join(sorted(labels)))],
                )
            )
        examples.sort(key=lambda one: one.score)
        counts = Counter(label for labels in known for label in labels)
        total = len(known)
        chance = [float(np.mean([guessed(len(labels), len(classes), k) for labels in known])) for k in (1, 5)]
        common = counts.most_common(1)[0]
        scores = {
            "top-1": Score(
                sum(right) / total, {"chance": chance[0], f"always {common[0]}": common[1] / total}
            ),
            "top-5": Score(sum(right5) / total, {"chance": chance[1]}),
        }
        table = {label: hits[label] / count for label, count in counts.items()}
        about: dict[str, Any] = {"templates": list(self.templates), "classes": list(classes)}
        if others := {label: count for label, count in sorted(self.seen.items()) if label not in classes}:
            about["labels_of_other_classes"] = others
        return TaskResult(
            self.name, scores, {"pictures": total, "classes": len(classes)}, examples, table, about
        )


def guessed(right: int, classes: int, tries: int) -> float:
    """Chance that one of `right` classes is among `tries` different ones, drawn blindly of all."""
    return 1 - math.comb(classes - right, tries) / math.comb(classes, tries) if tries < classes else 1.0


def labels_of(one: Annotations) -> set[str]:
    """The labels of a picture, or the categories of its objects."""
    return set(one.labels) or {thing.category for thing in one.objects if not thing.iscrowd}
