"""Window attention, backward, of windows that fit in one tile, in Triton: the kernel and its launcher.

It computes a window's logits again, then all gradients at once; the bias gradient grows in registers while the program walks
over windows, and is stored once per program. No pads are keys. backward.py has the formulas, tiles.py the legend.

Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_parts import LN_2, load_rows, product, store_rows
from kernels.window_attention.launch import Call, bias_strides, fused_config
from kernels.window_attention.partials import Gradients, empty_partials
from kernels.window_attention.tiles import (
    LARGEST_HALF,
    SIZES,
    corner_of,
    grad_of_unit,
    identity,
    inverse_norm,
    locate,
    next_place,
    offset_of,
    place_of,
    regions,
    windows_of,
)


@triton.jit(do_not_specialize=SIZES)
def whole_backward_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [h, BLOCK, BLOCK] fp32, times log2 e, -inf for keys from N on
    multiplier: tl.tensor,  # [h] fp32: COSINE's multiplier, times log2 e
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D]
    grad_bias: tl.tensor,  # [G, h, BLOCK, BLOCK] fp32
    grad_multiplier: tl.tensor,  # [G, h] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    bias_stride: tl.int32,
    scale: tl.float32,  # times log2 e
    group_size: tl.int32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    EXACT: tl.constexpr,  # the window divides the map
    BY_PRODUCT: tl.constexpr,  # the bias enters by a product, from shared memory: see `tiles.identity`
    LATE: tl.constexpr,  # store gradients at the end of a window's turn, not as they are produced
) -> None:
    """The windows of one group, for one head. Grid: groups * h, head fastest."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    n = tl.arange(0, BLOCK)
    query_region, key_region = regions(
        n, at_bottom, at_right, height, width, rows, columns, WY, WX, sy, sx, False
    )
    hidden = query_region[:, None] != key_region[None, :]
    bias_tile = tl.load(bias + head * bias_stride + n[:, None] * BLOCK + n[None, :])
    bias_tile = tl.where(hidden, float("-inf"), bias_tile)
    if COSINE:
        scale = tl.load(multiplier + head)
    if BY_PRODUCT:
        # A softmax may take off the largest of each row, and fp16 is finest near 0.
        largest = tl.max(bias_tile, 1)
        bias_tile -= tl.where(largest == float("-inf"), 0.0, largest)[:, None]
        if not COSINE:
            bias_tile = bias_tile / scale
        bias_tile = tl.maximum(bias_tile, -LARGEST_HALF).to(tl.float16)
        eye = identity(BLOCK)
    natural = scale * LN_2  # without log2 e

    bias_acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    multiplier_acc = tl.zeros([BLOCK], tl.float32)
    token_stride = 3 * heads * HEAD_DIM
    if EXACT:
        token = offset_of(n, at_bottom, at_right, height, width, sy, sx, WY, WX)
        real = n < WY * WX
    sample, row, column = place_of(first, down, across)
    for _ in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        plane = sample.to(tl.int64) * (height * width)
        if EXACT:
            plane += (top + sy) * width + left + sx
        else:
            token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q_start = qkv + plane * token_stride + head * HEAD_DIM
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        out_start = grad_out + plane * (heads * HEAD_DIM) + head * HEAD_DIM
        d_out = load_rows(out_start, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)

        if COSINE:
            q_norm, k_norm = inverse_norm(q), inverse_norm(k)
        if BY_PRODUCT:
            if COSINE:
                logits = product(q, tl.trans(k)) * (q_norm * scale)[:, None] * k_norm[None, :]
                logits = tl.dot(eye, bias_tile, logits)
            else:
                logits = tl.dot(q, tl.trans(k), tl.dot(eye, bias_tile)) * scale
        else:
            logits = product(q, tl.trans(k))
            if COSINE:
                logits = logits * q_norm[:, None] * k_norm[None, :]
            logits = logits * scale + bias_tile
        largest = tl.max(logits, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(logits - largest[:, None])
        total = tl.sum(weights, 1)
        weights = weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]

        d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
        d_v = product(tl.trans(weights.to(d_out.dtype)), d_out)
        if not LATE:
            store_rows(d_start + 2 * heads * HEAD_DIM, token, token_stride, real, d_v, HEAD_DIM, BLOCK_D)
        d_weights = product(d_out, tl.trans(v))
        delta = tl.sum(weights * d_weights, 1)
        d_logits = weights * (d_weights - delta[:, None])
        if BIAS_GRAD:
            bias_acc += d_logits

        low = d_logits.to(q.dtype)
        if COSINE:
            d_q, along = grad_of_unit(product(low, (k * k_norm[:, None]).to(k.dtype)), q, q_norm, natural)
            multiplier_acc += along
        else:
            d_q = product(low, k) * natural
        if not LATE:
            store_rows(d_start, token, token_stride, real, d_q, HEAD_DIM, BLOCK_D)
        if COSINE:
            d_k, _ = grad_of_unit(
                product(tl.trans(low), (q * q_norm[:, None]).to(q.dtype)), k, k_norm, natural
            )
        else:
            d_k = product(tl.trans(low), q) * natural
        store_rows(d_start + heads * HEAD_DIM, token, token_stride, real, d_k, HEAD_DIM, BLOCK_D)
        if LATE:
            store_rows(d_start + 2 * heads * HEAD_DIM, token, token_stride, real, d_v, HEAD_DIM, BLOCK_D)
            store_rows(d_start, token, token_stride, real, d_q, HEAD_DIM, BLOCK_D)
        sample, row, column = next_place(sample, row, column, down, across)

    place = group * heads + head
    if BIAS_GRAD:
        grad_start = grad_bias + place.to(tl.int64) * (BLOCK * BLOCK)
        tl.store(grad_start + n[:, None] * BLOCK + n[None, :], bias_acc)
    if COSINE:
        tl.store(grad_multiplier + place, tl.sum(multiplier_acc, 0))


def backward(
    call: Call, grad_out: Tensor, qkv: Tensor, bias: Tensor, multiplier: Tensor, *, bias_grad: bool
) -> Gradients:
    """The gradients of `forward.forward`; grad_out [B, H, W, h * D] is contiguous. bias [1, h, Np, Np]."""
    config = fused_config(call.launched)
    assert config is not None
    grad_qkv = torch.empty_like(qkv)
    heads, size = call.heads, call.group_size(config)
    groups = call.groups(size)
    d_bias, d_multiplier, _ = empty_partials(call, qkv, bias_grad, groups, groups, 0)
    unused = qkv.new_empty(1, dtype=torch.float32)
    partials = (unused if part is None else part for part in (d_bias, d_multiplier))
    with torch.cuda.device_of(qkv):
        whole_backward_kernel[(groups * heads,)](
            grad_out, qkv, bias, multiplier, grad_qkv, *partials, *call.sizes, bias_strides(bias)[1], call.scale, size,
            BLOCK=call.form.padded, BIAS_GRAD=bias_grad, EXACT=call.launched.exact,
            BY_PRODUCT=config.by_product, LATE=config.late, **call.constants, **config.options,
        )  # fmt: skip
    return Gradients(grad_qkv, d_bias, d_multiplier, None)
