"""Window attention through torch's scaled_dot_product_attention: windows and heads become its batch and
heads.

Where the bias needs a gradient, torch takes its composed implementation on a CPU (its fused one has no such
gradient). On a CPU half types are computed in float32, which measured faster there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rows import gather_rows
from kernels.window_attention.eager import expand_bias
from kernels.window_attention.geometry import Grid, masks, remember
from kernels.window_attention.packing import (
    map_to_windows,
    pad_slots,
    qkv_to_windows,
    rows,
    windows_to_map,
    windows_to_qkv,
)
from kernels.window_attention.reference import compute_dtype, logit_multiplier, unit


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    grid: Grid,
    scale: float,
) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [B, H, W, h * d]; see reference.py for the meaning."""
    dtype = qkv.dtype
    if qkv.device.type == "cpu":
        qkv = qkv.to(compute_dtype(qkv))
    batch, height, width, _, heads, head_dim = qkv.shape
    windows, slots = batch * grid.windows, grid.slots
    to_windows, to_qkv = (rows(way, grid, batch, heads, qkv) for way in (qkv_to_windows, windows_to_qkv))
    packed = gather_rows(qkv.reshape(-1, head_dim), to_windows, to_qkv).view(
        3, windows, heads, slots, head_dim
    )
    q, k, v = packed.unbind(0)
    if grid.padded:
        is_pad = pad_slots(grid, batch, qkv)
        pad_k, pad_v = (0, 0) if pad_kv is None else pad_kv.to(qkv.dtype)[:, None, :, None, :].unbind(0)
        q, k, v = q.masked_fill(is_pad, 0), torch.where(is_pad, pad_k, k), torch.where(is_pad, pad_v, v)
    if logit_scale is not None:
        compute = compute_dtype(qkv)
        q = (unit(q.to(compute)) * logit_multiplier(logit_scale, compute)[:, None, None]).to(qkv.dtype)
        k = unit(k.to(compute)).to(qkv.dtype)
        scale = 1.0

    mask = _additive(qkv, bias, grid, heads, mask_pads=pad_kv is None)
    if (
        mask is not None and mask.dim() == 4
    ):  # [nW, h, N, N]: every window has a mask of its own, so it joins the heads
        q, k, v = (t.reshape(batch, grid.windows * heads, slots, head_dim) for t in (q, k, v))
        mask = mask.flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).reshape(windows, heads, slots, head_dim)
    if grid.padded:
        out = out.masked_fill(is_pad, 0)  # these rows are not gathered, and so must not get a gradient
    out = out.view(-1, head_dim)
    from_windows, from_map = (rows(way, grid, batch, heads, qkv) for way in (windows_to_map, map_to_windows))
    plane = gather_rows(out, from_windows, from_map).view(batch, height, width, heads * head_dim)
    return plane.to(dtype)


def _additive(qkv: Tensor, bias: Tensor | None, grid: Grid, heads: int, mask_pads: bool) -> Tensor | None:
    """Bias and masks in one: None, [h, N, N], or [nW, h, N, N] where windows differ."""
    expanded = None if bias is None else expand_bias(bias, grid.window).to(qkv.dtype)
    hide = remember(qkv, masks, grid, mask_pads, qkv.dtype)
    if hide.last_row is None and hide.last_column is None:
        return expanded
    by_window = qkv.new_zeros(grid.rows, grid.columns, 1, grid.slots, grid.slots)
    if hide.last_row is not None:
        by_window[-1].add_(hide.last_row)
    if hide.last_column is not None:
        by_window[:, -1].add_(hide.last_column)
    by_window = by_window.flatten(0, 1)  # [nW, 1, N, N]
    return by_window.expand(-1, heads, -1, -1) if expanded is None else by_window + expanded
