"""Window attention in Triton for windows of up to 256 slots: three kernels, each beside its launcher. A program has one
window and head, and loads one side of it once, in up to four pieces that stay on the chip.

    resident_forward_kernel     keys and values stay; walks over tiles of queries
    resident_query_kernel       keys and values stay; dq of one tile of queries after the other, and delta
    resident_key_kernel         queries and dout stay; dk and dv of one tile of keys after the other

The tiled kernels do the same, a program for each tile: they would find a window's tokens, and make its keys unit vectors,
again for every tile. tiles.py has the legend, launch.py the choice. Importing this file imports Triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Config
from kernels.triton_parts import LN_2, load_rows, product, store_rows
from kernels.window_attention.launch import Call, Form, bias_strides, configure, pieces
from kernels.window_attention.launch import constants as shared_constants
from kernels.window_attention.tiles import (
    SIZES,
    absorb,
    bias_of,
    corner_of,
    grad_of_unit,
    inverse_norm,
    locate,
    place_of,
    windows_of,
    with_pads,
)


@triton.jit
def keys_of(
    n, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
    WY: tl.constexpr, WX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr, PADS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """Keys (of unit length for COSINE) and values in slots n."""
    token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
    k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    if PADS_ARE_KEYS:
        k = with_pads(k, pad_kv + head * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
        v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
    if COSINE:
        k = (k * inverse_norm(k)[:, None]).to(k.dtype)
    return k, v


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def resident_forward_kernel(
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
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
    kind_stride: tl.int32,  # from one kind of window to the next: 0 where all are alike
    bias_stride: tl.int32,  # from head to head: 0 where all share one
    scale: tl.float32,  # times log2 e
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,  # 0: there is no such piece
    N3: tl.constexpr,
    N4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
    KEEP_LSE: tl.constexpr,  # for a backward
) -> None:
    """Grid: windows * h, head fastest."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads  # of one window
    window, _, at_bottom, at_right, down, across = windows_of(group, 1, batch, rows, columns)
    sample, row, column = place_of(window, down, across)
    top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (group.to(tl.int64) * heads + head) * (WY * WX)
    if COSINE:
        scale = tl.load(multiplier + head)
    n1 = tl.arange(0, N1)
    k1, v1 = keys_of(
        n1, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
    )  # fmt: skip
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        k2, v2 = keys_of(
            n2, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if N3 > 0:
        n3 = N1 + N2 + tl.arange(0, N3)
        k3, v3 = keys_of(
            n3, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if N4 > 0:
        n4 = N1 + N2 + N3 + tl.arange(0, N4)
        k4, v4 = keys_of(
            n4, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip

    for begin in range(0, WY * WX, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
        q_scale = tl.zeros([BLOCK], tl.float32) + scale
        if COSINE:
            q_scale = scale * inverse_norm(q)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        logits1 = product(q, tl.trans(k1)) * q_scale[:, None] + tl.load(bias_rows + n1[None, :])
        acc, largest, total = absorb(acc, largest, total, logits1, v1)
        if N2 > 0:
            logits2 = product(q, tl.trans(k2)) * q_scale[:, None] + tl.load(bias_rows + n2[None, :])
            acc, largest, total = absorb(acc, largest, total, logits2, v2)
        if N3 > 0:
            logits3 = product(q, tl.trans(k3)) * q_scale[:, None] + tl.load(bias_rows + n3[None, :])
            acc, largest, total = absorb(acc, largest, total, logits3, v3)
        if N4 > 0:
            logits4 = product(q, tl.trans(k4)) * q_scale[:, None] + tl.load(bias_rows + n4[None, :])
            acc, largest, total = absorb(acc, largest, total, logits4, v4)
        nothing = total == 0.0  # a pad query may see nothing
        total = tl.where(nothing, 1.0, total)
        result = acc * (1.0 / total)[:, None]
        store_rows(out + place, token, heads * HEAD_DIM, real, result, HEAD_DIM, BLOCK_D)
        if KEEP_LSE:
            found = tl.where(nothing, float("inf"), largest + tl.log2(total))
            tl.store(lse + line + n, found, mask=n < WY * WX)


@triton.jit
def query_part(d_q, q, q_scale, d_out, q_lse, q_delta, k, v, bias_place):
    """d_q + dL K of one piece of the keys, without the logits' factor."""
    weights = tl.exp2(product(q, tl.trans(k)) * q_scale[:, None] + (tl.load(bias_place) - q_lse[:, None]))
    d_logits = weights * (product(d_out, tl.trans(v)) - q_delta[:, None])
    return d_q + product(d_logits.to(k.dtype), k)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def resident_query_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    out: tl.tensor,  # [B, H, W, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32, written: sum(dout * out)
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dq is written
    grad_multiplier: tl.tensor,  # [windows, h] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int32,  # from one kind of window to the next: 0 where all are alike
    bias_stride: tl.int32,  # from head to head: 0 where all share one
    scale: tl.float32,  # times log2 e
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,  # 0: there is no such piece
    N3: tl.constexpr,
    N4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
) -> None:
    """Grid: windows * h, head fastest."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads  # of one window
    window, _, at_bottom, at_right, down, across = windows_of(group, 1, batch, rows, columns)
    sample, row, column = place_of(window, down, across)
    top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (group.to(tl.int64) * heads + head) * (WY * WX)
    if COSINE:
        scale = tl.load(multiplier + head)
    natural = scale * LN_2  # without log2 e
    n1 = tl.arange(0, N1)
    k1, v1 = keys_of(
        n1, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
    )  # fmt: skip
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        k2, v2 = keys_of(
            n2, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if N3 > 0:
        n3 = N1 + N2 + tl.arange(0, N3)
        k3, v3 = keys_of(
            n3, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if N4 > 0:
        n4 = N1 + N2 + N3 + tl.arange(0, N4)
        k4, v4 = keys_of(
            n4, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip

    multiplier_acc = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, WY * WX, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        d_out = load_rows(grad_out + place, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        result = load_rows(out + place, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        q_delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(delta + line + n, q_delta, mask=real)
        q_lse = tl.load(lse + line + n, mask=real, other=float("inf"))  # its weights are 0
        bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
        q_scale = tl.zeros([BLOCK], tl.float32) + scale
        if COSINE:
            q_norm = inverse_norm(q)
            q_scale = scale * q_norm
        d_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        d_q = query_part(d_q, q, q_scale, d_out, q_lse, q_delta, k1, v1, bias_rows + n1[None, :])
        if N2 > 0:
            d_q = query_part(d_q, q, q_scale, d_out, q_lse, q_delta, k2, v2, bias_rows + n2[None, :])
        if N3 > 0:
            d_q = query_part(d_q, q, q_scale, d_out, q_lse, q_delta, k3, v3, bias_rows + n3[None, :])
        if N4 > 0:
            d_q = query_part(d_q, q, q_scale, d_out, q_lse, q_delta, k4, v4, bias_rows + n4[None, :])
        if COSINE:
            d_q, along = grad_of_unit(d_q, q, q_norm, natural)
            multiplier_acc += along
        else:
            d_q = d_q * natural
        d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
        store_rows(d_start, token, token_stride, real, d_q, HEAD_DIM, BLOCK_D)
    if COSINE:
        tl.store(grad_multiplier + tl.program_id(0), tl.sum(multiplier_acc, 0))


@triton.jit
def queries_of(
    n, q_start, token_stride, out_start, lse_start, delta_start, heads, top, left, height, width, sy, sx,
    WY: tl.constexpr, WX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Queries (of unit length for COSINE), dout, lse and delta in slots n."""
    token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
    q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
    d_out = load_rows(out_start, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
    q_lse = tl.load(lse_start + n, mask=real, other=float("inf"))  # its weights are 0
    q_delta = tl.load(delta_start + n, mask=real, other=0.0)
    if COSINE:
        q = (q * inverse_norm(q)[:, None]).to(q.dtype)
    return q, d_out, q_lse, q_delta


@triton.jit
def key_part(d_k, d_v, k, v, k_scale, q, d_out, q_lse, q_delta, bias_place):
    """d_k + dL^T Q, without the logits' factor, and d_v + P^T dO of one piece of the queries."""
    weights = tl.exp2(product(k, tl.trans(q)) * k_scale[:, None] + (tl.load(bias_place) - q_lse[None, :]))
    d_v += product(weights.to(d_out.dtype), d_out)
    d_logits = weights * (product(v, tl.trans(d_out)) - q_delta[None, :])
    return d_k + product(d_logits.to(q.dtype), q), d_v


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def resident_key_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # as above, but [kinds, h, key, query]
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dk and dv are written
    grad_pads: tl.tensor,  # [windows, 2, h, D] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int32,  # from one kind of window to the next: 0 where all are alike
    bias_stride: tl.int32,  # from head to head: 0 where all share one
    scale: tl.float32,  # times log2 e
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,  # 0: there is no such piece
    N3: tl.constexpr,
    N4: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
) -> None:
    """Grid: windows * h, head fastest. Logits and all that has their shape are transposed: [keys, queries]."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads  # of one window
    window, _, at_bottom, at_right, down, across = windows_of(group, 1, batch, rows, columns)
    sample, row, column = place_of(window, down, across)
    top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (group.to(tl.int64) * heads + head) * (WY * WX)
    if COSINE:
        scale = tl.load(multiplier + head)
    n1 = tl.arange(0, N1)
    q1, d_out1, lse1, delta1 = queries_of(
        n1, q_start, token_stride, grad_out + place, lse + line, delta + line, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE,
    )  # fmt: skip
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        q2, d_out2, lse2, delta2 = queries_of(
            n2, q_start, token_stride, grad_out + place, lse + line, delta + line, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip
    if N3 > 0:
        n3 = N1 + N2 + tl.arange(0, N3)
        q3, d_out3, lse3, delta3 = queries_of(
            n3, q_start, token_stride, grad_out + place, lse + line, delta + line, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip
    if N4 > 0:
        n4 = N1 + N2 + N3 + tl.arange(0, N4)
        q4, d_out4, lse4, delta4 = queries_of(
            n4, q_start, token_stride, grad_out + place, lse + line, delta + line, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip

    pad_k, pad_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, WY * WX, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        k, v = keys_of(
            n, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, False, PADS_ARE_KEYS,
        )  # fmt: skip
        bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
        k_scale = tl.zeros([BLOCK], tl.float32) + scale
        if COSINE:
            k_norm = inverse_norm(k)
            k_scale = scale * k_norm
        d_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        d_k, d_v = key_part(d_k, d_v, k, v, k_scale, q1, d_out1, lse1, delta1, bias_rows + n1[None, :])
        if N2 > 0:
            d_k, d_v = key_part(d_k, d_v, k, v, k_scale, q2, d_out2, lse2, delta2, bias_rows + n2[None, :])
        if N3 > 0:
            d_k, d_v = key_part(d_k, d_v, k, v, k_scale, q3, d_out3, lse3, delta3, bias_rows + n3[None, :])
        if N4 > 0:
            d_k, d_v = key_part(d_k, d_v, k, v, k_scale, q4, d_out4, lse4, delta4, bias_rows + n4[None, :])
        if COSINE:
            d_k, along = grad_of_unit(d_k, k, k_norm, scale * LN_2)
        else:
            d_k = d_k * (scale * LN_2)
        d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
        store_rows(d_start + heads * HEAD_DIM, token, token_stride, real, d_k, HEAD_DIM, BLOCK_D)
        store_rows(d_start + 2 * heads * HEAD_DIM, token, token_stride, real, d_v, HEAD_DIM, BLOCK_D)
        if PADS_ARE_KEYS:
            pad = ((n < WY * WX) & ~real)[:, None]
            pad_k += tl.sum(tl.where(pad, d_k, 0.0), 0)
            pad_v += tl.sum(tl.where(pad, d_v, 0.0), 0)
    if PADS_ARE_KEYS:
        d = tl.arange(0, BLOCK_D)
        pad_start = grad_pads + (group * 2 * heads + head).to(tl.int64) * HEAD_DIM
        tl.store(pad_start + d, pad_k, mask=d < HEAD_DIM)
        tl.store(pad_start + heads * HEAD_DIM + d, pad_v, mask=d < HEAD_DIM)


def forward(
    call: Call, qkv: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor, lse: Tensor, out: Tensor
) -> None:
    """Writes out, and lse unless it is empty."""
    config = configure("resident", call.form)
    resident_forward_kernel[(call.windows * call.heads,)](
        qkv, bias, multiplier, pad_kv, out, lse, *call.sizes, *bias_strides(bias), call.scale,
        KEEP_LSE=lse.numel() > 0, **constants(call.form, config), **config.options,
    )  # fmt: skip


def backward(
    call: Call, grad_out: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor,
    lse: Tensor, delta: Tensor, grad_qkv: Tensor, grad_multiplier: Tensor, grad_pads: Tensor,
) -> None:  # fmt: skip
    """Writes grad_qkv and delta, grad_multiplier [windows, h] and grad_pads [windows, 2, h, D] where the call has them."""
    config = configure("resident_queries", call.form)
    resident_query_kernel[(call.windows * call.heads,)](
        grad_out, qkv, out, bias, multiplier, pad_kv, lse, delta, grad_qkv, grad_multiplier, *call.sizes,
        *bias_strides(bias), call.scale, **constants(call.form, config), **config.options,
    )  # fmt: skip
    config = configure("resident_keys", call.form)
    resident_key_kernel[(call.windows * call.heads,)](
        grad_out, qkv, bias.mT.contiguous(), multiplier, pad_kv, lse, delta, grad_qkv, grad_pads, *call.sizes,
        *bias_strides(bias), call.scale, **constants(call.form, config), **config.options,
    )  # fmt: skip


def constants(form: Form, config: Config) -> dict[str, Any]:
    """Those that each kernel takes."""
    return {
        **shared_constants(form), **pieces(form.slots), "SIDE": form.side, "BLOCK": config.queries,
        "PADS_ARE_KEYS": form.pads_are_keys,
    }  # fmt: skip
