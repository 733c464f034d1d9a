"""Latent attention through torch's scaled_dot_product_attention.

On Hopper GPUs cuDNN's kernel comes first: it took half of FlashAttention-2's time on an H200, and takes dqk != dv. On a CPU
half types are computed in float32: torch's own half arithmetic measured 4 to 6 times slower there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.backend import is_hopper
from kernels.latent_attention.eager import additive_mask, fold_heads, unfold_heads
from kernels.latent_attention.reference import compute_dtype


def takes_cudnn(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch gives a call in a half type on a Hopper GPU to cuDNN, if it is asked to."""
    fits = q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0 and k.shape[-3] > 1
    return fits and not torch.are_deterministic_algorithms_enabled()


def _cudnn_first() -> AbstractContextManager[None]:
    """torch's order with cuDNN in front, among the kernels that the caller left enabled."""
    on = torch.backends.cuda
    enabled = (
        (SDPBackend.CUDNN_ATTENTION, on.cudnn_sdp_enabled()),
        (SDPBackend.FLASH_ATTENTION, on.flash_sdp_enabled()),
        (SDPBackend.EFFICIENT_ATTENTION, on.mem_efficient_sdp_enabled()),
        (SDPBackend.MATH, on.math_sdp_enabled()),
    )
    return sdpa_kernel([kind for kind, is_on in enabled if is_on], set_priority=True)


def latent_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d]; visible bool [B, N] -> out [B, M, h, dv]. N >= 1; no dropout,
    no lse."""
    heads, dqk, dv = q.shape[2], q.shape[3], v.shape[3]
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = (t.to(compute_dtype(t)) for t in (q, k, v))
    folded = fold_heads(q, k.shape[2])  # [B, h_kv, g * M, dqk]
    cudnn = is_hopper(q.device) and q.dtype.itemsize == 2 and takes_cudnn(q, k, v)
    cudnn = cudnn and torch.backends.cuda.cudnn_sdp_enabled()
    if (
        dqk != dv and not cudnn
    ):  # torch's other fused kernels want them equal; zeros change neither the logits nor the result
        width = max(dqk, dv)
        folded, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (folded, k, v))
    mask = empty = None
    if visible is not None:
        mask, empty = additive_mask(visible, q.dtype)
        mask = mask[:, None, None, :]
    with _cudnn_first() if cudnn else nullcontext():
        out = F.scaled_dot_product_attention(folded, k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale)
    out = out[..., :dv]
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0)
    return unfold_heads(out, heads).to(dtype)
