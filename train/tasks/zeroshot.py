"""Zero-shot classification: a picture gets the class whose prompts are nearest to it in the joint space; no weight learns.

python -m train.evaluate classify --checkpoint runs/aurora-tiny --data shards/ --templates "a picture of a {}"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
from train.result import Score
from train.tasks.base import Example, Prediction, TaskResult, item_of
from train.tasks.config import FinetuneConfig, TaskConfig

TEMPLATES = ("{}", "a {}", "a picture of a {}", "there is a {}")

NOTHING = "zero-shot classification trains nothing: python -m train.evaluate classify"


class ZeroShot:
    """An item is a picture with labels; where there are none, with objects, whose categories are its labels."""

    name, family, media = "classify", "Aurora", "image"
    needs: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __init__(self, templates: Sequence[str] = TEMPLATES) -> None:
        self.templates = tuple(templates)

    def parts(self, one: Annotations) -> int:
        return 1 if labels_of(one) else 0

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        from dataclasses import replace

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
        images = base.image_embedding(base.encode_image(normalize(batch["images"])))
        scores = (images @ self._classes.T).float().cpu().numpy()
        return [Prediction(number, row) for number, row in zip(batch.items, scores, strict=True)]

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        """A picture with several labels is right with any of them."""
        classes = config.task.classes
        known = [labels_of(items.annotations(item_of(items, one))) for one in predictions]
        right, right5, examples = [], [], []
        hits: Counter[str] = Counter()
        for one, labels in zip(predictions, known, strict=True):
            order = np.argsort(-one.value, kind="stable")
            right.append(classes[order[0]] in labels)
            right5.append(bool({classes[i] for i in order[:5]} & labels))
            hits.update(label for label in labels if right[-1])
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
        chance = float(np.mean([len(labels) for labels in known])) / len(classes)
        common = counts.most_common(1)[0]
        scores = {
            "top-1": Score(sum(right) / total, {"chance": chance, f"always {common[0]}": common[1] / total}),
            "top-5": Score(sum(right5) / total, {"chance": min(1.0, 5 * chance)}),
        }
        table = {label: hits[label] / count for label, count in counts.items()}
        about = {"templates": list(self.templates), "classes": list(classes)}
        return TaskResult(
            self.name, scores, {"pictures": total, "classes": len(classes)}, examples, table, about
        )


def labels_of(one: Annotations) -> set[str]:
    """The labels of a picture, or the categories of its objects."""
    return set(one.labels) or {thing.category for thing in one.objects if not thing.iscrowd}
