"""Building blocks that more than one model really shares: attention with QK-norm, SwiGLU, the pre-norm
block, pooling.

Shapes: B batch, N tokens of the stream, M tokens of the memory, D width, h heads, d head width (D = h * d).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import fused, latent_attention

Rotary = tuple[Tensor, Tensor]


def swiglu_width(dim: int, multiple: int = 128) -> int:
    """Hidden width of a SwiGLU with the parameters of a 4x GELU MLP: 8 * dim / 3, rounded up to
    `multiple`."""
    return math.ceil(8 * dim / 3 / multiple) * multiple


def rotary_angles(length: int, head_dim: int, device: torch.device, start: int = 0) -> Rotary:
    """Cosines and sines [length, d/2] of 1-D rotary positions start..start+length-1 (RoFormer,
    arXiv:2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    position = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, by Liger-Kernel on a GPU that has it (kernels/fused.py)."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        assert self.weight is not None and self.eps is not None
        return fused.rms_norm(x, self.weight, self.eps)


def sincos_grid(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """Fixed 2-D sine-cosine positions [height * width, dim], in units of the map's own size, so that any
    image size works.

    Half of the channels carry y, half x (MoCo v3, arXiv:2104.02057); positions run over (0, 1) and are
    scaled to 2 pi * 8.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {dim}")
    frequency = 64.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / max(dim // 4 - 1, 1))
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height * (2 * math.pi * 8)
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width * (2 * math.pi * 8)
    y, x = y[:, None] * frequency, x[:, None] * frequency
    y = torch.cat((y.sin(), y.cos()), dim=1)[:, None].expand(height, width, dim // 2)
    x = torch.cat((x.sin(), x.cos()), dim=1)[None].expand(height, width, dim // 2)
    return torch.cat((y, x), dim=-1).reshape(height * width, dim)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, no biases (arXiv:2002.05202, eq. 6): out(silu(gate(x)) * up(x)), [..., dim]
    -> [..., out_dim]."""

    def __init__(self, dim: int, hidden: int | None = None, out_dim: int | None = None) -> None:
        super().__init__()
        hidden = hidden or swiglu_width(dim)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, out_dim or dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(fused.swiglu(self.gate(x), self.up(x)))


class SelfAttention(nn.Module):
    """Multi-head self-attention with an RMSNorm on each head's queries and keys (ViT-22B,
    arXiv:2302.05442)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=1e-6)
        self.k_norm = RMSNorm(head_dim, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Rotary | None = None,
        causal: bool = False,
        key_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]. key_mask bool [B, N], True = visible (not with causal); cache: x is the
        next token, N = 1."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, dim // self.head_dim, self.head_dim).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = fused.rotary(q, k, *rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if causal and cache is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        else:
            y = latent_attention(q, k, v, key_mask=key_mask)
        return self.out(y.reshape(batch, length, dim))


class CrossAttention(nn.Module):
    """Multi-head attention of a stream over a memory, with QK-norm; keys and values can be computed once
    and kept."""

    def __init__(self, dim: int, head_dim: int, memory_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = dim // head_dim, head_dim
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(memory_dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=1e-6)
        self.k_norm = RMSNorm(head_dim, eps=1e-6)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [B, M, memory_dim] -> keys, values [B, M, h, d]."""
        batch, length, _ = memory.shape
        k, v = self.kv(memory).view(batch, length, 2, self.heads, self.head_dim).unbind(2)
        return self.k_norm(k), v

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], key_mask: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D], keys_values from `keys_values` -> [B, N, D]."""
        batch, length, dim = x.shape
        q = self.q_norm(self.q(x).view(batch, length, self.heads, self.head_dim))
        y = latent_attention(q, *keys_values, key_mask=key_mask)
        return self.out(y.reshape(batch, length, dim))


class Block(nn.Module):
    """Pre-RMSNorm block: [self-attention] [cross-attention] SwiGLU, each behind a LayerScale (CaiT,
    arXiv:2103.17239).

    The cross-attention's scale starts at 1 or more: what it reads enters at full strength, or a text stack learns the
    language long before it looks at the image. `query_residual=False` drops the residual around the
    cross-attention (a pooling query has nothing worth keeping).
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        *,
        memory_dim: int | None = None,
        self_attention: bool = True,
        layer_scale: float = 0.1,
        cross_scale: float = 1.0,
        query_residual: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.query_residual = query_residual
        self.self_attention = SelfAttention(dim, head_dim) if self_attention else None
        if self_attention:
            self.self_norm = RMSNorm(dim, eps=1e-6)
            self.self_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.cross_attention = CrossAttention(dim, head_dim, memory_dim) if memory_dim else None
        if memory_dim:
            self.cross_norm = RMSNorm(dim, eps=1e-6)
            self.memory_norm = RMSNorm(memory_dim, eps=1e-6)
            self.cross_scale = nn.Parameter(torch.full((dim,), cross_scale))
        self.feed_norm = RMSNorm(dim, eps=1e-6)
        self.feed = SwiGLU(dim)
        self.feed_scale = nn.Parameter(torch.full((dim,), layer_scale))
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, M, h, d] of a memory [B, M, memory_dim] for this block's cross-attention."""
        assert self.cross_attention is not None
        return self.cross_attention.keys_values(self.memory_norm(memory))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        rotary: Rotary | None = None,
        causal: bool = False,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]; memory [B, M, memory_dim] or keys and values made from it."""
        if self.self_attention is not None:
            y = self.self_attention(
                self.self_norm(x), rotary=rotary, causal=causal, key_mask=key_mask, cache=cache
            )
            x = x + self.dropout(self.self_scale * y)
        if self.cross_attention is not None:
            assert memory is not None, "this block reads a memory and was given none"
            keys_values = memory if isinstance(memory, tuple) else self.keys_values(memory)
            y = self.cross_scale * self.cross_attention(self.cross_norm(x), keys_values, memory_mask)
            x = x + self.dropout(y) if self.query_residual else y
        return x + self.dropout(self.feed_scale * self.feed(self.feed_norm(x)))


class AttentionPool(nn.Module):
    """One learned query reads all tokens; what it read, after a SwiGLU branch, is projected to `out_dim` and has
    unit length (SigLIP's MAP head).

    The SwiGLU starts behind a LayerScale: at full strength its random features come first."""

    def __init__(self, dim: int, head_dim: int, out_dim: int, *, layer_scale: float = 0.1) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.block = Block(
            dim, head_dim, memory_dim=dim, self_attention=False, layer_scale=layer_scale, query_residual=False
        )
        self.norm = RMSNorm(dim, eps=1e-6)
        self.project = nn.Linear(dim, out_dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], mask bool [B, N] (True = visible) -> fp32 [B, out_dim] of unit length."""
        pooled = self.block(self.query.expand(x.shape[0], -1, -1), x, memory_mask=mask)
        return F.normalize(self.project(self.norm(pooled))[:, 0].float(), dim=-1)


class MeanPool(nn.Module):
    """The mean of all tokens behind batch norm, projected to `out_dim`, of unit length."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim)
        self.project = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> fp32 [B, out_dim] of unit length."""
        return F.normalize(self.project(self.norm(x.mean(1))).float(), dim=-1)


class WordBag(nn.Module):
    """A bag of words: the sum of a vector per token, of unit length. Order is lost, and special tokens say nothing."""

    def __init__(self, vocabulary: int, out_dim: int, special: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, out_dim)
        self.special = special  # ids below are special tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> fp32 [B, out_dim] of unit length; zeros for a caption without a word."""
        words = (tokens >= self.special).unsqueeze(-1)
        return F.normalize((self.embedding(tokens).float() * words).sum(1), dim=-1)


@dataclass
class KeyValueCache:
    """Keys and values [B, t, h, d] of the tokens so far, of one self-attention layer while generating."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next token's keys and values [B, 1, h, d]; returns all of them."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=1)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=1)
        return self.keys, self.values

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows` int64 [B'] (beam search reorders its hypotheses)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


@dataclass
class DecodingState:
    """What generation keeps between tokens: a cache per layer, and keys and values of the memory per layer that reads
    it."""

    caches: list[KeyValueCache]
    memory: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    length: int = 0

    def select(self, rows: Tensor) -> None:
        """Keep the hypotheses `rows` int64 [B'], repeats allowed."""
        for cache in self.caches:
            cache.select(rows)
        self.memory = [(keys[rows], values[rows]) for keys, values in self.memory]
