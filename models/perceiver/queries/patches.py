"""Queries of patches: what a picture, sound or clip looks like where it was hidden.

Letters: B samples, M latents, P pieces, n patches of a piece, F numbers of a patch.
"""

from __future__ import annotations

from torch import Tensor

from models.perceiver.config import PerceiverConfig
from models.perceiver.queries.base import QueryDecoder


class PatchQueries(QueryDecoder):
    """A query per patch of the largest piece -> the patch's numbers, in the order and the units of the adapter."""

    def __init__(self, config: PerceiverConfig, grid: tuple[int, ...], patch_width: int) -> None:
        n = 1
        for side in grid:
            n *= side
        super().__init__(config, n, patch_width)

    def loss(self, latents: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
        """Sum over pieces of the mean absolute error of the numbers of their hidden patches (SimMIM, arXiv:2111.09886).

        latents [P, M, D] of each piece's sample; patches [P, n, F]; hidden bool [P, n].
        """
        found = self(latents)[:, : patches.shape[1]]
        error = (found.float() - patches.float()).abs().mean(dim=-1)
        return ((error * hidden).sum(1) / hidden.sum(1).clamp(min=1)).sum()
