"""The block of the published Perceiver IO (arXiv:2107.14795) as transformers has it: LayerNorm, GELU, biases.

Letters: B samples, M latents or queries, D their width, N inputs, E theirs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kernels import latent_attention
from kernels.latent_module import LatentAttention


class ClassicBlock(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm: [B, M, D] -> [B, M, D].

    memory_dim: width E of what it reads, through a LayerNorm of its own; None: self-attention. query_residual: whether
    x is added to what was read.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        memory_dim: int | None = None,
        qk_width: int | None = None,
        v_width: int | None = None,
        widening: int = 1,
        query_residual: bool = True,
    ) -> None:
        super().__init__()
        qk_width = qk_width or dim
        v_width = v_width or qk_width
        self.query_residual = query_residual
        self.norm = nn.LayerNorm(dim)
        self.memory_norm = nn.LayerNorm(memory_dim) if memory_dim else None
        self.attention = LatentAttention(
            dim, heads, input_dim=memory_dim, qk_dim=qk_width // heads, v_dim=v_width // heads
        )
        self.feed_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, widening * dim)
        self.out = nn.Linear(widening * dim, dim)

    def forward(self, x: Tensor, memory: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """memory [B, N, E], or packed [N, E] with offsets int [B+1]. x [1, M, D] is the same for all samples."""
        attend, latents = self.attention, self.norm(x)
        if memory is None:
            inputs, samples = latents, x.shape[0]
        else:
            inputs = memory if self.memory_norm is None else self.memory_norm(memory)
            samples = memory.shape[0] if offsets is None else len(offsets) - 1
        q, k, v = attend.q(latents).expand(samples, -1, -1), attend.k(inputs), attend.v(inputs)
        q, k, v = (t.unflatten(-1, (attend.heads, -1)) for t in (q, k, v))
        y = attend.proj(latent_attention(q, k, v, cu_seqlens_k=offsets).flatten(-2))
        x = x + y if self.query_residual else y
        return x + self.out(F.gelu(self.up(self.feed_norm(x))))
