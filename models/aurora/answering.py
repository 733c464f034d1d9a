"""Text about an image as a task: captions, and answers to questions, written or chosen.

    written   the text stack goes on after a prompt: BOS prompt EOS answer EOS; the loss is that of the answer
    chosen    the text stack reads the question in its bidirectional mode; what the first token then says is one of C answers

Shapes: B batch, T tokens, C answers, D decoder width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models import objectives
from models.aurora.config import AuroraConfig
from models.aurora.model import Aurora, init_layers
from models.objectives import ObjectiveConfig
from models.tokens import IGNORE, PAD


class Writer(nn.Module):
    """Aurora (`base`) that writes text about images."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        self.base = Aurora(config)

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        targets: Tensor,
        words: float | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Loss "text", an fp32 scalar: the sum over `words` (None: those of this batch) of next-token cross-entropies.

        images: normalised [B, 3, height, width]. tokens int64 [B*K, T]: rows i*K to i*K+K-1 belong to image i. targets int64
        [B*K, T]: the same where a token is to be predicted, -100 elsewhere.
        """
        base = self.base
        memory = base.memory(base.encode_image(images))
        if len(tokens) > len(images):
            memory = memory.repeat_interleave(len(tokens) // len(images), dim=0)
        x = base.decoder.read_image(base.decoder.read_text(tokens[:, :-1], causal=True), memory, causal=True)
        config = ObjectiveConfig(label_smoothing=label_smoothing)
        loss = objectives.token_loss(x, base.decoder.embedding.weight, targets[:, 1:], config)
        asked = float((targets[:, 1:] != IGNORE).sum())
        return {"text": loss / max(asked if words is None else words, 1e-6)}


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
