"""What the adapters of images, sounds and videos share: patches in, tokens out.

    patches [P, n, F] --stem--> [P, n, E] --hide--> + positions --blocks with rotary positions--> norm --> + kind

Letters: P pieces, n patches of a piece (padded to the longest), F numbers in a patch, E width, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers import Block, Rotary
from models.perceiver.config import PerceiverConfig
from models.perceiver.pieces import Piece, Tokens, visible


class Adapter(nn.Module, ABC):
    """A modality. A new one is a subclass that says what a patch is (`patches`) and where it lies (`grid`), and is put
    into `PerceiverIO.adapters` under its name."""

    def __init__(self, config: PerceiverConfig, patch_width: int, grid: tuple[int, ...]) -> None:
        """patch_width: numbers in a patch. grid: the most patches in each direction, the one that may be shorter (time)
        first; patches are in row-major order."""
        super().__init__()
        self.gradient_checkpointing = False
        self.grid = grid
        dim = config.encoder_width
        self.head_dim = config.encoder_head_dim
        self.stem = nn.Linear(patch_width, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(*grid, dim))
        self.blocks = nn.ModuleList(self.block(config, i) for i in range(config.encoder_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.kind = nn.Parameter(torch.empty(dim))

    def block(self, config: PerceiverConfig, index: int) -> Block:
        """One of the encoder's blocks."""
        return Block(config.encoder_width, config.encoder_head_dim, layer_scale=config.layer_scale_init)

    @abstractmethod
    def empty(self, device: torch.device) -> Piece:
        """No piece at all, in the form that `patches` takes: where a batch lacks the modality, its weights then get
        gradients of zero, and every process of a distributed run has the same graph."""

    @abstractmethod
    def patches(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """Raw pieces -> (patches [P, n, F], what the masked objective asks for too; patches of each piece, int [P])."""

    def embed(self, piece: Piece, patches: Tensor, mask: Tensor | None) -> Tensor:
        """Patches [P, n, F] -> [P, n, E]; where mask bool [P, n] is True the mask token."""
        x = self.stem(patches)
        return x if mask is None else torch.where(mask[..., None], self.mask_token.to(x.dtype), x)

    def shape(self, piece: Piece, n: int) -> tuple[int, ...]:
        """Patches in each direction, n of them: the first direction may be shorter than the grid's."""
        rest = self.positions[0].shape[:-1].numel()
        if n > self.grid[0] * rest:
            raise ValueError(
                f"{type(self).__name__}: a piece of {n} patches; the longest has {self.grid[0] * rest}, {self.grid}"
            )
        return (-(-n // rest), *self.grid[1:])

    def place(self, shape: tuple[int, ...]) -> Tensor:
        """Learned positions [n, E] of a grid of this shape."""
        return self.positions[: shape[0]].flatten(0, -2)

    def forward(self, piece: Piece) -> Tokens:
        return self.encode(piece, *self.patches(piece))

    def encode(self, piece: Piece, patches: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tokens:
        """What `patches` gave of a piece -> its tokens. mask bool [P, n]: patches that the encoder may not see."""
        x = self.embed(piece, patches, mask)
        shape = self.shape(piece, x.shape[1])
        x = x + self.place(shape).to(x.dtype)
        seen = None
        if piece.offsets is not None:
            seen = visible(lengths, x.shape[1])
            x = x * seen[..., None]
        rotary = grid_rotary(shape, self.head_dim, x.device)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(self.run, block, x, rotary, seen, shape, use_reentrant=False)
            else:
                x = self.run(block, x, rotary, seen, shape)
        return Tokens(self.norm(x) + self.kind.to(x.dtype), lengths)

    def hidden(self, piece: Piece, patches: Tensor, lengths: Tensor, share: float) -> Tensor:
        """bool [P, n]: the patches that the masked objective hides: the piece's own mask, or a random `share` of each."""
        n = patches.shape[1]
        own = visible(lengths, n)
        if (
            piece.mask is not None
        ):  # as wide as the batch's longest piece; those chosen here may all be shorter
            return piece.mask[:, :n].reshape(own.shape) & own
        noise = torch.rand(own.shape, device=own.device).masked_fill(~own, 2.0)
        rank = noise.argsort(dim=1).argsort(dim=1)
        return own & (rank < (share * lengths[:, None]).round().clamp(min=1))

    def run(
        self, block: nn.Module, x: Tensor, rotary: Rotary, seen: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        """One block over tokens on a grid of this shape; seen bool [P, n], True = belongs to the piece."""
        return block(x, rotary=rotary, key_mask=seen)


def grid_rotary(shape: tuple[int, ...], head_dim: int, device: torch.device) -> Rotary:
    """Cosines and sines [n, d/2] of rotary positions on a grid, row-major: each direction turns its own share of the
    channel pairs (arXiv:2403.13298). Wavelengths from 2 pi to 100 times that, as grids have up to 100 places a side."""
    pairs = head_dim // 2
    shares = [pairs // len(shape)] * len(shape)
    shares[-1] += pairs - sum(shares)
    angles = []
    for axis, (length, share) in enumerate(zip(shape, shares, strict=True)):
        frequency = 100.0 ** (-torch.arange(share, device=device, dtype=torch.float32) / max(share, 1))
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        view = [1] * len(shape)
        view[axis] = length
        angles.append(angle.view(*view, share).expand(*shape, share))
    angle = torch.cat(angles, dim=-1).flatten(0, -2)
    return angle.cos(), angle.sin()
