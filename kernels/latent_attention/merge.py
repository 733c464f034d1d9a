"""Attention over a union of keys from the attention over its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.transforms import require_tensors


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Exact combination of partial results over disjoint keys, in the order given (so it is deterministic).

    outs: each [B, M, h, dv]; lses: each [B, h, M], natural log, -inf for a row without a visible key; as
    `latent_attention(..., return_lse=True)` returns them. Returns (out, lse) of all keys together, with
    gradients to all. The sums are in float32 (float64 for float64 outs), and out has the first part's dtype.
    Raises ValueError where the parts do not fit together.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention: as many lses as outs, at least one; got {len(outs)} and {len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        require_tensors("merge_attention", out=out, lse=lse)
        if (
            out.dim() != 4
            or out.shape != outs[0].shape
            or lse.shape != (out.shape[0], out.shape[2], out.shape[1])
        ):
            raise ValueError(
                f"merge_attention: every out must be [B, M, h, dv] = {list(outs[0].shape)} and its lse [B, h, M]; "
                f"got {list(out.shape)} and {list(lse.shape)}"
            )
    compute = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(compute) for lse in lses])  # [parts, B, h, M]
    # Where no part has a key every weight is exp(-inf - 0) = 0, and no -inf is subtracted from -inf.
    highest = parts.detach().amax(0)
    highest = highest.masked_fill(highest == float("-inf"), 0)
    weights = (parts - highest).exp()
    total = weights.sum(0)
    empty = total == 0
    shares = weights / total.masked_fill(empty, 1)  # [parts, B, h, M]
    stacked = torch.stack([out.to(compute) for out in outs])  # [parts, B, M, h, dv]
    merged = (shares.transpose(2, 3)[..., None] * stacked).sum(0)
    lse = (highest + total.masked_fill(empty, 1).log()).masked_fill(empty, float("-inf"))
    return merged.to(outs[0].dtype), lse
