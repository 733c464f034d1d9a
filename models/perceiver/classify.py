"""Classes of sounds: PerceiverIO reads them, the mean of its latents says what they are.

Letters: B sounds, N samples of all of them, C classes, M latents, D their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.perceiver.config import PerceiverConfig
from models.perceiver.model import PerceiverIO, init_weights
from models.perceiver.pieces import Piece


class SoundClassifier(nn.Module):
    """PerceiverIO (`base`) with a classifier. `forward` gives the loss, `classes` logits."""

    def __init__(self, config: PerceiverConfig, classes: int) -> None:
        super().__init__()
        self.base = PerceiverIO(config)
        self.head = nn.Sequential(
            nn.RMSNorm(config.latent_width, eps=1e-6), nn.Linear(config.latent_width, classes)
        )
        init_weights(self.head)

    def forward(
        self,
        audio: Tensor,
        offsets: Tensor,
        labels: Tensor,
        sounds: float | None = None,
        *,
        several: bool = False,
        smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Loss "label", an fp32 scalar: a sum over `sounds` (None: those of this batch). audio float [N], 16 kHz, packed;
        offsets int32 [B+1]; labels [B, C], shares of 1 where sounds are mixed.

        several: a sound may have several classes (binary cross-entropy, summed over the classes), else it has one
        (cross-entropy, labels smoothed).
        """
        logits = self.classes(audio, offsets).float()
        if several:
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return {"label": loss / max(float(len(labels)) if sounds is None else sounds, 1e-6)}

    def classes(self, audio: Tensor, offsets: Tensor) -> Tensor:
        """Sounds -> logits [B, C]."""
        count = len(offsets) - 1
        piece = Piece(audio, torch.arange(count, device=audio.device), offsets)
        return self.head(self.base.encode({"audio": piece}, count).mean(1))
