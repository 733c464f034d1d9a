"""Window attention, forward, in Triton: two kernels, each beside its launcher.

    whole_forward_kernel    a window fits in one tile (N <= 64): a program keeps one head's bias in registers and walks
                            over windows; softmax in one go
    tiled_forward_kernel    larger windows: a program has one tile of queries and walks over its window's keys, with the
                            online softmax of FlashAttention (arXiv:2205.14135)

tiles.py has the legend, launch.py the choice between the two. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_parts import load_rows, product, store_rows
from kernels.window_attention.launch import Call, bias_strides, configure, tail_of
from kernels.window_attention.tiles import (
    SIZES,
    absorb,
    bias_of,
    corner_of,
    inverse_norm,
    locate,
    next_place,
    number_of,
    offset_of,
    own_window,
    place_of,
    regions,
    scaled_products,
    windows_of,
    with_pads,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def whole_forward_kernel(
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [h, BLOCK, BLOCK] fp32, times log2 e, -inf for keys from N on
    multiplier: tl.tensor,  # [h] fp32: COSINE's multiplier, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]: PADS_ARE_KEYS' key and value
    out: tl.tensor,  # [B, H, W, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32: log2 of the sum of 2^logits, +inf of none; written if KEEP_LSE
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    bias_stride: tl.int32,  # from head to head: 0 where all share one
    scale: tl.float32,  # times log2 e
    group_size: tl.int32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    BLOCK: tl.constexpr,  # N, padded
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
    EXACT: tl.constexpr,  # the window divides the map
    KEEP_LSE: tl.constexpr,  # for a backward in tiles
) -> None:
    """The windows of one group, for one head. Grid: groups * h, head fastest."""
    head = tl.program_id(0) % heads
    first, last, at_bottom, at_right, down, across = windows_of(
        tl.program_id(0) // heads, group_size, batch, rows, columns
    )
    n = tl.arange(0, BLOCK)
    query_region, key_region = regions(
        n, at_bottom, at_right, height, width, rows, columns, WY, WX, sy, sx, PADS_ARE_KEYS
    )
    hidden = query_region[:, None] != key_region[None, :]
    bias_tile = tl.load(bias + head * bias_stride + n[:, None] * BLOCK + n[None, :])
    bias_tile = tl.where(hidden, float("-inf"), bias_tile)
    if COSINE:
        scale = tl.load(multiplier + head)

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
        if PADS_ARE_KEYS:
            k = with_pads(k, pad_kv + head * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
            v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)

        logits = product(q, tl.trans(k))
        if COSINE:
            logits = logits * inverse_norm(q)[:, None] * inverse_norm(k)[None, :]
        logits = logits * scale + bias_tile
        largest = tl.max(logits, 1)
        largest = tl.where(largest == float("-inf"), 0.0, largest)  # a pad query may see nothing
        weights = tl.exp2(logits - largest[:, None])
        total = tl.sum(weights, 1)
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        result = product(weights.to(v.dtype), v) * (1.0 / total)[:, None]
        store_rows(
            out + plane * (heads * HEAD_DIM) + head * HEAD_DIM,
            token,
            heads * HEAD_DIM,
            real,
            result,
            HEAD_DIM,
            BLOCK_D,
        )
        if KEEP_LSE:
            number = number_of(sample, row, column, at_bottom, at_right, rows, columns)
            line = (number.to(tl.int64) * heads + head) * (WY * WX)
            tl.store(
                lse + line + n, tl.where(nothing, float("inf"), largest + tl.log2(total)), mask=n < WY * WX
            )
        sample, row, column = next_place(sample, row, column, down, across)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def tiled_forward_kernel(
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
    multiplier: tl.tensor,  # [h] fp32: COSINE's multiplier, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    out: tl.tensor,  # [B, H, W, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32: log2 of the sum of 2^logits, +inf of none; written if KEEP_LSE
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,  # from one kind of window to the next: 0 where all are alike
    bias_stride: tl.int64,  # from head to head: 0 where all share one
    scale: tl.float32,  # times log2 e
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,  # keys of a last, smaller step; 0: none
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
    KEEP_LSE: tl.constexpr,  # for a backward in tiles
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

    qn = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_token, q_real = locate(qn, top, left, height, width, WY, WX, sy, sx)
    q = load_rows(q_start, q_token, token_stride, q_real, HEAD_DIM, BLOCK_D)
    bias_rows = bias_start + (tl.minimum(qn, SIDE - 1) * SIDE)[:, None]
    q_scale = tl.zeros([BLOCK_Q], tl.float32) + scale
    if COSINE:
        q_scale = tl.load(multiplier + head) * inverse_norm(q)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, slots // BLOCK_K * BLOCK_K, BLOCK_K):
        kn = start + tl.arange(0, BLOCK_K)
        acc, largest, total = attend(
            acc, largest, total, q, q_scale, bias_rows, kn, q_start, token_stride, pad_kv, head, heads,
            top, left, height, width, sy, sx, WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if TAIL > 0:
        kn = slots // BLOCK_K * BLOCK_K + tl.arange(0, TAIL)
        acc, largest, total = attend(
            acc, largest, total, q, q_scale, bias_rows, kn, q_start, token_stride, pad_kv, head, heads,
            top, left, height, width, sy, sx, WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip

    nothing = total == 0.0  # a pad query may see nothing
    total = tl.where(nothing, 1.0, total)
    store_rows(
        out + plane * (heads * HEAD_DIM) + head * HEAD_DIM,
        q_token, heads * HEAD_DIM, q_real, acc * (1.0 / total)[:, None], HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if KEEP_LSE:
        line = (window.to(tl.int64) * heads + head) * slots
        tl.store(lse + line + qn, tl.where(nothing, float("inf"), largest + tl.log2(total)), mask=qn < slots)


@triton.jit
def attend(
    acc, largest, total, q, q_scale, bias_rows, kn, q_start, token_stride, pad_kv, head, heads,
    top, left, height, width, sy, sx, WY: tl.constexpr, WX: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr, PADS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys in slots `kn`."""
    token, real = locate(kn, top, left, height, width, WY, WX, sy, sx)
    k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    if PADS_ARE_KEYS:
        k = with_pads(k, pad_kv + head * HEAD_DIM, kn, WY * WX, real, HEAD_DIM, BLOCK_D)
        v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, kn, WY * WX, real, HEAD_DIM, BLOCK_D)
    products, unused = scaled_products(q, k, q_scale, COSINE)
    return absorb(acc, largest, total, products + tl.load(bias_rows + kn[None, :]), v)


