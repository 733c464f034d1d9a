"""Latent attention through torch's scaled_dot_product_attention.

On Hopper GPUs cuDNN's kernel comes first: it took half of FlashAttention-2's time on an H200, and takes dqk != dv. On a CPU
half types are computed in float32: torch's own bfloat16 measured 2 to 8 times slower there with gradients, its float16 1.4 to 4
times without. bfloat16 without gradients is widened by torch's kernel a block at a time, in 0.5 to 1.1 of that time. Where the
CPU multiplies bfloat16 by its own instructions that kernel takes 0.5 to 0.9 of it, but for many queries of many keys; with
gradients 0.7 to 0.95 of it where its blocks are large, and up to 2.9 of it where they are small.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.backend import is_hopper
from kernels.latent_attention.eager import additive_mask, fold_heads, unfold_heads
from kernels.once import once_differentiable
from kernels.products import product_dtype

# Multiplications to a sample from which on samples are looked at one by one: 50 microseconds of a core.
LEAST_WORK = 2**20
# Where a CPU multiplies bfloat16, measured on an EPYC with AVX512_BF16 (bench/results/2026-11-29-epyc-cpu-latent-bfloat16).
# Without gradients: 512 queries and more to a head of k are faster in float32 (.72 to .98) of more keys than that. Where it
# does not, 128 are, of 4 heads of k and more (EPYC with AVX2: .65 to 1.06; 1 or 2 heads 1.04 to 1.27; 32 queries 1.1 to 1.5).
MANY_QUERIES, MANY_KEYS = 512, 2048
SOME_QUERIES, SOME_HEADS = 128, 4
# With gradients: queries x keys (512 at most: torch's block) x head_dim squared from which on bfloat16 is the faster one. Of
# 110 shapes with 256 to 16,384 queries, 32 to 2,048 keys, head_dim 32 to 256, those above take .84 to 1.8 (most 1.05 to 1.25)
# times as long in float32, those below .35 to 1.1.
LARGE_BLOCKS = 2**29
# Of more than MANY_KEYS, queries x head_dim squared for which that holds too, as it does for twice MANY_QUERIES; 512 queries of
# head_dim 64 take .84 to 1.04 in float32.
WIDE_QUERIES = 2**22
# Queries, and keys, whose gradients torch's backward may sum up in bfloat16, over blocks of 256 and of 512: errors of .5%.
MOST_QUERIES, MOST_KEYS = 2048, 4096
# Numbers of k, for each thread of the process, that are in float32 at a time, where k and v are in a half type and have at
# least twice as many; v has as many beside them.
PIECE = 2**17


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
    dqk, dv = q.shape[3], v.shape[3]
    if on_cpu and dtype.itemsize == 2:
        fits = visible is None and dqk == dv and q.numel()  # without queries torch's kernel divides by zero
        fits = fits and not torch.compiler.is_compiling()
        many = bool(fits) and k.numel() >= 2 * _room()  # the compiler cannot look into the question
        own = fits and _as_they_are(q, k, v, many)
        if fits and (_sums_long(q, k, v) if own else many):
            read = _Summed if own else _Pieces
            return unfold_heads(read.apply(fold_heads(q, k.shape[2]), k, v, scale), heads)
        if not own:
            q, k, v = _wide(q), _wide(k), _wide(v)
    folded = fold_heads(q, k.shape[2])  # [B, h_kv, g * M, dqk]
    cudnn = not on_cpu and is_hopper(q.device) and dtype.itemsize == 2 and takes_cudnn(q, k, v)
    cudnn = cudnn and torch.backends.cuda.cudnn_sdp_enabled()
    if (
        dqk != dv and not cudnn
    ):  # torch's other fused kernels want them equal; zeros change neither the logits nor the result
        width = max(dqk, dv)
        folded, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (folded, k, v))
    if on_cpu:
        folded = _rows(folded)
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
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


def _as_they_are(q: Tensor, k: Tensor, v: Tensor, many: bool) -> bool:
    """Whether torch's kernel for CPUs reads a half type faster than it does float32 copies; of `many` keys, pieces of them."""
    multiplies = product_dtype(q.dtype, q.device) == q.dtype
    queries, keys, dim = _queries(q, k), k.shape[1], q.shape[3]
    few = not many or keys <= MANY_KEYS
    if not _learning(q, k, v):
        if many and (k.stride(-1), v.stride(-1)) != (1, 1):
            return False  # it would take copies of them, of which pieces are smaller
        most = MANY_QUERIES if multiplies else SOME_QUERIES
        few = few or queries < most or (not multiplies and k.shape[2] < SOME_HEADS)
        return few and q.dtype == torch.bfloat16
    if not multiplies:
        return False
    few = few or queries >= 2 * MANY_QUERIES or queries * dim**2 >= WIDE_QUERIES
    return few and queries * min(keys, 512) * dim**2 >= LARGE_BLOCKS


