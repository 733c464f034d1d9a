"""Scores of sound (or any) classification: mean average precision of several labels at once, and accuracy of one.

mAP is what AudioSet reports: the average precision of each class over all clips, then the mean over classes. Thresholds
are exact, every score is one: a grid of 200 gives another value. A class that no clip has cannot be ranked: it is
left out of the mean and named, never counted as 0 and never in silence.

Letters: N clips, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LabelScores:
    """Shares of 1."""

    mean_average_precision: float
    """over the classes with at least one clip"""
    average_precision: dict[str, float]
    """by class, without the skipped ones"""
    skipped: tuple[str, ...]
    """classes that no clip has"""
    chance: float
    """mAP that scores without any knowledge tend to: the mean share of clips that have a class"""
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a results file."""
        return {
            "mean_average_precision": self.mean_average_precision,
            "average_precision": self.average_precision,
            "skipped_classes": list(self.skipped),
            "chance": self.chance,
            "counts": self.counts,
        }


@dataclass(frozen=True)
class AccuracyScores:
    """Shares of 1."""

    accuracy: float
    per_class: dict[str, float]
    """share of a class's clips that are right (recall), of the classes that occur"""
    majority: float
    """accuracy of always saying the most frequent class"""
    confusion: np.ndarray
    """int64 [K, K]: rows are true, columns are predicted"""
    skipped: tuple[str, ...]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a results file."""
        return {
            "accuracy": self.accuracy,
            "mean_class_accuracy": sum(self.per_class.values()) / len(self.per_class),
            "per_class": self.per_class,
            "majority": self.majority,
            "skipped_classes": list(self.skipped),
            "counts": self.counts,
        }


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under precision over recall as a step function, as scikit-learn defines it; ties are one threshold.

    scores float [N], positive bool [N]. ValueError where nothing is positive.
    """
    positive = positive.astype(bool)
    total = int(positive.sum())
    if not total:
        raise ValueError("average precision needs at least one positive")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of each group of equal scores
    found = hits[last].astype(np.float64)
    precision, recall = found / (last + 1), found / total
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def label_scores(scores: np.ndarray, truth: np.ndarray, classes: Sequence[str]) -> LabelScores:
    """mAP of several labels per clip.

    scores: float [N, K], the higher the likelier (logits or probabilities); truth: bool or 0/1 [N, K]. ValueError for
    shapes that do not fit, for scores that are not finite, and where no class has a clip.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth).astype(bool)
    if scores.shape != truth.shape or scores.ndim != 2 or scores.shape[1] != len(classes):
        raise ValueError(
            f"scores {list(scores.shape)}, truth {list(truth.shape)} and {len(classes)} classes do not fit; [N, K] is expected"
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{int((~np.isfinite(scores)).any(1).sum()):,} clips have scores that are not finite"
        )
    there = np.asarray(truth.sum(axis=0) > 0)
    if not there.any():
        raise ValueError(f"none of the {len(truth):,} clips has any of the {len(classes):,} classes")
    found = {name: average_precision(scores[:, k], truth[:, k]) for k, name in enumerate(classes) if there[k]}
    counts = {"clips": len(truth), "classes": len(classes), "scored_classes": len(found)}
    return LabelScores(
        sum(found.values()) / len(found),
        found,
        tuple(name for k, name in enumerate(classes) if not there[k]),
        float(truth[:, there].mean()),
        counts | {"labels": int(truth.sum())},
    )


def accuracy_scores(predicted: np.ndarray, truth: np.ndarray, classes: Sequence[str]) -> AccuracyScores:
    """Accuracy of one class per clip.

    predicted: int [N]; truth: int [N]; both count from 0. ValueError for none, for lengths that differ, or for a number
    that stands for no class.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape or predicted.ndim != 1 or not len(truth):
        raise ValueError(
            f"predicted {list(predicted.shape)} and truth {list(truth.shape)} do not fit; [N] is expected, N > 0"
        )
    for name, values in (("predicted", predicted), ("truth", truth)):
        if values.min() < 0 or values.max() >= len(classes):
            raise ValueError(
                f"{name}: {values.min()} to {values.max()}, but there are classes 0 to {len(classes) - 1}"
            )
    confusion = np.bincount(truth * len(classes) + predicted, minlength=len(classes) ** 2)
    confusion = confusion.reshape(len(classes), len(classes))
    of_class = confusion.sum(axis=1)
    return AccuracyScores(
        float((predicted == truth).mean()),
        {name: float(confusion[k, k] / of_class[k]) for k, name in enumerate(classes) if of_class[k]},
        float(of_class.max() / len(truth)),
        confusion,
        tuple(name for k, name in enumerate(classes) if not of_class[k]),
        {"clips": len(truth), "classes": len(classes)},
    )
