"""What turns Aurora's features into memory, embeddings, pixels, boxes and masks.

Shapes: B batch, H_i and W_i stage i's map, C_i its channels, D decoder width, E joint space, F pyramid
width, Q queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.config import AuroraConfig
from models.layers import SwiGLU, sincos_grid


class MemoryProjector(nn.Module):
    """Stage 3 and stage 4 tokens, projected to the decoder's width, with their place in the image -> memory
    [B, M, D].

    Windowed attention with relative biases says little about where in the image a token stands; words such
    as "left" need it.
    """

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        widths = config.stage_widths[2:]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.projections = nn.ModuleList(
            SwiGLU(width, hidden, config.decoder_width)
            for width, hidden in zip(widths, config.projector_hidden, strict=True)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps [B, H_i, W_i, C_i] -> [B, H_3*W_3 + H_4*W_4, D]."""
        parts = []
        for tokens, norm, project in zip(maps[2:], self.norms, self.projections, strict=True):
            parts.append(with_places(project(norm(tokens))))
        return torch.cat(parts, dim=1)


class FeaturePyramid(nn.Module):
    """Top-down feature pyramid (arXiv:1612.03144): four maps -> four maps [B, F, H_i, W_i], finest first."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        width = config.pyramid_width
        self.lateral = nn.ModuleList(nn.Linear(channels, width) for channels in config.stage_widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in config.stage_widths)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Each level adds the coarser one, brought to its own size by nearest-neighbour repetition."""
        levels: list[Tensor] = []
        above: Tensor | None = None
        for i in reversed(range(len(maps))):
            level = self.lateral[i](maps[i]).permute(0, 3, 1, 2)
            if above is not None:
                level = level + F.interpolate(above, size=level.shape[-2:], mode="nearest")
            above = level
            levels.insert(0, self.smooth[i](level))
        return levels


class QueryHeads(nn.Module):
    """A query's box, class embedding and mask embedding (DETR, arXiv:2005.12872; MaskFormer,
    arXiv:2107.06278)."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        dim = config.decoder_width
        self.box = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4)
        )
        self.embeddings = nn.Linear(dim, 2 * config.embedding_width)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, Q, D] -> boxes [B, Q, 4] as (cx, cy, w, h) in 0..1, class [B, Q, E] and mask embeddings [B,
        Q, E]."""
        classes, masks = self.embeddings(queries).chunk(2, dim=-1)
        return self.box(queries).sigmoid(), classes, masks


def with_places(tokens: Tensor) -> Tensor:
    """A map [B, H, W, C] as tokens [B, H*W, C] with fixed 2-D sine-cosine positions added."""
    _, height, width, dim = tokens.shape
    return tokens.flatten(1, 2) + sincos_grid(height, width, dim, tokens.device).to(tokens.dtype)
