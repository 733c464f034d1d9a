"""The definition of latent attention, written for reading: one sample after the other, an explicit
softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.latent_attention.dropout import keep_mask


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    offsets: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d]; visible bool [B, N] -> out [B, M, h, dv], lse [B, h, M]
    (float32; float64 for float64).

    With offsets [B + 1], k and v are packed, [total, h_kv, d], and sample b has rows offsets[b] to offsets[b
    + 1]. Half types are computed in float32 and rounded once, at the end.
    """
    results = []
    for b in range(len(q)):
        if offsets is None:
            keys, values = k[b], v[b]
        else:
            keys, values = (t[int(offsets[b]) : int(offsets[b + 1])] for t in (k, v))
        shown = torch.ones(len(keys), dtype=torch.bool, device=q.device) if visible is None else visible[b]
        keep = None
        if seed is not None:
            keep = keep_mask(seed, dropout_p, 1, q.shape[2], q.shape[1], len(keys), first_sample=b)[0]
        results.append(_sample(q[b], keys, values, shown, scale, dropout_p, keep))
    if not results:  # an empty batch, connected to q, k and v too
        nothing = q.sum() + k.sum() + v.sum()
        lse = nothing.to(compute_dtype(q)).expand(0, q.shape[2], q.shape[1])
        return nothing.expand(0, q.shape[1], q.shape[2], v.shape[-1]), lse
    outs, lses = zip(*results, strict=True)
    return torch.stack(outs), torch.stack(lses)


def _sample(
    q: Tensor, k: Tensor, v: Tensor, shown: Tensor, scale: float, dropout_p: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [M, h, dqk], k [N, h_kv, dqk], v [N, h_kv, dv], shown [N], keep [h, M, N] -> [M, h, dv], [h, M]."""
    compute = compute_dtype(q)
    group = q.shape[1] // k.shape[1]  # query head i reads key head i // group
    k, v = k.to(compute).repeat_interleave(group, dim=1), v.to(compute).repeat_interleave(group, dim=1)
    logits = scale * torch.einsum("mhd,nhd->hmn", q.to(compute), k)
    if not shown.any():  # the result is nothing, connected to q, k and v so that their gradients are zero
        nothing = logits.masked_fill(~shown, 0)
        out = torch.einsum("hmn,nhd->mhd", nothing, v.masked_fill(~shown[:, None, None], 0))
        return out.to(q.dtype), nothing.sum(-1) - float("inf")
    logits = logits.masked_fill(~shown, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    if keep is not None:  # the normaliser, and so lse, is that of all keys
        weights = weights * keep / (1 - dropout_p)
    return torch.einsum("hmn,nhd->mhd", weights, v).to(q.dtype), lse


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's attention is computed: float32 for half types, else its own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
