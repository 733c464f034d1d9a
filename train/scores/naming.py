"""Naming by retrieval: of all labels of a set, the one whose text is closest is what a sample is taken for.

Legend: I samples, L labels, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_label(sample_emb: Tensor, label_emb: Tensor) -> Tensor:
    """The label closest to each sample: int64 [I]. sample_emb [I, E], label_emb [L, E], of unit length; a label or a sample
    that is not finite is never right (-1)."""
    scores = sample_emb.float() @ label_emb.float().T
    named = scores.nan_to_num(nan=-torch.inf).argmax(1)
    return torch.where(torch.isfinite(scores).all(1), named, -1)


def naming_scores(sample_emb: Tensor, label_emb: Tensor, label_of_sample: Tensor) -> dict[str, float]:
    """{"accuracy": share of samples that are named right, "mean_recall": the mean of that share over the labels}.

    label_of_sample int64 [I]. The two differ where some labels are rarer: one that is always said gets its own share in
    the first, 1 / L in the second. Raises ValueError without samples, with fewer than two labels, or for lengths that
    do not fit.
    """
    if len(sample_emb) == 0 or len(label_emb) < 2:
        raise ValueError(
            f"naming needs samples and 2 labels or more; got {len(sample_emb)} samples, {len(label_emb)} labels"
        )
    if len(sample_emb) != len(label_of_sample):
        raise ValueError(f"{len(sample_emb)} samples, but label_of_sample names {len(label_of_sample)}")
    right = (nearest_label(sample_emb, label_emb) == label_of_sample).double()
    present = torch.unique(label_of_sample).tolist()
    recalls = [right[label_of_sample == label].mean().item() for label in present]
    return {"accuracy": right.mean().item(), "mean_recall": sum(recalls) / len(recalls)}


def naming_chance(label_of_sample: Tensor, labels: int) -> dict[str, float]:
    """What always saying the most frequent label gives."""
    counts = torch.bincount(label_of_sample, minlength=labels)
    return {
        "accuracy": counts.max().item() / len(label_of_sample),
        "mean_recall": 1 / int((counts > 0).sum()),
    }


def labels_of(captions: list[list[str]]) -> list[str] | None:
    """The labels of a set whose captions are labels, sorted: one caption for each sample, and on average two samples or
    more for each text. None for a set with captions of its own for each sample."""
    if any(len(texts) != 1 for texts in captions):
        return None
    labels = sorted({texts[0] for texts in captions})
    return labels if 2 <= len(labels) <= len(captions) // 2 else None
