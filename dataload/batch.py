"""The batch that every pipeline makes.

Letters: P pairs, K captions per image, L captions with masked words, T text tokens, U uncaptioned images, H W
image height and width, B images of an evaluation batch, N captions of an evaluation batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

IGNORE = -100
"""In `Batch.mlm_targets`: nothing is asked at this place (what torch's cross_entropy ignores)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: P captioned images and U uncaptioned ones (either may be 0)."""

    pair_images: torch.Tensor
    """uint8 [P, H, W, 3]"""
    tokens: torch.Tensor
    """int64 [P*K, T]: BOS, ids, EOS, PAD... Rows i*K to i*K+K-1 belong to image i."""
    mlm_tokens: torch.Tensor
    """int64 [L, T], L <= P*K: the first L of `tokens` with some places masked, replaced, or kept"""
    mlm_targets: torch.Tensor
    """int64 [L, T]: the token where the model is asked, IGNORE elsewhere"""
    mim_images: torch.Tensor
    """uint8 [U, H, W, 3]"""
    mim_mask: torch.Tensor
    """bool [U, H/32, W/32], True = masked"""
    keys: tuple[str, ...]
    """'shard-name/sample-key' of the P pairs, then of the U uncaptioned images"""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        return _with(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which `to(device, non_blocking=True)` overlaps with
        work. What is on a GPU already stays there."""
        return _with(self, lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())


@dataclass(frozen=True)
class EvalBatch:
    """B images in the order of the set, each with all of its captions."""

    images: torch.Tensor
    """uint8 [B, H, W, 3]"""
    captions: list[list[str]]
    """the captions of each image"""
    tokens: torch.Tensor
    """int64 [N, T]: every caption of image 0, then of image 1 ..."""
    image_of_caption: torch.Tensor
    """int64 [N]: to which image of this batch (0..B-1) the caption belongs"""
    keys: tuple[str, ...]
    """'shard-name/sample-key' of each image"""
    crops: torch.Tensor | None = None
    """uint8 [B, views - 1, H, W, 3]: further views of each image (`dataload.images.views`); None where one was asked for"""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EvalBatch:
        """The same batch with its tensors on `device`."""
        return _with(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


AnyBatch = TypeVar("AnyBatch", Batch, EvalBatch)


def _with(batch: AnyBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> AnyBatch:
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = change(value)
    return replace(batch, **changed)
