"""Latent attention through torch's scaled_dot_product_attention.

On a CPU half types are computed in float32: torch's own half arithmetic measured 4 to 6 times slower there.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.latent_attention.eager import additive_mask, fold_heads, unfold_heads
from kernels.latent_attention.reference import compute_dtype


def latent_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d]; visible bool [B, N] -> out [B, M, h, dv]. N >= 1; no dropout,
    no lse."""
    heads, dqk, dv = q.shape[2], q.shape[3], v.shape[3]
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = (t.to(compute_dtype(t)) for t in (q, k, v))
    folded = fold_heads(q, k.shape[2])  # [B, h_kv, g * M, dqk]
    if dqk != dv:  # torch's fused attention wants them equal; zeros change neither the logits nor the result
        width = max(dqk, dv)
        folded, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (folded, k, v))
    mask = empty = None
    if visible is not None:
        mask, empty = additive_mask(visible, q.dtype)
        mask = mask[:, None, None, :]
    out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)[
        ..., :dv
    ]
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0)
    return unfold_heads(out, heads).to(dtype)
