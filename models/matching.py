"""Image-text matching (ALBEF, arXiv:2107.07651): the text decoder of either model says whether a caption belongs to an image.

Contrastive embeddings find candidates among millions; the decoder, which sees image and caption together, orders the first few
anew. Shapes: P images, K captions per image, T tokens, D decoder width, R pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.model import init_layers
from models.base import Base
from models.objectives import contrastive_loss


class Matcher(nn.Module):
    """A model (`base`) with a head that matches. `forward` gives the losses, `match` the scores of pairs."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.head = nn.Linear(base.config.decoder_width, 1)
        init_layers(self.head)

    def forward(
        self, images: Tensor, tokens: Tensor, pairs: float | None = None, micro_steps: float = 1.0
    ) -> dict[str, Tensor]:
        """Losses "itc" (softmax contrast of this batch) and "match", fp32 scalars. Each image is matched with its own caption,
        with one of another image, and its caption with another image; the harder a wrong pair is for the contrast, the more
        often it is drawn. images normalised [P, 3, height, width], tokens int64 [P, T].
        """
        base = self.base
        image, memory = base.features(images)
        text = base.text_embedding(tokens)
        losses = {
            "itc": contrastive_loss(image, text, base.logit_scale, base.logit_bias, kind="softmax")
            / max(micro_steps, 1e-6)
        }
        count = len(images)
        if count < 2:
            return {**losses, "match": self.match(memory, tokens).sum() * 0}
        with torch.no_grad():
            odds = (base.logit_scale.exp() * image @ text.T).float()
            same = (tokens[:, None] == tokens[None]).all(
                -1
            )  # a caption that two images share is no wrong one
            odds = odds.masked_fill(same, -1e4)
            other_text = torch.multinomial(odds.softmax(1), 1)[:, 0]
            other_image = torch.multinomial(odds.T.softmax(1), 1)[:, 0]
        rows = torch.cat((torch.arange(count, device=images.device),) * 2 + (other_image,))
        texts = torch.cat((tokens, tokens[other_text], tokens))
        right = torch.zeros(3 * count, device=images.device)
        right[:count] = 1
        loss = F.binary_cross_entropy_with_logits(self.match(memory[rows], texts), right, reduction="sum")
        losses["match"] = loss / max(3 * (float(count) if pairs is None else pairs), 1e-6)
        return losses

    def match(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """Image memory [R, M, D] and captions int64 [R, T] -> fp32 logits [R] that they belong together."""
        return self.head(self.base.whole_text(tokens, memory)[:, 0]).float()[:, 0]
