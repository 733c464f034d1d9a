"""Stand-ins for FlashAttention's packages, for machines without them: their signatures, layouts, dtypes, checks and treatment
of what is empty, computed by plain torch in float32 with the roundings of the kernels.

Written from the source of flash-attn 2.8.3 (flash_attn_interface.py, csrc/flash_attn/flash_api.cpp and src/) and of
FlashAttention-3 (hopper/flash_attn_interface.py, flash_api.cpp): what `out` and the log-sum-exp of a row without keys are (0;
+inf in 2, -inf in 3), that results start as torch.empty, that a gradient through the log-sum-exp is dropped, that
addresses must be multiples of 16 bytes and nobody checks it, and what max_seqlen_q = 1 means for grouped heads.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, empty: float) -> tuple[Tensor, Tensor]:
    """One sample: q [M, h, d], k, v [N, h_kv, d] -> out [M, h, dv], lse [h, M]."""
    if len(k) == 0:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[1::-1], empty, dtype=torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = scale * torch.einsum("mhd,nhd->hmn", q.float(), k.float())
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp()
    total = weights.sum(-1)
    out = torch.einsum("hmn,nhd->mhd", weights.to(q.dtype).float(), v.float())
    return (out / total.T[..., None]).to(q.dtype), largest[..., 0] + total.log()


def gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sample; dk and dv of grouped heads are rounded before they are added."""
    group, half = q.shape[1] // k.shape[1], q.dtype
    wide = [t.repeat_interleave(group, 1).float() for t in (k, v)]
    weights = (scale * torch.einsum("mhd,nhd->hmn", q.float(), wide[0]) - lse[..., None]).exp()
    delta = (d_out.float() * out.float()).sum(-1).T
    d_weights = torch.einsum("mhd,nhd->hmn", d_out.float(), wide[1])
    d_logits = (weights * (d_weights - delta[..., None])).to(half).float()
    d_q = scale * torch.einsum("hmn,nhd->mhd", d_logits, wide[0])
    d_k = scale * torch.einsum("hmn,mhd->nhd", d_logits, q.float())
    d_v = torch.einsum("hmn,mhd->nhd", weights.to(half).float(), d_out.float())
    d_k, d_v = (t.to(half).unflatten(1, (-1, group)).float().sum(2).to(half) for t in (d_k, d_v))
    return d_q.to(half), d_k, d_v


