"""Images: patches of pixels, two-dimensional rotary positions, windows where there are many patches.

Letters: P images, H W patches in each direction, E width, h heads, d head width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fused, window_attention
from models.layers import Block, KeyValueCache, Rotary, SelfAttention
from models.perceiver.adapters.base import Adapter
from models.perceiver.config import PerceiverConfig
from models.perceiver.pieces import Piece, no_samples

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as everywhere


class ImageAdapter(Adapter):
    """Images float [P, 3, height, width], normalised, or uint8 [P, height, width, 3] -> a token per patch."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config, config.patch_widths["image"], config.image_grid)
        self.patch = config.image_patch
        if config.image_stem == "conv":
            self.stem = ConvStem(config.image_patch, config.encoder_width)  # type: ignore[assignment]

    def block(self, config: PerceiverConfig, index: int) -> Block:
        block = super().block(config, index)
        if config.image_window:
            block.self_attention = WindowedAttention(
                config.encoder_width, config.encoder_head_dim, config.image_window, shifted=index % 2 == 1
            )
        return block

    def empty(self, device: torch.device) -> Piece:
        height, width = (side * self.patch for side in self.grid)
        return Piece(torch.empty(0, 3, height, width, device=device), no_samples(device))

    def patches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        images = normalized(piece.data)
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height}x{width} pixels; patches are {self.patch}x{self.patch}")
        x = patchify(images, (self.patch, self.patch))
        return x, torch.full(x.shape[:1], x.shape[1], device=x.device)

    def hidden(self, piece: Piece, patches: Tensor, lengths: Tensor, share: float) -> Tensor:
        """A piece's mask is in cells [P, rows, columns]: a patch is hidden where its centre's cell is."""
        if piece.mask is None:
            return super().hidden(piece, patches, lengths, share)
        height, width = self.shape(piece, patches.shape[1])
        mask = F.interpolate(piece.mask[:, None].float(), size=(height, width), mode="nearest-exact")
        return mask.flatten(1) > 0

    def embed(self, piece: Piece, patches: Tensor, mask: Tensor | None) -> Tensor:
        if not isinstance(self.stem, ConvStem):
            return super().embed(piece, patches, mask)
        if mask is not None:  # convolutions overlap: a hidden patch is grey before they see it
            patches = patches.masked_fill(mask[..., None], 0)
        shape = self.shape(piece, patches.shape[1])
        x = self.stem(unpatchify(patches, shape, (self.patch, self.patch))).flatten(2).transpose(1, 2)
        return x if mask is None else torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

    def shape(self, piece: Piece, n: int) -> tuple[int, ...]:
        height, width = normalized_size(piece.data)
        return height // self.patch, width // self.patch

    def place(self, shape: tuple[int, ...]) -> Tensor:
        """Learned positions [n, E]; those of another grid are interpolated."""
        if shape == self.grid:
            return self.positions.flatten(0, 1)
        table = self.positions.permute(2, 0, 1)[None].float()
        table = F.interpolate(table, size=shape, mode="bilinear", align_corners=False)
        return table[0].flatten(1).T

    def run(
        self, block: nn.Module, x: Tensor, rotary: Rotary, seen: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        if isinstance(block, Block) and isinstance(block.self_attention, WindowedAttention):
            block.self_attention.map = (shape[0], shape[1])  # set anew where checkpointing runs it again
        return super().run(block, x, rotary, seen, shape)


class WindowedAttention(SelfAttention):
    """Self-attention of a map's patches within (shifted) windows: kernels.window_attention."""

    def __init__(self, dim: int, head_dim: int, window: int, *, shifted: bool) -> None:
        super().__init__(dim, head_dim)
        self.window, self.shifted = window, shifted
        self.map = (0, 0)  # rows and columns of the map that comes next

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        causal: bool = False,
        key_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [P, H*W, E] -> [P, H*W, E]."""
        batch, length, dim = x.shape
        height, width = self.map
        q, k, v = self.qkv(x).view(batch, length, 3, dim // self.head_dim, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = fused.rotary(q, k, *rotary)
        qkv = torch.stack((q.to(v.dtype), k.to(v.dtype), v), dim=2)
        window = (min(self.window, height), min(self.window, width))
        shift = [w // 2 if self.shifted and side > w else 0 for side, w in zip(self.map, window, strict=True)]
        y = window_attention(qkv.unflatten(1, (height, width)), window=window, shift=(shift[0], shift[1]))
        return self.out(y.reshape(batch, length, dim))


class ConvStem(nn.Sequential):
    """Images [P, 3, height, width] -> [P, E, H, W] by 3x3 convolutions (arXiv:2106.14881), one for each halving and one between
    two. The norm is over the batch: one over an image would take away its mean color, which tells photographs apart."""

    def __init__(self, patch: int, dim: int) -> None:
        steps = patch.bit_length() - 1
        widths = [3, *(max(dim >> (steps - 1 - i), 16) for i in range(steps))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            if i:
                layers += convolution(before, before, stride=1)
            layers += convolution(before, after, stride=2)
        super().__init__(*layers, nn.Conv2d(widths[-1], dim, 1))


def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    """3x3, with a norm and a nonlinearity; the norm has the bias."""
    return [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), CentredReLU()]


class CentredReLU(nn.Module):
    """ReLU with mean 0 and variance 1 over a standard normal: less 1 / sqrt(2 pi), over sqrt(1/2 - 1 / (2 pi)). So what comes
    out has no part that all pictures share. With one, their embeddings start alike (a mean cosine of 0.8 instead of 0.3
    over photographs), and contrast learns late."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.relu(x) - (2 * math.pi) ** -0.5) / (0.5 - 0.5 / math.pi) ** 0.5


def normalized_size(images: Tensor) -> tuple[int, int]:
    """Height and width of images in either form."""
    size = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[-2:]
    return size[0], size[1]


def normalized(images: Tensor) -> Tensor:
    """uint8 [P, height, width, 3] -> float [P, 3, height, width], normalised; what is float is taken as it is."""
    if images.dtype != torch.uint8:
        return images
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images / 255 - mean) / std).movedim(-1, 1)


def patchify(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[P, C, ...] with as many directions as `patch` has -> [P, n, C * patch], row-major."""
    batch, channels = x.shape[:2]
    split: list[int] = []
    for side, size in zip(patch, x.shape[2:], strict=True):
        split += [size // side, side]
    x = x.reshape(batch, channels, *split)
    outer = list(range(2, x.dim(), 2))
    inner = list(range(3, x.dim(), 2))
    x = x.permute(0, *outer, 1, *inner)
    return x.flatten(1 + len(outer)).flatten(1, len(outer))


def unpatchify(x: Tensor, shape: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """[P, n, C * patch] on a grid of this shape -> [P, C, ...]."""
    batch, directions = x.shape[0], len(shape)
    channels = x.shape[-1] // torch.Size(patch).numel()
    x = x.reshape(batch, *shape, channels, *patch)
    order = [0, 1 + directions]
    for i in range(directions):
        order += [1 + i, 2 + directions + i]
    x = x.permute(*order)
    return x.reshape(batch, channels, *(n * side for n, side in zip(shape, patch, strict=True)))
