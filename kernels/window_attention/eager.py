"""Window attention in plain torch operations, written to be fast: one gather in, one gather out.

The copies that roll, partition, head transposition and padding would make are one gather of rows; scale,
normalisation, mask and softmax work in place on tensors that nobody else sees. What autograd would keep of
each step is one tensor of probabilities and one of packed q, k, v. Half types are computed in float32; a CPU that
multiplies bfloat16 by its own instructions keeps it for the products of plain attention, the logits' apart: softmax would
magnify their errors. The gradient of a logit scale is a small difference of large sums, for which bfloat16 will not do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.once import once_differentiable
from kernels.products import product_dtype
from kernels.window_attention.geometry import Grid, masks, relative_index, remember
from kernels.window_attention.packing import pack_map, pack_qkv, pad_slots, unpack_map, unpack_qkv
from kernels.window_attention.reference import MAX_LOGIT_SCALE, NORM_EPS, compute_dtype, logit_multiplier

# Multiplications of one product from which bfloat16 is the faster one: before, what oneDNN sets up for each (some 30 us)
# costs more. Measured on an EPYC with AVX512_BF16: windows of 16 to 196 slots, head_dim 32 and 64.
FEWEST_BFLOAT16 = 1 << 21


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_kv: Tensor | None,
    grid: Grid,
    scale: float,
) -> Tensor:
    """qkv [B, H, W, 3, h, d] -> [B, H, W, h * d]; see reference.py for the meaning."""
    if bias is not None:
        # A table is cast before it grows: less work, and its gradient is added up in float32.
        bias = expand_bias(bias.to(compute_dtype(qkv)), grid.window)
    out: Tensor = _WindowAttention.apply(qkv, bias, logit_scale, pad_kv, grid, scale)
    return out


class _WindowAttention(torch.autograd.Function):
    """Shapes: P = B * nW windows, N slots in each; packed q, k, v and their gradients are [3, P, h, N, d], what products
    take and give [P*h, ., .].

    Kept for the backward, as products take it and in their dtype: q, k (of unit length in cosine attention, q times the
    multiplier), v, and the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,  # [B, H, W, 3, h, d]
        bias: Tensor | None,  # [h, N, N]
        logit_scale: Tensor | None,  # [h]
        pad_kv: Tensor | None,  # [2, h, d]
        grid: Grid,
        scale: float,
    ) -> Tensor:
        batch, heads, head_dim = qkv.shape[0], *qkv.shape[-2:]
        cosine = logit_scale is not None
        compute = compute_dtype(qkv)
        product = compute if cosine else _operand_dtype(qkv, grid)
        packed = pack_qkv(qkv, grid).to(product)
        if grid.padded:
            _fill_pads(packed, pad_kv, grid, batch)

        factor = None
        if logit_scale is not None:
            # q and k to unit length; q also takes the multiplier. They are kept in this form.
            factor = (
                torch.linalg.vector_norm(packed[:2], dim=-1, keepdim=True).clamp_min_(NORM_EPS).reciprocal_()
            )
            factor[0].mul_(logit_multiplier(logit_scale, packed.dtype)[:, None, None])
            packed[:2].mul_(factor)

        packed = _batched(packed)
        q, k = packed[:2].to(compute).unbind(0)
        logits = _product(q, k.mT, scale=None if cosine else scale)
        by_head = _by_head(logits, heads)
        if bias is not None:
            by_head.add_(bias)
        _add_masks(by_head, grid, batch, mask_pads=pad_kv is None)
        weights = _softmax(logits).to(product)
        out = unpack_map(_by_head(_product(weights, packed[2]), heads), grid, batch, heads, head_dim)

        ctx.save_for_backward(packed, weights, factor, logit_scale, pad_kv)
        ctx.grid, ctx.heads, ctx.scale, ctx.dtype = grid, heads, scale, qkv.dtype
        # Compiled by torch 2.11, a result that `to` gives back as it is would get no gradient.
        return out if out.dtype == qkv.dtype else out.to(qkv.dtype)

    @staticmethod
    @once_differentiable("window_attention")
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None, None]:
        # Autograd may call this under the caller's autocast.
        with torch.autocast(grad.device.type, enabled=False):
            return (*_backward(ctx, grad), None, None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    packed, weights, factor, logit_scale, pad_kv = ctx.saved_tensors
    grid: Grid = ctx.grid
    heads, batch = ctx.heads, grad.shape[0]
    head_dim = grad.shape[-1] // heads
    q, k, v = packed.unbind(0)
    d_out = pack_map(grad, grid, heads).to(packed.dtype)  # [P, h, N, d]
    if grid.padded:  # what a pad query computes goes nowhere
        d_out.masked_fill_(pad_slots(grid, batch, grad), 0)
    d_out = _batched(d_out)

    if packed.dtype != compute_dtype(packed):
        # What all v of a window share does not change its weights, nor what all k share the gradient of q. Without it
        # bfloat16 rounds no more than what does.
        own = packed[1:]
        shared = own.mean(-2, keepdim=True)  # a sum would need more digits
        if grid.padded and pad_kv is None:  # pads are zeros that nobody sees
            real = (~pad_slots(grid, batch, grad)).sum(-2, keepdim=True)
            shared = _batched((_by_head(shared, heads) * (grid.slots / real)).to(own.dtype))
        k, v = (own - shared).unbind(0)

    d_packed = torch.empty_like(packed)
    # A compiler fixes the batch where what `unbind` gave is written into.
    d_q, d_k, d_v = d_packed[0], d_packed[1], d_packed[2]
    _product(weights.mT, d_out, d_v)
    d_logits = _softmax_backward(_product(d_out, v.mT), weights)
    scale = ctx.scale if factor is None else None
    _product(d_logits, k, d_q, scale)
    _product(d_logits.mT, q, d_k, scale)

    d_packed = _by_head(d_packed, heads)
    d_bias = d_logit_scale = d_pad_kv = None
    if ctx.needs_input_grad[1]:
        d_bias = _sum_windows(_by_head(d_logits, heads))
    if factor is not None:
        # x = factor * raw, where factor = multiplier / |raw| (the multiplier of k is 1), so
        # d raw = factor * (d x - x * <x, d x> / multiplier^2); <x, d x> is the gradient of log(multiplier).
        x, d_x = _by_head(packed, heads)[:2], d_packed[:2]
        along = (x * d_x).sum(-1, keepdim=True)  # [2, P, h, N, 1]
        d_logit_scale = (along[0].sum((0, 2, 3)) * (logit_scale <= MAX_LOGIT_SCALE)).to(logit_scale.dtype)
        along[0].mul_(logit_multiplier(logit_scale, packed.dtype).pow(-2)[:, None, None])
        d_x.addcmul_(x, along, value=-1).mul_(factor)
    if pad_kv is not None and ctx.needs_input_grad[3]:
        of_pads = d_packed[1:] * pad_slots(grid, batch, grad)  # [2, P, h, N, d]
        d_pad_kv = of_pads.sum((1, 3), dtype=compute_dtype(packed)).to(pad_kv.dtype)
    d_qkv = unpack_qkv(d_packed, grid, batch, heads, head_dim)
    return d_qkv.to(ctx.dtype), d_bias, d_logit_scale, d_pad_kv


def _operand_dtype(qkv: Tensor, grid: Grid) -> torch.dtype:
    """What all but the logits is multiplied in. GPUs take another backend for half types."""
    if qkv.device.type != "cpu":
        return compute_dtype(qkv)
    batch, heads, head_dim = qkv.shape[0], *qkv.shape[-2:]
    product = product_dtype(qkv.dtype, qkv.device)
    if product == qkv.dtype and product != compute_dtype(qkv) and not torch.compiler.is_compiling():
        if batch * grid.windows * heads * grid.slots**2 * head_dim < FEWEST_BFLOAT16:
            return compute_dtype(qkv)
    return product


def _batched(tensor: Tensor) -> Tensor:
    """[..., P, h, ., .] -> [..., P*h, ., .]; not for a compiler, which cannot tell that two such sizes are one."""
    return tensor if torch.compiler.is_compiling() else tensor.flatten(-4, -3)


def _by_head(batched: Tensor, heads: int) -> Tensor:
    """[..., P*h, ., .] -> [..., P, h, ., .], the inverse."""
    if torch.compiler.is_compiling():
        return batched
    *front, products, rows, columns = batched.shape
    return batched.view(*front, products // heads, heads, rows, columns)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None, scale: float | None = None) -> Tensor:
    """scale * left @ right over what `_batched` gives, into `out` if given."""
    if torch.compiler.is_compiling():
        product = left @ right
        if scale is not None:
            product = product * scale
        return product if out is None else out.copy_(product)
    if out is None:
        out = left.new_empty(len(left), left.shape[1], right.shape[2])
    # An alpha of 0 leaves `out` as it was in bfloat16, and takes NaN for 0; float32 cannot hold all.
    if scale is not None and not 1e-30 < abs(scale) < 1e30:
        return torch.baddbmm(out, left, right, beta=0, out=out).mul_(scale)
    return torch.baddbmm(out, left, right, beta=0, alpha=1 if scale is None else scale, out=out)


def _fill_pads(packed: Tensor, pad_kv: Tensor | None, grid: Grid, batch: int) -> None:
    """Put pad_kv [2, h, d] (or zeros) into the pad slots of packed [3, P, h, N, d], in place."""
    is_pad = pad_slots(grid, batch, packed)
    packed.masked_fill_(is_pad, 0)
    if pad_kv is not None:
        packed[1:].add_(pad_kv.to(packed.dtype)[:, None, :, None, :] * is_pad)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension that may overwrite its input: a fresh tensor of that size costs as
    much again."""
    if torch.compiler.is_compiling():
        return logits.softmax(-1)
    return torch.softmax(logits, -1, out=logits)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the logits from that of their softmax, which it may overwrite, as above."""
    if torch.compiler.is_compiling():
        return torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype, grad_input=grad)


def _sum_windows(d_logits: Tensor) -> Tensor:
    """[P, h, N, N] -> [h, N, N], the bias's gradient, added up in float32 at least. Of few windows torch adds up bfloat16
    more slowly than float32."""
    wide = torch.compiler.is_compiling() or len(d_logits) <= 8
    return d_logits.sum(0, dtype=compute_dtype(d_logits) if wide else None)


def _add_masks(logits: Tensor, grid: Grid, batch: int, mask_pads: bool) -> None:
    """Add the shift's and the pads' masks to logits [P, h, N, N], in place; only the last windows have
    any."""
    hide = remember(logits, masks, grid, mask_pads, logits.dtype)
    if hide.last_row is None and hide.last_column is None:
        return
    by_window = logits.unflatten(0, (batch, grid.rows, grid.columns))
    if hide.last_row is not None:
        by_window[:, -1].add_(hide.last_row)
    if hide.last_column is not None:
        by_window[:, :, -1].add_(hide.last_column)


def expand_bias(bias: Tensor, window: tuple[int, int]) -> Tensor:
    """As in reference.py, with the indexing that is fastest in both directions."""
    if bias.dim() == 3:
        return bias
    index = remember(bias, relative_index, window)
    if bias.is_cuda:  # the gradient of index_select is atomic there, so not deterministic
        return bias[index].permute(2, 0, 1)
    return bias.t().index_select(1, index.flatten()).unflatten(1, index.shape)
