"""Latent attention in plain torch operations, written to be fast: batched products and a softmax over [B, h,
M, N].

One autograd function, so that scale, mask and softmax work in place on tensors that nobody else sees, and
one tensor of probabilities is kept for the backward. Where that tensor would be large, another one takes a piece of the
keys at a time, keeps the log-sum-exp, and computes the probabilities again in the backward (FlashAttention,
arXiv:2205.14135). Half types are computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.latent_attention.dropout import keep_mask
from kernels.latent_attention.reference import compute_dtype
from kernels.once import once_differentiable

LARGE = 2**26  # numbers in [B, h, M, N] from which on they are never there at once
PIECE = 2**22  # then so many at a time


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """q [B, M, h, dqk]; k, v [B, N, h_kv, d]; visible bool [B, N] -> out [B, M, h, dv], lse [B, h, M] or
    None."""
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    mask = empty = keep = None
    if visible is not None:
        mask, empty = additive_mask(visible, compute_dtype(q))
    elif keys == 0:
        empty = torch.ones(batch, dtype=torch.bool, device=q.device)
    large = batch * heads * queries * keys > LARGE
    if seed is not None and not large:
        keep = keep_mask(seed, dropout_p, batch, heads, queries, keys)
        keep = keep.view(batch * kv_heads, heads // kv_heads * queries, keys)
    compute = compute_dtype(q)
    folded, k, v = fold_heads(q, kv_heads).to(compute), k.transpose(1, 2), v.transpose(1, 2)
    if large:
        out, lse = _Pieces.apply(folded, k, v, mask, seed, scale, dropout_p, heads)
        lse = lse if return_lse else None
    else:
        k, v = k.to(compute), v.to(compute)
        out, lse = _Attention.apply(folded, k, v, mask, keep, scale, dropout_p, return_lse)
    if empty is not None:
        out = out.masked_fill(empty[:, None, None, None], 0)
        lse = None if lse is None else lse.masked_fill(empty[:, None, None], float("-inf"))
    out = unfold_heads(out, heads).to(q.dtype)
    return out, None if lse is None else lse.view(batch, heads, queries)


class _Attention(torch.autograd.Function):
    """Plain attention of q [B, h, M, dqk], k, v [B, h, N, d] -> out [B, h, M, dv], lse [B, h, M] or None.

    mask [B, N] is added to the logits; keep bool [B * h, M, N] says what dropout keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        keep: Tensor | None,
        scale: float,
        dropout_p: float,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        sizes = q.shape[:2]
        scaled = _scaled(q, scale)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        logits = torch.bmm(scaled, k.mT)  # [B * h, M, N]
        if mask is not None:
            logits.unflatten(0, sizes).add_(mask[:, None, None])
        lse = logits.logsumexp(-1).unflatten(0, sizes) if return_lse else None
        weights = softmax_(logits)
        out = torch.bmm(_dropped(weights, keep, dropout_p), v).unflatten(0, sizes)
        ctx.save_for_backward(scaled, k, v, weights, keep)
        ctx.sizes, ctx.scale, ctx.dropout_p = sizes, scale, dropout_p
        return out, lse

    @staticmethod
    @once_differentiable("latent_attention")
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        scaled, k, v, weights, keep = ctx.saved_tensors
        # Autograd may call this under the caller's autocast.
        with torch.autocast(d_out.device.type, enabled=False):
            d_out = d_out.flatten(0, 1)
            d_v = torch.bmm(_dropped(weights, keep, ctx.dropout_p).mT, d_out)
            d_weights = _dropped(torch.bmm(d_out, v.mT), keep, ctx.dropout_p)
            d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if d_lse is not None:
                d_logits = d_logits.addcmul_(weights, d_lse.flatten(0, 1)[..., None])
            d_q = torch.bmm(d_logits, k).mul_(ctx.scale)
            d_k = torch.bmm(d_logits.mT, scaled)
        d_q, d_k, d_v = (t.unflatten(0, ctx.sizes) for t in (d_q, d_k, d_v))
        return d_q, d_k, d_v, None, None, None, None, None


