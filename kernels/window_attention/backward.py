"""Window attention, backward, in tiles, in Triton: each kernel beside its launcher. Nothing is added atomically.

Where no faster kernels fit (backward_whole.py, backward_walking.py), three, as in FlashAttention-2 (arXiv:2307.08691),
each with what it owns in registers:

    query_grad_kernel       dq, and delta = sum(dout * out), for a tile of queries, over all keys
    key_grad_kernel         dk and dv for a tile of keys, over all queries
    bias_grad_kernel        one tile of the bias gradient, over windows

Every partial sum has a place of its own (a group's, a tile's), and torch or bias.py adds them in a fixed order.
With P = softmax(L), O = P V and L = m Q K^T + bias: dV = P^T dO, dL = P * (dO V^T - delta), dQ = m dL K, dK = m dL^T Q.
For cosine attention Q and K stand for q / |q| and k / |k|, and the gradient continues through x / |x|.

tiles.py has the legend, launch.py the choice. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_parts import LN_2, load_rows, product, store_rows
from kernels.window_attention.launch import Call, bias_strides, configure
from kernels.window_attention.partials import Gradients, empty_partials
from kernels.window_attention.tiles import (
    SIZES,
    bias_of,
    corner_of,
    grad_of_unit,
    inverse_norm,
    locate,
    next_place,
    number_of,
    own_window,
    place_of,
    scaled_products,
    windows_of,
    with_pads,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def query_grad_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    out: tl.tensor,  # [B, H, W, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32, written
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dq is written
    grad_multiplier: tl.tensor,  # [windows * tiles, h] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,
    bias_stride: tl.int64,
    scale: tl.float32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
) -> None:
    """BLOCK_Q queries of one window, for one head. Grid: (h * tiles, windows of a sample, B), tile fastest, then head."""
    slots: tl.constexpr = WY * WX
    tiles: tl.constexpr = (slots + BLOCK_Q - 1) // BLOCK_Q
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    sample, window, at_bottom, at_right, top, left = own_window(rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    if COSINE:
        scale = tl.load(multiplier + head)

    qn = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_token, q_real = locate(qn, top, left, height, width, WY, WX, sy, sx)
    q = load_rows(q_start, q_token, token_stride, q_real, HEAD_DIM, BLOCK_D)
    bias_rows = bias_start + (tl.minimum(qn, SIDE - 1) * SIDE)[:, None]
    q_scale = tl.zeros([BLOCK_Q], tl.float32) + scale
    if COSINE:
        q_norm = inverse_norm(q)
        q_scale = scale * q_norm
    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    d_out = load_rows(grad_out + place, q_token, heads * HEAD_DIM, q_real, HEAD_DIM, BLOCK_D)
    result = load_rows(out + place, q_token, heads * HEAD_DIM, q_real, HEAD_DIM, BLOCK_D)
    q_delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
    line = (window.to(tl.int64) * heads + head) * slots
    tl.store(delta + line + qn, q_delta, mask=q_real)
    q_lse = tl.load(lse + line + qn, mask=q_real, other=float("inf"))  # its weights are 0

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, slots, BLOCK_K):
        kn = start + tl.arange(0, BLOCK_K)
        token, real = locate(kn, top, left, height, width, WY, WX, sy, sx)
        k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        if PADS_ARE_KEYS:
            k = with_pads(k, pad_kv + head * HEAD_DIM, kn, slots, real, HEAD_DIM, BLOCK_D)
            v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, kn, slots, real, HEAD_DIM, BLOCK_D)
        products, k = scaled_products(q, k, q_scale, COSINE)
        logits = products + tl.load(bias_rows + kn[None, :])
        weights = tl.exp2(logits - q_lse[:, None])
        d_logits = weights * (product(d_out, tl.trans(v)) - q_delta[:, None])
        acc += product(d_logits.to(k.dtype), k)

    if COSINE:
        acc, along = grad_of_unit(acc, q, q_norm, scale * LN_2)
        tl.store(grad_multiplier + (window.to(tl.int64) * tiles + tile) * heads + head, tl.sum(along, 0))
    else:
        acc = acc * (scale * LN_2)
    d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
    store_rows(d_start, q_token, token_stride, q_real, acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def key_grad_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # as above, but [kinds, h, key, query]
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dk and dv are written
    grad_pads: tl.tensor,  # [windows * tiles, 2, h, D] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,
    bias_stride: tl.int64,
    scale: tl.float32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
) -> None:
    """BLOCK_K keys of one window, for one head. Grid: (h * tiles, windows of a sample, B), tile fastest, then head. Logits
    and all that has their shape are transposed: [keys, queries]."""
    slots: tl.constexpr = WY * WX
    tiles: tl.constexpr = (slots + BLOCK_K - 1) // BLOCK_K
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    sample, window, at_bottom, at_right, top, left = own_window(rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    if COSINE:
        scale = tl.load(multiplier + head)

    kn = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_token, k_real = locate(kn, top, left, height, width, WY, WX, sy, sx)
    k = load_rows(q_start + heads * HEAD_DIM, k_token, token_stride, k_real, HEAD_DIM, BLOCK_D)
    v = load_rows(q_start + 2 * heads * HEAD_DIM, k_token, token_stride, k_real, HEAD_DIM, BLOCK_D)
    if PADS_ARE_KEYS:
        k = with_pads(k, pad_kv + head * HEAD_DIM, kn, slots, k_real, HEAD_DIM, BLOCK_D)
        v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, kn, slots, k_real, HEAD_DIM, BLOCK_D)
    bias_rows = bias_start + (tl.minimum(kn, SIDE - 1) * SIDE)[:, None]
    k_scale = tl.zeros([BLOCK_K], tl.float32) + scale
    if COSINE:
        k_norm = inverse_norm(k)
        k_scale = scale * k_norm

    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (window.to(tl.int64) * heads + head) * slots
    d_k = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, slots, BLOCK_Q):
        qn = start + tl.arange(0, BLOCK_Q)
        token, real = locate(qn, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        d_out = load_rows(grad_out + place, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        q_lse = tl.load(lse + line + qn, mask=real, other=float("inf"))
        q_delta = tl.load(delta + line + qn, mask=real, other=0.0)
        products, q = scaled_products(k, q, k_scale, COSINE)
        logits = products + tl.load(bias_rows + qn[None, :])
        weights = tl.exp2(logits - q_lse[None, :])
        d_v += product(weights.to(d_out.dtype), d_out)
        d_logits = weights * (product(v, tl.trans(d_out)) - q_delta[None, :])
        d_k += product(d_logits.to(q.dtype), q)

    if COSINE:
        d_k, _ = grad_of_unit(d_k, k, k_norm, scale * LN_2)
    else:
        d_k = d_k * (scale * LN_2)
    d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
    store_rows(d_start + heads * HEAD_DIM, k_token, token_stride, k_real, d_k, HEAD_DIM, BLOCK_D)
    store_rows(d_start + 2 * heads * HEAD_DIM, k_token, token_stride, k_real, d_v, HEAD_DIM, BLOCK_D)
    if PADS_ARE_KEYS:
        pad = ((kn < slots) & ~k_real)[:, None]
        d = tl.arange(0, BLOCK_D)
        k_start = grad_pads + ((window.to(tl.int64) * tiles + tile) * 2 * heads + head) * HEAD_DIM
        tl.store(k_start + d, tl.sum(tl.where(pad, d_k, 0.0), 0), mask=d < HEAD_DIM)
        tl.store(k_start + heads * HEAD_DIM + d, tl.sum(tl.where(pad, d_v, 0.0), 0), mask=d < HEAD_DIM)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def bias_grad_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32
    grad_bias: tl.tensor,  # [G, h, SIDE, SIDE] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,
    bias_stride: tl.int64,
    scale: tl.float32,
    group_size: tl.int32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
) -> None:
    """One tile of the bias gradient, summed over the windows of one group. Grid: groups * query tiles * key tiles * h,
    head fastest, then keys, then queries."""
    head = tl.program_id(0) % heads
    slots: tl.constexpr = WY * WX
    q_tiles, k_tiles = tl.cdiv(slots, BLOCK_Q), tl.cdiv(slots, BLOCK_K)
    kn = tl.program_id(0) // heads % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    qn = tl.program_id(0) // (heads * k_tiles) % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    group = tl.program_id(0) // (heads * k_tiles * q_tiles)
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    token_stride = 3 * heads * HEAD_DIM
    if COSINE:
        scale = tl.load(multiplier + head)
    tile = tl.minimum(qn, SIDE - 1)[:, None] * SIDE + tl.minimum(kn, SIDE - 1)[None, :]
    bias_tile = tl.load(bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head) + tile)

    acc = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    sample, row, column = place_of(first, down, across)
    for _ in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        q_token, q_real = locate(qn, top, left, height, width, WY, WX, sy, sx)
        k_token, k_real = locate(kn, top, left, height, width, WY, WX, sy, sx)
        plane = sample.to(tl.int64) * (height * width)
        q_start = qkv + plane * token_stride + head * HEAD_DIM
        q = load_rows(q_start, q_token, token_stride, q_real, HEAD_DIM, BLOCK_D)
        k = load_rows(q_start + heads * HEAD_DIM, k_token, token_stride, k_real, HEAD_DIM, BLOCK_D)
        v = load_rows(q_start + 2 * heads * HEAD_DIM, k_token, token_stride, k_real, HEAD_DIM, BLOCK_D)
        out_start = grad_out + plane * (heads * HEAD_DIM) + head * HEAD_DIM
        d_out = load_rows(out_start, q_token, heads * HEAD_DIM, q_real, HEAD_DIM, BLOCK_D)
        if PADS_ARE_KEYS:
            k = with_pads(k, pad_kv + head * HEAD_DIM, kn, slots, k_real, HEAD_DIM, BLOCK_D)
            v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, kn, slots, k_real, HEAD_DIM, BLOCK_D)
        number = number_of(sample, row, column, at_bottom, at_right, rows, columns)
        line = (number.to(tl.int64) * heads + head) * slots
        q_lse = tl.load(lse + line + qn, mask=q_real, other=float("inf"))
        q_delta = tl.load(delta + line + qn, mask=q_real, other=0.0)
        q_scale = tl.zeros([BLOCK_Q], tl.float32) + scale
        if COSINE:
            q_scale = scale * inverse_norm(q)
        products, unused = scaled_products(q, k, q_scale, COSINE)
        weights = tl.exp2(products + bias_tile - q_lse[:, None])
        acc += weights * (product(d_out, tl.trans(v)) - q_delta[:, None])
        sample, row, column = next_place(sample, row, column, down, across)

    place = (group * heads + head).to(tl.int64) * (SIDE * SIDE)
    tl.store(grad_bias + place + tile, acc, mask=(qn < SIDE)[:, None] & (kn < SIDE)[None, :])


def backward(
    call: Call,
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    pad_kv: Tensor,
    *,
    bias_grad: bool,
) -> Gradients:
    """The gradients of `forward.forward`, whose results are out and lse; grad_out [B, H, W, h * D] is contiguous."""
    heads, delta, grad_qkv = call.heads, torch.empty_like(lse), torch.empty_like(qkv)
    queries, keys, tile = (configure(kernel, call.form) for kernel in ("queries", "keys", "bias"))
    q_programs, k_programs = (
        call.windows * triton.cdiv(call.slots, block) for block in (queries.queries, keys.keys)
    )
    tiles = triton.cdiv(call.slots, tile.queries) * triton.cdiv(call.slots, tile.keys)
    size = call.group_size(tile, tiles)
    groups = call.groups(size)
    grads = empty_partials(call, qkv, bias_grad, groups, q_programs, k_programs)
    d_bias, d_multiplier, d_pads = (bias if part is None else part for part in grads)
    numbers = *call.sizes, *bias_strides(bias), call.scale
    common = {"SIDE": call.form.side, "PADS_ARE_KEYS": call.pads_are_keys, **call.constants}
    query_grad_kernel[call.each_window(queries.queries)](
        grad_out, qkv, out, bias, multiplier, pad_kv, lse, delta, grad_qkv, d_multiplier, *numbers,
        BLOCK_Q=queries.queries, BLOCK_K=queries.keys, **common, **queries.options,
    )  # fmt: skip
    transposed = bias.mT.contiguous()  # read along its rows, as all others
    key_grad_kernel[call.each_window(keys.keys)](
        grad_out, qkv, transposed, multiplier, pad_kv, lse, delta, grad_qkv, d_pads, *numbers,
        BLOCK_Q=keys.queries, BLOCK_K=keys.keys, **common, **keys.options,
    )  # fmt: skip
    if bias_grad:
        bias_grad_kernel[(groups * tiles * heads,)](
            grad_out, qkv, bias, multiplier, pad_kv, lse, delta, d_bias, *numbers, size,
            BLOCK_Q=tile.queries, BLOCK_K=tile.keys, **common, **tile.options,
        )  # fmt: skip
    return Gradients(grad_qkv, *grads)
