"""The batch of the multimodal loader: each modality by itself, and to which sample each piece belongs.

Letters: B samples, I pictures, A sounds, V videos, S texts of the batch; H W height and width, N elements of a pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dataload.packed import Packed


@dataclass(frozen=True)
class MultimodalBatch:
    """One micro-batch of one rank: B samples, each with any subset of the modalities (at least one)."""

    images: torch.Tensor
    """uint8 [I, H, W, 3]"""
    image_sample: torch.Tensor
    """int64 [I]: the sample (0..B-1) of each picture; rising, as all of the *_sample are"""
    image_mask: torch.Tensor
    """bool [I, H/cell, W/cell], True = hidden from masked image modelling"""
    audio: Packed
    """float32 [N]: A waveforms of 16 kHz, -1..1; `audio.log_mel` makes spectrograms of them, on any device"""
    audio_sample: torch.Tensor
    """int64 [A]"""
    video: Packed
    """uint8 [N, H, W, 3]: the frames of V clips"""
    video_times: torch.Tensor
    """float32 [N]: seconds of each frame from the start of its clip"""
    video_sample: torch.Tensor
    """int64 [V]"""
    text: Packed
    """int64 [N]: S texts, each BOS, ids, EOS"""
    mlm_tokens: torch.Tensor
    """int64 [N]: the same with some places masked, replaced, or kept"""
    mlm_targets: torch.Tensor
    """int64 [N]: the token where the model is asked, IGNORE elsewhere"""
    text_sample: torch.Tensor
    """int64 [S]"""
    sources: torch.Tensor
    """int64 [B]: the source of each sample, as a number in the order of the config; rising"""
    keys: tuple[str, ...]
    """'shard-name/sample-key' of each sample"""

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultimodalBatch:
        """The same batch with its tensors on `device`."""
        return self._with(lambda one: one.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MultimodalBatch:
        """The same batch in page-locked memory. What is on a GPU already stays there."""
        return self._with(
            lambda one: one if isinstance(one, torch.Tensor) and one.is_cuda else one.pin_memory()
        )

    def _with(self, change: Callable[[Any], Any]) -> MultimodalBatch:
        changed = {
            field.name: change(getattr(self, field.name))
            for field in fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor | Packed)
        }
        return replace(self, **changed)
