"""The definition, written to be read: all logits at once.

Shapes: M tokens, H width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What a loss is, besides its tensors."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    compute: torch.dtype  # of the operands of the matrix products

    @property
    def wide(self) -> torch.dtype:
        """What losses and everything between the products are computed in."""
        return torch.float64 if self.compute == torch.float64 else torch.float32


def losses(hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """The loss of each token [M]; 0 where its target is ignored.

    z = hidden weight^T, log p = z - logsumexp(z):
    (1 - s) (-log p[target]) + s mean(-log p) + z_loss logsumexp(z)^2
    """
    logits = (hidden.to(settings.compute) @ weight.to(settings.compute).T).to(settings.wide)  # [M, V]
    log_z = logits.logsumexp(dim=1)
    surprise = log_z[:, None] - logits
    wanted = targets != settings.ignore_index
    of_target = surprise.gather(1, torch.where(wanted, targets, 0)[:, None])[:, 0]
    smoothing = settings.label_smoothing
    loss = (1 - smoothing) * of_target + smoothing * surprise.mean(dim=1) + settings.z_loss * log_z.square()
    return torch.where(wanted, loss, 0)
