"""The definition, with all N x M logits in memory.

"softmax": CLIP (arXiv:2103.00020, figure 3); with K captions per image the K positives share the image's target.
"sigmoid": SigLIP (arXiv:2303.15343, algorithm 1), divided by the number of texts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, kind: str
) -> Tensor:
    """image [N, D], text [N*K, D] of one process; fp32, or fp64 for fp64 rows."""
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    image, text = image.to(wide), text.to(wide)
    if logit_bias is None:
        logit_bias = torch.zeros_like(logit_scale)
    if len(image) == 0:
        return image.sum() + text.sum() + 0 * (logit_scale + logit_bias).to(wide)
    captions = len(text) // len(image)
    owner = torch.arange(len(text), device=text.device) // captions  # the image of each text
    logits = logit_scale.to(wide).exp() * image @ text.T
    if kind == "sigmoid":
        logits = logits + logit_bias.to(wide)
        positive = owner == torch.arange(len(image), device=image.device)[:, None]
        return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(text)
    own = logits.T.gather(1, owner[:, None])[:, 0]  # of each text, with its image
    to_text = (logits.logsumexp(1) - own.unflatten(0, (-1, captions)).mean(1)).mean()
    to_image = (logits.logsumexp(0) - own).mean()
    return (to_text + to_image) / 2 + 0 * logit_bias.to(wide)  # which cancels
