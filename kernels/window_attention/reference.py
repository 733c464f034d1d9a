"""The definition of window attention, written for reading: gather, compare, mask, scatter back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.window_attention.geometry import (
    Grid,
    region_of_slot,
    relative_index,
    slot_of_token,
    token_of_slot,
)

MAX_LOGIT_SCALE = math.log(100.0)  # SwinV2 (arXiv:2111.09883): the cosine is multiplied by at most 100
NORM_EPS = 1e-12  # as in torch.nn.functional.normalize


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    grid: Grid,
    scale: float,
) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [B, H, W, h * d]. Half types are computed in float32 and rounded once, at
    the end."""
    batch, height, width, _, heads, head_dim = qkv.shape
    dtype, compute = qkv.dtype, compute_dtype(qkv)
    qkv = qkv.to(compute)
    token = token_of_slot(grid, qkv.device)  # [nW, N]
    is_pad = token == grid.tokens

    # Gather each window's tokens from wherever the roll took them; the pad token stands behind the last one.
    tokens = torch.cat([qkv.flatten(1, 2), pad_token(qkv, pad_kv)], dim=1)  # [B, HW + 1, 3, h, d]
    q, k, v = tokens[:, token].unbind(3)  # each [B, nW, N, h, d]

    multiplier: Tensor | float = scale
    if logit_scale is not None:  # cosine attention
        q, k = unit(q), unit(k)
        multiplier = logit_multiplier(logit_scale, compute)[:, None, None]  # [h, 1, 1]
    logits = multiplier * torch.einsum("bwihd,bwjhd->bwhij", q, k)
    if bias is not None:
        logits = logits + expand_bias(bias, grid.window).to(compute)

    region = region_of_slot(grid, qkv.device)
    visible = region[:, :, None] == region[:, None, :]  # [nW, N, N]
    if pad_kv is None:
        visible = visible & ~is_pad[:, None, :]
    # A pad query's result is dropped below. It sees everything, so that its softmax is defined.
    visible = visible | is_pad[:, :, None]
    weights = logits.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bwhij,bwjhd->bwihd", weights, v)  # [B, nW, N, h, d]

    # Scatter: each token takes the result of its slot.
    out = out.flatten(1, 2)[:, slot_of_token(grid, qkv.device)]  # [B, HW, h, d]
    return out.reshape(batch, height, width, heads * head_dim).to(dtype)


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) over the last dimension."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(NORM_EPS**2).rsqrt()


def logit_multiplier(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(min(logit_scale, ln 100)), [h]."""
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()


def expand_bias(bias: Tensor, window: tuple[int, int]) -> Tensor:
    """A bias table [(2wy-1)*(2wx-1), h] -> [h, N, N]; a bias that is [h, N, N] already is returned as it
    is."""
    if bias.dim() == 3:
        return bias
    index = relative_index(window, bias.device)
    return bias[index].permute(2, 0, 1)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a tensor's attention is computed: float32 for half types, else its own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def pad_token(qkv: Tensor, pad_kv: Tensor | None) -> Tensor:
    """The padding as one more token of each sample, [B, 1, 3, h, d]; its query is never used."""
    zero = qkv.new_zeros(3, *qkv.shape[-2:])
    token = zero if pad_kv is None else torch.cat([zero[:1], pad_kv.to(qkv.dtype)])
    return token.expand(qkv.shape[0], 1, -1, -1, -1)
