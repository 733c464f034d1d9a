"""Queries of embeddings: one for the contrast of each modality with text, one for labels.

Letters: B samples, M latents, D their width, E joint space, C classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.perceiver.config import PerceiverConfig
from models.perceiver.queries.base import QueryDecoder

NAMES = ("image", "video", "audio", "label")


class EmbeddingQueries(QueryDecoder):
    """Latents [B, M, D] -> [B, 4, E]: what NAMES says, one query each."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config, len(NAMES), config.embedding_width)
        self.classes = nn.Linear(config.embedding_width, config.labels)

    def embedding(self, latents: Tensor, modality: str) -> Tensor:
        """fp32 [B, E] of unit length, to compare with text's."""
        return F.normalize(self(latents)[:, NAMES.index(modality)].float(), dim=-1)

    def labels(self, latents: Tensor) -> Tensor:
        """Logits [B, C]."""
        return self.classes(self(latents)[:, NAMES.index("label")])
