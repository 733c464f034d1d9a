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

# Multiplications to a sample from which on samples are looked at one by one: 50 microseconds of a core.
LEAST_WORK = 2**20


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
    dtype, heads, on_cpu = q.dtype, q.shape[2], q.device.type == "cpu"
    if on_cpu and dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()
    dqk, dv = q.shape[3], v.shape[3]
    folded = fold_heads(q, k.shape[2])  # [B, h_kv, g * M, dqk]
    cudnn = not on_cpu and is_hopper(q.device) and dtype.itemsize == 2 and takes_cudnn(q, k, v)
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
    if dqk != dv:
        out = out[..., :dv]
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0)
    out = unfold_heads(out, heads)
    return out if out.dtype == dtype else out.to(dtype)


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, offsets: Tensor | None, scale: float
) -> Tensor | None:
    """The same on a CPU, of keys with lengths or packed: sample by sample, without a mask, and without the work on keys that
    nobody sees. None where the samples are too small for that, or have no keys, or where a compiler reads along.
    """
    told = key_lengths if offsets is None else offsets.diff()
    if told is None or told.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lengths = told.tolist()
    work = sum(lengths) * q.shape[1] * q.shape[2] * (q.shape[3] + v.shape[-1])
    if work < LEAST_WORK * len(lengths) or not work:
        return None
    dtype = q.dtype
    if dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()
    parts = lengths
    if offsets is None:  # of each sample what is visible, then what is hidden
        parts = [count for length in lengths for count in (length, k.shape[1] - length)]
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    step = len(parts) // len(lengths)
    keys, values = k.split(parts)[::step], v.split(parts)[::step]
    outs = [
        latent_attention(one, key[None], value[None], None, scale)
        if len(key)
        else one.new_zeros(*one.shape[:3], v.shape[-1])
        for one, key, value in zip(q.split(1), keys, values, strict=True)
    ]
    return torch.cat(outs).to(dtype)