class _Pieces(torch.autograd.Function):
    """The same for many keys, of which a piece at a time is looked at; lse always. `heads` are the queries' heads before
    they were folded: dropout counts by them. k and v in their own type and layout: a piece is copied, never all."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        scale: float,
        dropout_p: float,
        heads: int,
    ) -> tuple[Tensor, Tensor]:
        sizes = q.shape[:2]
        scaled = _scaled(q, scale)
        ctx.sizes, ctx.scale, ctx.dropout_p, ctx.heads = sizes, scale, dropout_p, heads
        largest = scaled.new_full((*scaled.shape[:2], 1), float("-inf"))
        total = torch.zeros_like(largest)
        out = scaled.new_zeros(*scaled.shape[:2], v.shape[-1])
        for some in _pieces(scaled, k):
            keys, values = _piece(k, some, q), _piece(v, some, q)
            logits = _logits(scaled, keys, mask, some, sizes)
            new = torch.maximum(largest, logits.amax(-1, keepdim=True))
            shown = new.masked_fill(new == float("-inf"), 0)  # where nothing was visible yet, not -inf - -inf
            weights = logits.sub_(shown).exp_()
            decay = (largest - shown).exp_()
            total.mul_(decay).add_(weights.sum(-1, keepdim=True))
            kept = _kept(ctx, seed, scaled, some)
            out.mul_(decay).baddbmm_(_dropped(weights, kept, dropout_p), values)
            largest = new
        out.div_(total)
        lse = (largest + total.log()).squeeze(-1)
        ctx.save_for_backward(scaled, k, v, mask, seed, out, lse)
        return out.unflatten(0, sizes), lse.unflatten(0, sizes)

    @staticmethod
    @once_differentiable("latent_attention")
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        scaled, k, v, mask, seed, out, lse = ctx.saved_tensors
        with torch.autocast(d_out.device.type, enabled=False):
            d_out = d_out.flatten(0, 1)
            delta = (d_out * out).sum(-1, keepdim=True) - d_lse.flatten(0, 1)[..., None]
            d_q, d_k, d_v = torch.zeros_like(scaled), torch.empty_like(k), torch.empty_like(v)
            for some in _pieces(scaled, k):
                keys, values = _piece(k, some, scaled), _piece(v, some, scaled)
                weights = _logits(scaled, keys, mask, some, ctx.sizes).sub_(lse[..., None]).exp_()
                kept = _kept(ctx, seed, scaled, some)
                piece = torch.bmm(_dropped(weights, kept, ctx.dropout_p).mT, d_out)
                d_v[:, :, some] = piece.unflatten(0, ctx.sizes)
                d_weights = _dropped(torch.bmm(d_out, values.mT), kept, ctx.dropout_p)
                d_logits = weights.mul_(d_weights.sub_(delta))
                d_q.baddbmm_(d_logits, keys)
                d_k[:, :, some] = torch.bmm(d_logits.mT, scaled).unflatten(0, ctx.sizes)
            d_q.mul_(ctx.scale)
        return d_q.unflatten(0, ctx.sizes), d_k, d_v, None, None, None, None, None


def _pieces(scaled: Tensor, k: Tensor) -> list[slice]:
    """Of the keys; each begins at a multiple of 4, as dropout wants it."""
    size = max(4, PIECE // (scaled.shape[0] * scaled.shape[1]) // 4 * 4)
    return [slice(start, min(start + size, k.shape[2])) for start in range(0, k.shape[2], size)]


def _piece(tensor: Tensor, some: slice, like: Tensor) -> Tensor:
    """[B, h, N, d] -> [B * h, some, d] in the type that is computed in."""
    return tensor[:, :, some].flatten(0, 1).to(like.dtype)


def _logits(scaled: Tensor, k: Tensor, mask: Tensor | None, some: slice, sizes: torch.Size) -> Tensor:
    logits = torch.bmm(scaled, k.mT)
    if mask is not None:
        logits.unflatten(0, sizes).add_(mask[:, None, None, some])
    return logits


def _kept(ctx: Any, seed: Tensor | None, scaled: Tensor, some: slice) -> Tensor | None:
    """What dropout keeps of a piece, [B * h_kv, g * M, keys]."""
    if seed is None:
        return None
    batch, count = ctx.sizes[0], some.stop - some.start
    queries = scaled.shape[0] * scaled.shape[1] // (batch * ctx.heads)
    keep = keep_mask(seed, ctx.dropout_p, batch, ctx.heads, queries, count, first_key=some.start)
    return keep.view(*scaled.shape[:2], count)


def _dropped(weights: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    return weights if keep is None else weights * keep / (1 - dropout_p)


def _scaled(q: Tensor, scale: float) -> Tensor:
    """[B, h, M, d] -> [B * h, M, d], contiguous, in one pass; a compiler makes its own, and would keep q's order of strides."""
    if torch.compiler.is_compiling() or type(q) is not Tensor:
        return (q * scale).flatten(0, 1)
    return torch.mul(q, scale, out=q.new_empty(q.shape)).flatten(0, 1)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the last dimension that may overwrite its input: a fresh tensor of that size costs as
    much again."""
    if torch.compiler.is_compiling():
        return logits.softmax(-1)
    return torch.softmax(logits, -1, out=logits)


def fold_heads(q: Tensor, kv_heads: int) -> Tensor:
    """[B, M, h, d] -> [B, h_kv, g * M, d], g = h / h_kv: heads that share keys become queries of one head."""
    if kv_heads == q.shape[2]:
        return q.transpose(1, 2)
    return q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold_heads(out: Tensor, heads: int) -> Tensor:
    """[B, h_kv, g * M, d] -> [B, M, h, d]."""
    if heads == out.shape[1]:
        return out.transpose(1, 2)
    return out.unflatten(2, (heads // out.shape[1], -1)).flatten(1, 2).transpose(1, 2)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """visible [B, N] -> (0 and -inf [B, N], empty [B], or None where it is known that no sample is).

    A sample without a visible key is not masked: its result is set to zero afterwards, and until then
    nothing is NaN.
    """
    seen = visible.any(-1)
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    if _all(seen):
        return zeros.masked_fill(~visible, float("-inf")), None
    empty = ~seen
    return zeros.masked_fill(~(visible | empty[:, None]), float("-inf")), empty


def _all(flags: Tensor) -> bool:
    """Whether all are known to be True: False where asking costs a wait, or where a trace is made for other values too."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(flags) is not Tensor
    if traced or flags.device.type != "cpu":
        return False
    try:
        return bool(flags.all())
    except RuntimeError:  # make_fx with real tensors
        return False
