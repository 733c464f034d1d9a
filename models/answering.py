"""Questions about an image, answered by a choice, by either model: the text stack reads the question in its bidirectional mode;
what the first token then says is one of C answers. (Answers that are written: models/writing.py.)

Shapes: B batch, T tokens, C answers, D decoder width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.model import init_layers
from models.base import Base


class Chooser(nn.Module):
    """A model (`base`) that chooses among C answers to a question about an image."""

    def __init__(self, base: Base, answers: int) -> None:
        super().__init__()
        self.base = base
        dim = base.config.decoder_width
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
        return self.head(self.base.whole_text(tokens, self.base.image_memory(images))[:, 0])
