"""Semantic segmentation: mean intersection over union from one confusion matrix of the whole data set.

    matrix = ConfusionMatrix(classes)
    for predicted, truth in pictures:                    # uint8 [H, W] each
        matrix.add(predicted, truth)
    matrix.scores()["mIoU"]

The mean over batches of mIoU is another number. Pixels whose truth is the ignore label (255) count nowhere. A class that
is neither in the truth nor predicted has no IoU: it is left out of the mean and named.

Over ranks: `pair_counts` of each picture travels (gather.py), and `ConfusionMatrix.add_counts` takes it.

Letters: H W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataload.annotations import IGNORE
from dataload.label_maps import read_map

PairCounts = tuple[np.ndarray, np.ndarray]
"""(truth * K + predicted int64 [P], pixels int64 [P]) of the pairs that occur in a picture"""


@dataclass(frozen=True)
class SegmentationScores:
    """Shares of 1."""

    mIoU: float
    """over the classes that occur"""
    pixel_accuracy: float
    mean_accuracy: float
    """of the classes' recalls, over the classes in the truth"""
    frequency_weighted_IoU: float
    per_class: dict[str, float]
    """IoU of the classes that occur"""
    absent: tuple[str, ...]
    """classes neither in the truth nor predicted"""
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """For a results file."""
        return {
            "mIoU": self.mIoU, "pixel_accuracy": self.pixel_accuracy, "mean_accuracy": self.mean_accuracy,
            "frequency_weighted_IoU": self.frequency_weighted_IoU, "per_class": self.per_class,
            "absent_classes": list(self.absent), "counts": self.counts,
        }  # fmt: skip


def pair_counts(predicted: np.ndarray, truth: np.ndarray, classes: int, ignore: int = IGNORE) -> PairCounts:
    """Which (truth, predicted) pairs a picture has, and how often.

    predicted, truth: integers [H, W]. ValueError for sizes that differ, and for a value that stands for no class; in
    `truth`, `ignore` is allowed, in `predicted` only where the truth has it too.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"predicted {list(predicted.shape)} and truth {list(truth.shape)} have other sizes")
    asked = truth != ignore
    right, said = truth[asked].astype(np.int64), predicted[asked].astype(np.int64)
    for name, values in (("the truth", right), ("predicted", said)):
        if len(values) and (values.min() < 0 or values.max() >= classes):
            raise ValueError(
                f"{name} has values {values.min()} to {values.max()}, but there are classes 0 to {classes - 1} "
                f"(and {ignore} in the truth, which is not scored)"
            )
    codes, pixels = np.unique(right * classes + said, return_counts=True)
    return codes, pixels.astype(np.int64)


class ConfusionMatrix:
    """Pixels by true and predicted class, summed over pictures."""

    def __init__(self, classes: Sequence[str], ignore: int = IGNORE) -> None:
        self.classes, self.ignore = list(classes), ignore
        self.pixels = np.zeros((len(classes), len(classes)), dtype=np.int64)
        """[K, K]: rows are true, columns are predicted"""
        self.pictures = 0

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """A picture; ValueError as `pair_counts`."""
        self.add_counts(pair_counts(predicted, truth, len(self.classes), self.ignore))

    def add_counts(self, counts: PairCounts) -> None:
        """A picture of which the pairs are counted already."""
        self.pixels.ravel()[counts[0]] += counts[1]
        self.pictures += 1

    def scores(self) -> SegmentationScores:
        """Raises ValueError where no pixel has a true class."""
        true, said, both = self.pixels.sum(1), self.pixels.sum(0), np.diag(self.pixels)
        total = int(true.sum())
        if not total:
            raise ValueError(f"none of the {self.pictures:,} pictures has a pixel with a class")
        union = true + said - both
        there = np.flatnonzero(union)
        iou = {self.classes[k]: float(both[k] / union[k]) for k in there}
        recall = [float(both[k] / true[k]) for k in np.flatnonzero(true)]
        weighted = sum(float(true[k] / total) * iou[self.classes[k]] for k in there)
        return SegmentationScores(
            sum(iou.values()) / len(iou),
            float(both.sum() / total),
            sum(recall) / len(recall),
            weighted,
            iou,
            tuple(name for k, name in enumerate(self.classes) if not union[k]),
            {"pictures": self.pictures, "pixels": total, "classes": len(self.classes)},
        )


def score_maps(
    predicted: Mapping[Any, np.ndarray], truth: Mapping[Any, np.ndarray], classes: Sequence[str]
) -> SegmentationScores:
    """Scores label maps by picture. ValueError where the pictures are not the same ones."""
    _same(set(predicted), set(truth), "pictures")
    matrix = ConfusionMatrix(classes)
    for name, right in truth.items():
        matrix.add(predicted[name], right)
    return matrix.scores()


def score_folders(
    predicted: Path,
    truth: Path,
    classes: Sequence[str],
    *,
    ignore: Sequence[int] = (),
    reduce_zero: bool = False,
) -> SegmentationScores:
    """Scores a folder of predicted label maps (NAME.png) against a folder of true ones of the same names.

    ignore, reduce_zero: how the true maps are read, see `dataload.label_maps.read_map`; predicted ones hold classes 0 to
    K - 1. Raises ValueError before any is read where a name is in one folder alone; OSError.
    """
    names = [{path.relative_to(folder) for path in folder.rglob("*.png")} for folder in (predicted, truth)]
    if not names[1]:
        raise ValueError(f"{truth} holds no .png")
    _same(names[0], names[1], f"maps of {predicted} and {truth}")
    matrix = ConfusionMatrix(classes)
    for name in sorted(names[1]):
        right = read_map(truth / name, ignore=ignore, reduce_zero=reduce_zero)
        try:
            matrix.add(read_map(predicted / name), right)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return matrix.scores()


def _same(predicted: set[Any], truth: set[Any], what: str) -> None:
    missing, extra = truth - predicted, predicted - truth
    if missing or extra:
        raise ValueError(
            f"{what} do not fit: {len(missing):,} of {len(truth):,} true ones have no prediction, {len(extra):,} predictions "
            f"belong to none; the first is {sorted(map(str, missing or extra))[0]}"
        )