def refuse(*tensors: Tensor, most: int = 256) -> None:
    """What the packages check, and what their kernels crash on."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.dtype != tensors[0].dtype:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        if tensor.stride(-1) != 1:
            raise RuntimeError("Input tensor must have contiguous last dimension")
        if tensor.shape[-1] % 8 or tensor.shape[-1] > most:
            raise RuntimeError("head_size must be a multiple of 8 and at most 256")
        if tensor.data_ptr() % 16 or any(2 * stride % 16 for stride in tensor.stride()[:-1]):
            raise RuntimeError("CUDA error: misaligned address")
    if tensors[0].shape[0] == 0:
        raise RuntimeError("batch size must be positive")
    if any(len(tensor) == 0 or tensor.shape[1] == 0 for tensor in tensors):
        raise RuntimeError("CUDA error: invalid configuration argument")


def samples(
    cu_q: Tensor, cu_k: Tensor, q: Tensor, k: Tensor, most_q: int, most_k: int
) -> Iterator[tuple[slice, slice]]:
    """Rows of each sample."""
    for bounds, rows, most in ((cu_q, q, most_q), (cu_k, k, most_k)):
        if bounds.dtype != torch.int32 or not bounds.is_contiguous() or len(bounds) != len(cu_q):
            raise RuntimeError("cu_seqlens must be contiguous int32 of batch_size + 1")
        # Beyond these a kernel reads other memory, or leaves rows out.
        assert int(bounds.min()) >= 0 and int(bounds.max()) <= len(rows) and int(bounds.diff().max()) <= most
    if most_q == 1 and q.shape[1] > k.shape[1] and len(q) != len(cu_q) - 1:
        raise RuntimeError("shape is invalid: one query per sample is taken for granted with grouped heads")
    for index in range(len(cu_q) - 1):
        yield slice(int(cu_q[index]), int(cu_q[index + 1])), slice(int(cu_k[index]), int(cu_k[index + 1]))


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
) -> Any:  # fmt: skip
    assert dropout_p == softcap == 0 and not causal and window_size == (-1, -1) and alibi_slopes is None
    refuse(q, k, v)
    if q.shape[-1] != k.shape[-1] or k.shape != v.shape:
        raise RuntimeError("v must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outs, lses = zip(*(attend(*each, scale, float("inf")) for each in zip(q, k, v, strict=True)), strict=True)
    out = torch.empty_like(q).copy_(torch.stack(outs))
    return (out, torch.stack(lses), q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
) -> Any:  # fmt: skip
    assert dropout_p == softcap == 0 and not causal and alibi_slopes is block_table is None
    refuse(q, k, v)
    if k.shape != v.shape:
        raise RuntimeError("v must have shape (total_k, num_heads_k, head_size)")
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1::-1], dtype=torch.float32)
    for mine, keys in samples(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q, max_seqlen_k):
        out[mine], lse[:, mine] = attend(q[mine], k[keys], v[keys], softmax_scale, float("inf"))
    return (out, lse, q.new_empty(0)) if return_attn_probs else out


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
) -> Tensor:  # fmt: skip
    assert (
        deterministic
        and dropout_p == softcap == 0
        and not causal
        and window_size_left == window_size_right == -1
    )
    refuse(dout, q, k, v, out, dq, dk, dv)
    for index in range(len(q)):
        mine = gradients(*(t[index] for t in (dout, q, k, v, out, softmax_lse)), softmax_scale)
        dq[index], dk[index], dv[index] = mine
    return softmax_lse


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    zero_tensors=False,
) -> Tensor:  # fmt: skip
    assert (
        deterministic
        and dropout_p == softcap == 0
        and not causal
        and window_size_left == window_size_right == -1
    )
    refuse(dout, q, k, v, out, dq, dk, dv)
    assert softmax_lse.shape == q.shape[1::-1] and softmax_lse.is_contiguous()
    for mine, keys in samples(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q, max_seqlen_k):
        one = gradients(dout[mine], q[mine], k[keys], v[keys], out[mine], softmax_lse[:, mine], softmax_scale)
        dq[mine], dk[keys], dv[keys] = one
    return softmax_lse


def third_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
) -> Any:  # fmt: skip
    assert not causal
    refuse(q, k, v, most=512)
    outs, lses = zip(
        *(attend(*each, softmax_scale, -float("inf")) for each in zip(q, k, v, strict=True)), strict=True
    )
    return (torch.stack(outs), torch.stack(lses)) if return_attn_probs else torch.stack(outs)


def third_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
) -> Any:  # fmt: skip
    assert not causal
    refuse(q, k, v, most=512)
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1::-1], dtype=torch.float32)
    for index, (mine, keys) in enumerate(
        samples(cu_seqlens_q, cu_seqlens_k, q, k, max_seqlen_q, max_seqlen_k)
    ):
        if seqused_k is not None:
            assert seqused_k.dtype == torch.int32 and len(seqused_k) == len(cu_seqlens_q) - 1
            keys = slice(keys.start, keys.start + int(seqused_k[index]))
        out[mine], lse[:, mine] = attend(q[mine], k[keys], v[keys], softmax_scale, -float("inf"))
    return (out, lse) if return_attn_probs else out


def second() -> dict[str, types.ModuleType]:
    """FlashAttention-2, for sys.modules."""
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    for function in (
        flash_attn_func,
        flash_attn_varlen_func,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    ):
        setattr(interface, function.__name__, function)
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def third() -> dict[str, types.ModuleType]:
    """FlashAttention-3."""
    interface = types.ModuleType("flash_attn_interface")
    interface.flash_attn_func, interface.flash_attn_varlen_func = third_func, third_varlen_func  # type: ignore[attr-defined]
    return {"flash_attn_interface": interface}