def forward(call: Call, qkv: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor, lse: Tensor) -> Tensor:
    """qkv [B, H, W, 3, h, D] contiguous -> [B, H, W, h * D]. bias, multiplier and pad_kv are as the kernels take them;
    lse is written unless it is empty."""
    batch, height, width, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((batch, height, width, heads * head_dim))
    config, keep_lse = configure("forward", call.form), lse.numel() > 0
    with torch.cuda.device_of(qkv):
        if call.form.whole:
            size = call.group_size(config)
            whole_forward_kernel[(call.groups(size) * heads,)](
                qkv, bias, multiplier, pad_kv, out, lse, *call.sizes, bias_strides(bias)[1], call.scale, size,
                BLOCK=call.form.padded, EXACT=call.launched.exact, KEEP_LSE=keep_lse,
                PADS_ARE_KEYS=call.pads_are_keys, **call.constants, **config.options,
            )  # fmt: skip
            return out
        tiled_forward_kernel[call.each_window(config.queries)](
            qkv, bias, multiplier, pad_kv, out, lse, *call.sizes, *bias_strides(bias), call.scale,
            SIDE=call.form.side, BLOCK_Q=config.queries, BLOCK_K=config.keys, TAIL=tail_of(call.form),
            KEEP_LSE=keep_lse, PADS_ARE_KEYS=call.pads_are_keys, **call.constants, **config.options,
        )  # fmt: skip
    return out
