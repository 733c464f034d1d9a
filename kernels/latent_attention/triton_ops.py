"""Latent attention on Triton, as two operators that torch.compile does not look into: one for each pass.

Keys are rows [rows, h_kv, d] that belong to samples by a first row and a length, whether they came as [B, N, h_kv, d] or
packed: nothing is copied into a padded batch, and no length is read on the host. Triton is imported at the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.backend import triton_refusal
from kernels.latent_attention.launch import MAX_HEAD_DIM
from kernels.operators import operator

if TYPE_CHECKING:
    from kernels.latent_attention.forward import Call


def refusal(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot run this call; None where they can."""
    if (why := triton_refusal(q.device)) is not None:
        return why
    if q.dtype == torch.float64:
        return "it computes in float32 at most, got float64"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"dqk and dv must be from 1 to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}"
    return None


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    offsets: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d], or packed with offsets [B + 1] -> out [B, M, h, dv], lse [B, h, M]."""
    if offsets is not None:
        longest = len(k)
        # Offsets of another device were not looked at: they must not lead beyond k.
        bounds = offsets.long().clamp(0, longest)
        starts, lengths = bounds[:-1], bounds.diff().clamp(min=0)
    else:
        longest = k.shape[1]
        starts = torch.arange(len(q), device=q.device) * longest
        lengths = (
            torch.full_like(starts, longest) if key_lengths is None else key_lengths.long().clamp(0, longest)
        )
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    mask = None if key_mask is None else key_mask.to(torch.uint8)
    dense = offsets is None and key_lengths is None
    out, lse = _forward(q, k, v, starts, lengths, mask, seed, longest, dense, scale, dropout_p)
    return out, lse


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    longest: int,
    dense: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[2]))
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest, ctx.dense, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*output, *tensors)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.longest, ctx.dense, ctx.scale, ctx.dropout_p
    )
    return *grads, *[None] * 8


@operator("latent_attention_forward", _fake_forward, (_autograd, _setup_context))
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    longest: int,
    dense: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out [B, M, h, dv] and lse [B, h, M] fp32. k, v [rows, h_kv, d]."""
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _fake_forward(q, k, v, starts, lengths, mask, seed, longest, dense, scale, dropout_p)
        return out.zero_(), lse.fill_(float("-inf"))
    from kernels.latent_attention.forward import forward

    return forward(_call(q, k, v, starts, lengths, mask, seed, longest, dense, scale, dropout_p))


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    longest: int,
    dense: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator("latent_attention_backward", _fake_backward)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    longest: int,
    dense: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    from kernels.latent_attention.backward import backward

    call = _call(q, k, v, starts, lengths, mask, seed, longest, dense, scale, dropout_p)
    return backward(call, _aligned(grad_out), out, lse, grad_lse)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    longest: int,
    dense: bool,
    scale: float,
    dropout_p: float,
) -> Call:
    from kernels.latent_attention.forward import Call

    mask = None if mask is None else mask.contiguous()
    return Call(
        _aligned(q), _rows(k), _rows(v), starts, lengths, longest, dense, mask, scale, dropout_p, seed
    )


def _rows(tensor: Tensor) -> Tensor:
    """k or v as the kernels take it: each row's heads contiguous, at any distance from the next row's."""
    together = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    wide = tensor.stride(0) * tensor.element_size() % 16 == 0
    return tensor if together and wide and tensor.data_ptr() % 16 == 0 else _aligned(tensor)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that 16-byte loads can take."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
