"""The attention of all accelerated blocks: `window_attention`, for either order of rolling and padding.

What the libraries do, as read in timm 1.0.31, torchvision 0.28 and transformers 5.24:

    timm            rolls, then pads
    torchvision     pads, then rolls; along an axis that one window covers there is no shift
    transformers    pads, then rolls

All let their padding through the qkv layer, so it takes part as keys. To hide a token they add -100 to its logit (one
layer adds it twice), where `window_attention` hides it entirely: e**-100 of a weight, unless logits differ that much.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.window_attention.op import window_attention
from kernels.window_attention.reference import compute_dtype


def attend(
    qkv: Tensor,
    qkv_bias: Tensor | None,
    table: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    backend: str,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    rolls_first: bool = False,
    size: Sequence[int] | None = None,
) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [B, H, W, h * d].

    qkv_bias [3 * h * d] or None: what the qkv layer makes of padding, which is zeros.
    rolls_first: the map is rolled at its own size, then padded; otherwise padded, then rolled.
    size: H and W where qkv is of a map that went through `padded`, with the same window, shift and order.
    Windows may be larger than the map. The other arguments are those of `window_attention`.
    """
    (wy, wx), (sy, sx) = window, shift
    height, width = qkv.shape[1:3] if size is None else size
    options: dict[str, Any] = {"window": (wy, wx), "shift": (sy, sx), "scale": scale}
    options |= {"logit_scale": logit_scale, "backend": backend}
    if height % wy == 0 and width % wx == 0:
        return window_attention(qkv, table, **options)
    if size is not None:
        if not (rolls_first and (sy > 0 or sx > 0)):
            return window_attention(qkv, table, **options)[:, :height, :width]
        return _rolled_before(qkv, table, height, width, **options)
    one = qkv.shape[3:]
    pad = qkv.new_zeros(one) if qkv_bias is None else qkv_bias.view(one)
    shifted, small = sy > 0 or sx > 0, height < wy or width < wx
    if not small and (rolls_first or not shifted):  # the kernel's own order
        return window_attention(qkv, table, pad_kv=pad[1:], **options)
    if not (rolls_first and shifted):  # the padded map as a map of its own: that is what the kernel rolls
        return window_attention(_padded(qkv, pad, wy, wx), table, **options)[:, :height, :width]
    qkv = _padded(qkv.roll((-sy, -sx), (1, 2)), pad, wy, wx)
    return _rolled_before(qkv, table, height, width, **options)


def padded(x: Tensor, window: Sequence[int], shift: Sequence[int], rolls_first: bool = False) -> Tensor:
    """x [B, H, W, C] with zeros at its bottom and right up to whole windows, rolled before where `rolls_first`: what the
    libraries give their qkv layer, for one that is more than a product with its weights. As it is where it fits."""
    below, right = (-size % side for size, side in zip(x.shape[1:3], window, strict=True))
    if not (below or right):
        return x
    if rolls_first and any(shift):
        x = x.roll([-step for step in shift], (1, 2))
    return F.pad(x, (0, 0, 0, right, 0, below))


def _rolled_before(
    qkv: Tensor, table: Tensor, height: int, width: int, shift: tuple[int, int], **options: Any
) -> Tensor:
    """Of a map that was rolled at its own size, then padded: take the kernel's roll back before and after it."""
    sy, sx = shift
    out = window_attention(qkv.roll((sy, sx), (1, 2)), table, shift=shift, **options)
    return out.roll((-sy, -sx), (1, 2))[:, :height, :width].roll((sy, sx), (1, 2))


def shift_where_uncovered(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> tuple[int, int]:
    """torchvision's shift of a map x [B, H, W, C]: 0 along an axis that one window covers."""
    sy, sx = (0 if size <= w else s for size, w, s in zip(x.shape[1:3], window, shift, strict=True))
    return sy, sx


def continuous_table(mlp: nn.Module, coords: Tensor, heads: int) -> Tensor:
    """SwinV2's position bias (arXiv:2111.09883, section 3.3) for every relative position: [(2wy-1) * (2wx-1), h].

    fp32 for half types: it reaches 16, where bfloat16 would be off by 1/32, and is added to logits.
    """
    return 16 * torch.sigmoid(_in_compute_dtype(mlp(coords).view(-1, heads)))


torch.fx.wrap("_in_compute_dtype")  # one call in a graph that is traced before dtypes are known


def _in_compute_dtype(raw: Tensor) -> Tensor:
    return raw.to(compute_dtype(raw))


def _padded(qkv: Tensor, pad: Tensor, wy: int, wx: int) -> Tensor:
    """The map, continued at its bottom and right with `pad` [3, h, d] up to whole windows."""
    batch, height, width = qkv.shape[:3]
    below, right, pad = -height % wy, -width % wx, pad.to(qkv.dtype)
    qkv = torch.cat([qkv, pad.expand(batch, height, right, -1, -1, -1)], dim=2)
    return torch.cat([qkv, pad.expand(batch, below, width + right, -1, -1, -1)], dim=1)
