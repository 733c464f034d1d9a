"""Semantic segmentation on Aurora's feature pyramid (UPerNet, arXiv:1807.10221): a class per pixel.

    maps -> pooled context added to the last map -> FeaturePyramid -> all levels at stride 4 -> classes

Shapes: B batch, H W height and width of the images, C classes, F pyramid width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aurora.config import AuroraConfig
from models.aurora.detection import groups
from models.aurora.model import Aurora, init_layers

IGNORE = 255
"""Class of a pixel that is not asked for."""
POOLS = (1, 2, 3, 6)


class Segmenter(nn.Module):
    """Aurora (`base`) with a segmentation head. `forward` gives the loss, `logits` a class per pixel."""

    def __init__(self, config: AuroraConfig, classes: int) -> None:
        super().__init__()
        self.base = Aurora(config)
        self.head = SegmentationHead(config, classes)
        init_layers(self.head)

    def forward(
        self, images: Tensor, label_map: Tensor, pixels: float | None = None, pictures: float | None = None
    ) -> dict[str, Tensor]:
        """Losses "pixel" (cross-entropy, a sum over `pixels`) and "dice" (1 - the overlap of each class that an image has, a
        sum over `pictures`), fp32 scalars; None: those of this batch. label_map: uint8 or int64 [B, H, W], 255 = not asked for.
        """
        logits = self.logits(images).float()
        target = label_map.long()
        asked = target != IGNORE
        loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        dice = self.dice(logits, target, asked)
        return {
            "pixel": loss / max(float(asked.sum()) if pixels is None else pixels, 1e-6),
            "dice": dice / max(len(images) if pictures is None else pictures, 1e-6),
        }

    @staticmethod
    def dice(logits: Tensor, target: Tensor, asked: Tensor) -> Tensor:
        """Sum over images of the mean of 1 - Dice over the classes that are there: small ones count as much as large ones."""
        found = logits.softmax(1) * asked[:, None]
        true = F.one_hot(target.where(asked, 0), logits.shape[1]).permute(0, 3, 1, 2) * asked[:, None]
        both, sizes = (found * true).sum((2, 3)), (found + true).sum((2, 3))
        there = true.sum((2, 3)) > 0
        overlap = (2 * both + 1) / (sizes + 1)
        return (((1 - overlap) * there).sum(1) / there.sum(1).clamp(min=1)).sum()

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> [B, C, H, W]."""
        maps = self.base.encode_image(images)
        maps = [*maps[:3], maps[3] + self.head.context(maps[3])]
        logits = self.head(self.base.pyramid(maps))
        # maps of a size that 32 does not divide are padded at the bottom and right
        full = (4 * logits.shape[-2], 4 * logits.shape[-1])
        logits = F.interpolate(logits, size=full, mode="bilinear", align_corners=False)
        return logits[..., : images.shape[-2], : images.shape[-1]]


class SegmentationHead(nn.Module):
    """What the pyramid's levels say of each place."""

    def __init__(self, config: AuroraConfig, classes: int) -> None:
        super().__init__()
        width, top = config.pyramid_width, config.stage_widths[3]
        self.pools = nn.ModuleList(nn.Linear(top, width) for _ in POOLS)
        self.pooled = nn.Linear(len(POOLS) * width, top)
        self.fuse = nn.Sequential(
            nn.Conv2d(4 * width, width, 3, padding=1), nn.GroupNorm(groups(width), width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups(width), width), nn.SiLU(),
        )  # fmt: skip
        self.classes = nn.Conv2d(width, classes, 1)

    def context(self, top: Tensor) -> Tensor:
        """The last map [B, h, w, C4] -> what is around each of its places, the same shape (PSPNet, arXiv:1612.01105)."""
        x = top.permute(0, 3, 1, 2)
        parts = []
        for side, layer in zip(POOLS, self.pools, strict=True):
            pooled = layer(F.adaptive_avg_pool2d(x, side).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            parts.append(F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.pooled(F.silu(torch.cat(parts, 1)).permute(0, 2, 3, 1))

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four maps [B, F, H_i, W_i] -> [B, C, H_1, W_1]."""
        size = levels[0].shape[-2:]
        same = [levels[0]] + [
            F.interpolate(level, scale_factor=2**i, mode="bilinear", align_corners=False)[
                ..., : size[0], : size[1]
            ]
            for i, level in enumerate(levels[1:], 1)
        ]
        return self.classes(self.fuse(torch.cat(same, 1)))
