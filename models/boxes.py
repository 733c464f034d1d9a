"""Boxes as tensors: overlap, and which of many say the same. A box is (left, top, right, bottom).

torchvision's compiled NMS is used where it loads; on torch from PyPI without CUDA it does not, and `nms` here is plain torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every box [N, 4] with every box [M, 4]: [N, M]."""
    inside = torch.minimum(first[:, None, 2:], second[None, :, 2:]) - torch.maximum(
        first[:, None, :2], second[None, :, :2]
    )
    shared = inside.clamp(min=0).prod(-1)
    return shared / (area(first)[:, None] + area(second)[None] - shared).clamp(min=1e-9)


def giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (arXiv:1902.09630) of boxes [N, 4] with boxes [N, 4], pair by pair: [N] in -1..1."""
    inside = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    shared = inside.clamp(min=0).prod(-1)
    union = (area(first) + area(second) - shared).clamp(min=1e-9)
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    around = hull.clamp(min=0).prod(-1).clamp(min=1e-9)
    return shared / union - (around - union) / around


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Numbers int64 of the boxes that stay, best first: those that overlap no better one by more than `threshold`."""
    if (compiled := _compiled()) is not None:
        return compiled(boxes, scores, threshold)
    rows = scores.argsort(descending=True, stable=True)
    overlaps = (iou(boxes[rows], boxes[rows]) > threshold).triu(1).cpu()
    gone = torch.zeros(len(rows), dtype=torch.bool)
    for i in range(len(rows)):
        if not gone[i]:
            gone |= overlaps[i]
    return rows[~gone.to(rows.device)]


def nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """The same within each class: boxes of different classes are moved far apart."""
    if len(boxes) == 0:
        return classes.new_empty(0)
    apart = (boxes.max() - boxes.min() + 1) * classes.to(boxes.dtype)
    return nms(boxes + apart[:, None], scores, threshold)


@cache
def _compiled() -> Any:
    """torchvision's operator, or None."""
    try:
        import torchvision.ops

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError):
        return None
    return torchvision.ops.nms
