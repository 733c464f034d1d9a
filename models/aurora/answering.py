"""Questions about an image, answered by a choice: the text stack reads the question in its bidirectional mode; what the first
token then says is one of C answers. (Answers that are written: models/writing.py.)

Shapes: B batch, T tokens, C answers, D decoder width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.config import AuroraConfig
from models.aurora.model import Aurora, init_layers
from models.tokens import PAD


class Chooser(nn.Module):
    """Aurora (`base`) that chooses among C answers to a question about an image."""

    def __init__(self, config: AuroraConfig, answers: int) -> None:
        super().__init__()
        self.base = Aurora(config)
        dim = config.decoder_width
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, answers))
        init_layers(self.head)

    def forward(
        self, images: Tensor, tokens: Tensor, scores: Tensor, questions: float | None = None
    ) -> dict[str, Tensor]:
        """Loss "answer", an fp32 scalar: binary cross-entropy of every answer, a sum over the answers and over `questions`
        (None: those of this batch). tokens int64 [B, T]; scores [B, C] in 0..1, what each answer is worth."""
        logits = self.answers(images, tokens).float()
        loss = F.binary_cross_entropy_with_logits(logits, scores.float(), reduction="sum")
        return {"answer": loss / max(len(images) if questions is None else questions, 1e-6)}

    def answers(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Normalised images and questions int64 [B, T] -> logits [B, C]."""
        memory = self.base.memory(self.base.encode_image(images))
        x = self.base.decoder.read_text(tokens, causal=False)
        x = self.base.decoder.read_image(x, memory, causal=False, key_mask=tokens != PAD)
        return self.head(x[:, 0])