def _sums_long(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's backward in bfloat16 would add up too much in it."""
    return _learning(q, k, v) and (_queries(q, k) > MOST_QUERIES or k.shape[1] > MOST_KEYS)


def _learning(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _queries(q: Tensor, k: Tensor) -> int:
    """To a head of k."""
    return q.shape[1] * (q.shape[2] // k.shape[2])


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, offsets: Tensor | None, scale: float
) -> Tensor | None:
    """The same on a CPU, of keys with lengths or packed: sample by sample, without a mask, and without the work on keys that
    nobody sees; samples of one length all at once. None where the samples are too small for that, or have no keys, or where a
    compiler reads along.
    """
    told = key_lengths if offsets is None else offsets.diff()
    if told is None or told.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    lengths = told.tolist()
    if lengths and lengths[0] and len(set(lengths)) == 1:
        if offsets is not None:
            k, v = (t.unflatten(0, (len(lengths), lengths[0])) for t in (k, v))
        return latent_attention(q, k[:, : lengths[0]], v[:, : lengths[0]], None, scale)
    work = sum(lengths) * q.shape[1] * q.shape[2] * (q.shape[3] + v.shape[-1])
    if work < LEAST_WORK * len(lengths) or not work:
        return None
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
    return torch.cat(outs)


class _Pieces(torch.autograd.Function):
    """On a CPU, for q, k and v in a half type: kept as they came for the backward, and widened some samples at a time, or a
    piece of one sample's keys. q [B, h_kv, M, d], k, v [B, N, h_kv, d] -> out [B, h_kv, M, d]. torch's own kernels for CPUs do
    each piece; with the result and the log-sum-exp of all keys its backward gives a piece's share of the gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = (q.new_empty(size, dtype=torch.float32) for size in (q.shape, q.shape[:-1]))
        for some in _samples(k):
            out[some], lse[some] = _read(_wide(q[some]), k[some], v[some], scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable("latent_attention")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(t) for t in (q, k, v))
        for some in _samples(k):
            d_q[some] = _read_backward(
                _wide(d_out[some]), _wide(q[some]), k[some], v[some], out[some], lse[some], ctx.scale,
                d_k[some], d_v[some],
            )  # fmt: skip
        return d_q, d_k, d_v, None


class _Summed(torch.autograd.Function):
    """On a CPU that multiplies bfloat16: torch's kernel reads it as it is, its backward a piece at a time. Sums over its blocks
    of queries and of keys are rounded to bfloat16 at each block: of 64 blocks errors of 1%, of 128 1.4%. The sums of pieces
    are in float32. q [B, h_kv, M, d], k, v [B, N, h_kv, d] -> out [B, h_kv, M, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (_rows(t) for t in (q, k, v))
        out, lse = _FORWARD(q, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable("latent_attention")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_out = _rows(d_out)
        d_k, d_v = torch.empty_like(k), torch.empty_like(v)
        keys, queries = (
            _ranges(size, most) for size, most in ((k.shape[1], MOST_KEYS), (q.shape[2], MOST_QUERIES))
        )
        d_q = torch.empty_like(q, dtype=torch.float32 if len(keys) > 1 else q.dtype)
        for some in keys:
            key, value = (t[:, some].transpose(1, 2) for t in (k, v))
            sum_k = sum_v = None
            for asked in queries:
                more = _BACKWARD(
                    d_out[:, :, asked], q[:, :, asked], key, value, out[:, :, asked], lse[:, :, asked], 0.0, False,
                    scale=ctx.scale,
                )  # fmt: skip
                if some.start:
                    d_q[:, :, asked] += more[0]
                else:
                    d_q[:, :, asked] = more[0]
                sum_k = more[1].float() if sum_k is None else sum_k.add_(more[1])
                sum_v = more[2].float() if sum_v is None else sum_v.add_(more[2])
            assert sum_k is not None and sum_v is not None
            d_k[:, some], d_v[:, some] = sum_k.transpose(1, 2), sum_v.transpose(1, 2)
        return d_q.to(q.dtype), d_k, d_v, None


def _rows(tensor: Tensor) -> Tensor:
    """[B, ., ., d], each row's numbers side by side and no two rows of a sample in one another: what torch's kernels for CPUs
    ask for. Of k and v whose numbers lie apart they would hold all logits; of queries that overlap they give wrong results
    without a word."""
    size, (batch, *strides, last) = tensor.shape[-1], tensor.stride()
    whole = last == 1 and all(stride >= size for stride in strides) and (batch >= size or batch == 0)
    return tensor if whole else tensor.contiguous()


def _ranges(size: int, most: int) -> list[slice]:
    return [slice(first, first + most) for first in range(0, size, most)]


def _read(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result and the log-sum-exp, in float32."""
    out = lse = None
    for some in _keys(k):
        found, own = _FORWARD(q, _piece(k, some), _piece(v, some), scale=scale)
        if out is None or lse is None:
            out, lse = found, own
            continue
        both = torch.logaddexp(lse, own)
        out = out.mul_((lse - both).exp_()[..., None]).addcmul_(found, (own - both).exp_()[..., None])
        lse = both
    assert out is not None and lse is not None
    return out, lse


def _read_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    d_k: Tensor,
    d_v: Tensor,
) -> Tensor:
    """q's gradient in float32; those of k and v are written into d_k and d_v."""
    d_q: Tensor | None = None
    for some in _keys(k):
        more = _BACKWARD(d_out, q, _piece(k, some), _piece(v, some), out, lse, 0.0, False, scale=scale)
        d_q = more[0] if d_q is None else d_q.add_(more[0])
        d_k[:, some], d_v[:, some] = more[1].transpose(1, 2), more[2].transpose(1, 2)
    assert d_q is not None
    return d_q


_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, memory_format=torch.contiguous_format)


def _room() -> int:
    return PIECE * torch.get_num_threads()


def _samples(k: Tensor) -> list[slice]:
    """As many at a time as there is room for, at least one."""
    size = max(1, _room() // k[0].numel())
    return _ranges(k.shape[0], size)


def _keys(k: Tensor) -> list[slice]:
    """Of the samples k: all keys, or of one sample as many at a time as there is room for."""
    size = max(1, _room() // (k.numel() // k.shape[1]))
    return _ranges(k.shape[1], size)


def _piece(tensor: Tensor, some: slice) -> Tensor:
    """[B, N, h_kv, d] -> [B, h_kv, some, d] in float32."""
    return _wide(tensor[:, some].transpose(1, 2))
