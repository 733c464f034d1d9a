"""What a task is: the model with its head, views of samples, losses, predictions, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from dataload.annotated import Item, Items, Maker, TaskBatch
from dataload.annotations import Annotations
from dataload.tokenizer import Tokenizer
from train.evaluate.result import Score
from train.tasks.config import FinetuneConfig, TaskConfig


@dataclass(frozen=True)
class Prediction:
    """What the model says of one item: plain data, so that ranks can send it to each other."""

    item: int
    """its number among the items"""
    value: Any


@dataclass(frozen=True)
class Drawn:
    """A box for the page, in pixels of the stored picture."""

    box: tuple[float, float, float, float]
    """left, top, right, bottom"""
    name: str
    true: bool
    """whether it is the truth, or what the model found"""


@dataclass(frozen=True)
class Example:
    """One item for the page."""

    item: int
    score: float
    """the lower, the worse"""
    lines: list[tuple[str, str]]
    """what is said beside the picture: (label, text)"""
    boxes: list[Drawn] = field(default_factory=list)
    maps: tuple[np.ndarray, np.ndarray] | None = None
    """label maps uint8 [H, W], true and found"""


@dataclass(frozen=True)
class TaskResult:
    """Scores of a task, and what they were measured on."""

    task: str
    scores: dict[str, Score]
    counts: dict[str, int]
    examples: list[Example] = field(default_factory=list)
    """the worst first"""
    table: dict[str, float] = field(default_factory=dict)
    """a score per class"""
    about: dict[str, Any] = field(default_factory=dict)
    """what a reader has to know: prompt, how words were cut, what was not scored and why"""
    files: dict[str, Any] = field(default_factory=dict)
    """further files by name, written as JSON: submissions in the official format"""

    def scalars(self) -> dict[str, float]:
        """Flat, for logs."""
        return {name: score.value for name, score in self.scores.items()}

    def to_json(self) -> dict[str, Any]:
        scores = {name: score.to_json() for name, score in self.scores.items()}
        return {"scores": scores, "counts": self.counts, "per_class": self.table, **self.about}

    def lines(self) -> list[str]:
        """A table to read: every score beside its baselines."""
        rows = []
        for name, score in self.scores.items():
            against = ", ".join(f"{which} {value:.4f}" for which, value in score.baselines.items())
            rows.append(
                f"{self.task:<13} {name:<26} {score.value:>9.4f}" + (f"  ({against})" if against else "")
            )
        notes = self.about.get("not_scored", {})
        return rows + [
            f"{self.task:<13} {name:<26} {'not scored':>9}: {reason}" for name, reason in notes.items()
        ]


class Task(Protocol):
    """One task. What the engine asks for is `counts` and `forward`; see train/families.py."""

    name: str
    families: tuple[str, ...]
    """of the models that it is for: Aurora, PerceiverIO"""
    media: str
    needs: tuple[str, ...]
    ragged: tuple[str, ...]
    """arrays of a view that vary in length"""
    fresh: tuple[str, ...]
    """parts of the pre-trained model that pre-training does not reach, and that are never frozen"""

    def parts(self, one: Annotations) -> int:
        """Items of a sample."""

    def complete(self, task: TaskConfig, items: Items) -> TaskConfig:
        """The configuration with the classes of the training data, where it names none."""

    def model(self, config: FinetuneConfig) -> nn.Module:
        """A new one; the pre-trained model in it is `base`."""

    def maker(self, config: FinetuneConfig, tokenizer: Tokenizer) -> Maker:
        """What makes views of items."""

    def counts(self, batch: TaskBatch, config: FinetuneConfig) -> Sequence[float]:
        """What the losses of a micro-batch are sums over."""

    def forward(
        self, module: nn.Module, batch: TaskBatch, config: FinetuneConfig, shares: Sequence[float]
    ) -> dict[str, Tensor]:
        """The losses of a micro-batch by name, divided by `shares`: the counts of the whole step."""

    def predict(
        self, model: Any, batch: TaskBatch, items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> list[Prediction]:
        """What the model says of a batch; images are where the model is."""

    def score(
        self, predictions: Sequence[Prediction], items: Items, config: FinetuneConfig, tokenizer: Tokenizer
    ) -> TaskResult:
        """All predictions, each item at most once, in the order of the items -> scores."""


def item_of(items: Items, prediction: Prediction) -> Item:
    """The item that a prediction is about."""
    return items.items[prediction.item]
