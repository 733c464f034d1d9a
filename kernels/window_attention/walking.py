"""Window attention in Triton for windows of 65 to 256 slots: two kernels, each beside its launcher. A program keeps one head
and one tile of a window's slots, and walks over windows; what depends on these alone stays in registers.

    walking_forward_kernel  a tile of queries: keeps its rows of the bias, with the mask of its kind of window
    walking_key_kernel      a tile of keys: dk and dv; keeps its part of the bias gradient

The other side of a window comes in up to four pieces whose sizes are powers of two, the least that hold N: 196 is
64 + 64 + 64 + 16. tiles.py has the legend, launch.py the choice. Importing this file imports Triton.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Config
from kernels.triton_parts import LN_2, load_rows, product, store_rows
from kernels.window_attention.launch import Call, Form, bias_strides, pieces, walking_config
from kernels.window_attention.launch import constants as shared_constants
from kernels.window_attention.tiles import (
    SIZES,
    absorb,
    bias_of,
    corner_of,
    grad_of_unit,
    inverse_norm,
    locate,
    next_place,
    place_of,
    regions,
    windows_before,
    windows_of,
    with_pads,
)


@triton.jit
def masked_bias(
    bias_rows, n, q_region, at_bottom, at_right, height, width, rows, columns, sy, sx,
    WY: tl.constexpr, WX: tl.constexpr, PADS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """The bias of a tile of queries for the keys in slots n, with what is hidden in this kind of window."""
    _, k_region = regions(n, at_bottom, at_right, height, width, rows, columns, WY, WX, sy, sx, PADS_ARE_KEYS)
    return tl.where(q_region[:, None] == k_region[None, :], tl.load(bias_rows + n[None, :]), float("-inf"))


@triton.jit
def logits_of(
    n, q, q_scale, bias_tile, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
    WY: tl.constexpr, WX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr, PADS_ARE_KEYS: tl.constexpr,
):  # fmt: skip
    """Logits of the keys in slots n, times log2 e, and their values."""
    token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
    k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
    if PADS_ARE_KEYS:
        k = with_pads(k, pad_kv + head * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
        v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
    logits = product(q, tl.trans(k))
    if COSINE:
        logits = logits * inverse_norm(k)[None, :]
    return logits * q_scale[:, None] + bias_tile, v


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def walking_forward_kernel(
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [h, SIDE, SIDE] fp32, times log2 e, -inf for keys from N on
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
    """One tile of queries in the windows of one group, for one head. Grid: groups * tiles * h, head fastest, then tile."""
    head = tl.program_id(0) % heads
    tiles: tl.constexpr = (WY * WX + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // heads % tiles
    group = tl.program_id(0) // (heads * tiles)
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    before = windows_before(at_bottom, at_right, batch, rows, columns)
    token_stride = 3 * heads * HEAD_DIM
    n = tile * BLOCK + tl.arange(0, BLOCK)
    if COSINE:
        scale = tl.load(multiplier + head)
    q_region, _ = regions(n, at_bottom, at_right, height, width, rows, columns, WY, WX, sy, sx, PADS_ARE_KEYS)
    bias_rows = bias + head.to(tl.int64) * bias_stride + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
    n1 = tl.arange(0, N1)
    bias1 = masked_bias(
        bias_rows,
        n1,
        q_region,
        at_bottom,
        at_right,
        height,
        width,
        rows,
        columns,
        sy,
        sx,
        WY,
        WX,
        PADS_ARE_KEYS,
    )
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        bias2 = masked_bias(
            bias_rows,
            n2,
            q_region,
            at_bottom,
            at_right,
            height,
            width,
            rows,
            columns,
            sy,
            sx,
            WY,
            WX,
            PADS_ARE_KEYS,
        )
    if N3 > 0:
        n3 = N1 + N2 + tl.arange(0, N3)
        bias3 = masked_bias(
            bias_rows,
            n3,
            q_region,
            at_bottom,
            at_right,
            height,
            width,
            rows,
            columns,
            sy,
            sx,
            WY,
            WX,
            PADS_ARE_KEYS,
        )
    if N4 > 0:
        n4 = N1 + N2 + N3 + tl.arange(0, N4)
        bias4 = masked_bias(
            bias_rows,
            n4,
            q_region,
            at_bottom,
            at_right,
            height,
            width,
            rows,
            columns,
            sy,
            sx,
            WY,
            WX,
            PADS_ARE_KEYS,
        )

    sample, row, column = place_of(first, down, across)
    for window in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        plane = sample.to(tl.int64) * (height * width)
        q_start = qkv + plane * token_stride + head * HEAD_DIM
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        q_scale = tl.zeros([BLOCK], tl.float32) + scale
        if COSINE:
            q_scale = scale * inverse_norm(q)
        acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        logits1, v1 = logits_of(
            n1,
            q,
            q_scale,
            bias1,
            q_start,
            token_stride,
            pad_kv,
            head,
            heads,
            top,
            left,
            height,
            width,
            sy,
            sx,
            WY,
            WX,
            HEAD_DIM,
            BLOCK_D,
            COSINE,
            PADS_ARE_KEYS,
        )
        acc, largest, total = absorb(acc, largest, total, logits1, v1)
        if N2 > 0:
            logits2, v2 = logits_of(
                n2,
                q,
                q_scale,
                bias2,
                q_start,
                token_stride,
                pad_kv,
                head,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
                PADS_ARE_KEYS,
            )
            acc, largest, total = absorb(acc, largest, total, logits2, v2)
        if N3 > 0:
            logits3, v3 = logits_of(
                n3,
                q,
                q_scale,
                bias3,
                q_start,
                token_stride,
                pad_kv,
                head,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
                PADS_ARE_KEYS,
            )
            acc, largest, total = absorb(acc, largest, total, logits3, v3)
        if N4 > 0:
            logits4, v4 = logits_of(
                n4,
                q,
                q_scale,
                bias4,
                q_start,
                token_stride,
                pad_kv,
                head,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
                PADS_ARE_KEYS,
            )
            acc, largest, total = absorb(acc, largest, total, logits4, v4)
        nothing = total == 0.0  # a pad query may see nothing
        total = tl.where(nothing, 1.0, total)
        store_rows(
            out + plane * (heads * HEAD_DIM) + head * HEAD_DIM,
            token, heads * HEAD_DIM, real, acc * (1.0 / total)[:, None], HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        if KEEP_LSE:
            line = ((before + window).to(tl.int64) * heads + head) * (WY * WX)
            found = tl.where(nothing, float("inf"), largest + tl.log2(total))
            tl.store(lse + line + n, found, mask=n < WY * WX)
        sample, row, column = next_place(sample, row, column, down, across)


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
def key_part(d_k, d_v, d_bias, k, v, k_scale, q, d_out, q_lse, q_delta, bias_place):
    """What one piece of the queries adds: dL^T Q, without the logits' factor, to d_k, P^T dO to d_v, dL^T to d_bias."""
    weights = tl.exp2(product(k, tl.trans(q)) * k_scale[:, None] + (tl.load(bias_place) - q_lse[None, :]))
    d_v += product(weights.to(d_out.dtype), d_out)
    d_logits = weights * (product(v, tl.trans(d_out)) - q_delta[None, :])
    return d_k + product(d_logits.to(q.dtype), q), d_v, d_bias + d_logits


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["pad_kv"])
def walking_key_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [kinds, h, key, query], SIDE x SIDE, fp32, times log2 e, -inf for what is hidden
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    pad_kv: tl.tensor,  # [2, h, D]
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dk and dv are written
    grad_bias: tl.tensor,  # [G, h, SIDE, SIDE] fp32, (query, key)
    grad_pads: tl.tensor,  # [G * tiles, 2, h, D] fp32
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
    group_size: tl.int32,
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
    BIAS_GRAD: tl.constexpr,
) -> None:
    """One tile of keys in the windows of one group, for one head. Grid: groups * tiles * h, head fastest, then tile. Logits
    and all that has their shape are transposed: [keys, queries]."""
    head = tl.program_id(0) % heads
    tiles: tl.constexpr = (WY * WX + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // heads % tiles
    group = tl.program_id(0) // (heads * tiles)
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    before = windows_before(at_bottom, at_right, batch, rows, columns)
    token_stride = 3 * heads * HEAD_DIM
    n = tile * BLOCK + tl.arange(0, BLOCK)
    if COSINE:
        scale = tl.load(multiplier + head)
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
    n1 = tl.arange(0, N1)
    d_bias1 = tl.zeros([BLOCK, N1], tl.float32)
    if N2 > 0:
        n2 = N1 + tl.arange(0, N2)
        d_bias2 = tl.zeros([BLOCK, N2], tl.float32)
    if N3 > 0:
        n3 = N1 + N2 + tl.arange(0, N3)
        d_bias3 = tl.zeros([BLOCK, N3], tl.float32)
    if N4 > 0:
        n4 = N1 + N2 + N3 + tl.arange(0, N4)
        d_bias4 = tl.zeros([BLOCK, N4], tl.float32)
    pad_k, pad_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    sample, row, column = place_of(first, down, across)
    for window in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        plane = sample.to(tl.int64) * (height * width)
        q_start = qkv + plane * token_stride + head * HEAD_DIM
        out_start = grad_out + plane * (heads * HEAD_DIM) + head * HEAD_DIM
        line = ((before + window).to(tl.int64) * heads + head) * (WY * WX)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        v = load_rows(q_start + 2 * heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        if PADS_ARE_KEYS:
            k = with_pads(k, pad_kv + head * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
            v = with_pads(v, pad_kv + (heads + head) * HEAD_DIM, n, WY * WX, real, HEAD_DIM, BLOCK_D)
        k_scale = tl.zeros([BLOCK], tl.float32) + scale
        if COSINE:
            k_norm = inverse_norm(k)
            k_scale = scale * k_norm
        d_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        q1, d_out1, lse1, delta1 = queries_of(
            n1,
            q_start,
            token_stride,
            out_start,
            lse + line,
            delta + line,
            heads,
            top,
            left,
            height,
            width,
            sy,
            sx,
            WY,
            WX,
            HEAD_DIM,
            BLOCK_D,
            COSINE,
        )
        d_k, d_v, d_bias1 = key_part(
            d_k, d_v, d_bias1, k, v, k_scale, q1, d_out1, lse1, delta1, bias_rows + n1[None, :]
        )
        if N2 > 0:
            q2, d_out2, lse2, delta2 = queries_of(
                n2,
                q_start,
                token_stride,
                out_start,
                lse + line,
                delta + line,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
            )
            d_k, d_v, d_bias2 = key_part(
                d_k, d_v, d_bias2, k, v, k_scale, q2, d_out2, lse2, delta2, bias_rows + n2[None, :]
            )
        if N3 > 0:
            q3, d_out3, lse3, delta3 = queries_of(
                n3,
                q_start,
                token_stride,
                out_start,
                lse + line,
                delta + line,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
            )
            d_k, d_v, d_bias3 = key_part(
                d_k, d_v, d_bias3, k, v, k_scale, q3, d_out3, lse3, delta3, bias_rows + n3[None, :]
            )
        if N4 > 0:
            q4, d_out4, lse4, delta4 = queries_of(
                n4,
                q_start,
                token_stride,
                out_start,
                lse + line,
                delta + line,
                heads,
                top,
                left,
                height,
                width,
                sy,
                sx,
                WY,
                WX,
                HEAD_DIM,
                BLOCK_D,
                COSINE,
            )
            d_k, d_v, d_bias4 = key_part(
                d_k, d_v, d_bias4, k, v, k_scale, q4, d_out4, lse4, delta4, bias_rows + n4[None, :]
            )
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
        sample, row, column = next_place(sample, row, column, down, across)

    if BIAS_GRAD:
        d_place = grad_bias + (group * heads + head).to(tl.int64) * (SIDE * SIDE) + n[:, None]
        inside = (n < SIDE)[:, None]
        tl.store(d_place + n1[None, :] * SIDE, d_bias1, mask=inside)
        if N2 > 0:
            tl.store(d_place + n2[None, :] * SIDE, d_bias2, mask=inside)
        if N3 > 0:
            tl.store(d_place + n3[None, :] * SIDE, d_bias3, mask=inside)
        if N4 > 0:
            tl.store(d_place + n4[None, :] * SIDE, d_bias4, mask=inside)
    if PADS_ARE_KEYS:
        d = tl.arange(0, BLOCK_D)
        pad_start = grad_pads + (tl.program_id(0) // heads * 2 * heads + head).to(tl.int64) * HEAD_DIM
        tl.store(pad_start + d, pad_k, mask=d < HEAD_DIM)
        tl.store(pad_start + heads * HEAD_DIM + d, pad_v, mask=d < HEAD_DIM)


def forward(
    call: Call, qkv: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor, lse: Tensor, out: Tensor
) -> None:
    """Writes out, and lse unless it is empty."""
    config = walking_config("forward", call.form)
    assert config is not None
    tiles = triton.cdiv(call.slots, config.queries)
    size = call.group_size(config, tiles)
    walking_forward_kernel[(call.groups(size) * tiles * call.heads,)](
        qkv, bias, multiplier, pad_kv, out, lse, *call.sizes, bias_strides(bias)[1], call.scale, size,
        KEEP_LSE=lse.numel() > 0, **constants(call.form, config), **config.options,
    )  # fmt: skip


def key_programs(call: Call) -> tuple[int, int, int]:
    """Of the backward: windows to a group, groups, and tiles of keys."""
    config = walking_config("keys", call.form)
    assert config is not None
    tiles = triton.cdiv(call.slots, config.queries)
    size = call.group_size(config, tiles)
    return size, call.groups(size), tiles


def key_backward(
    call: Call, grad_out: Tensor, qkv: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor, lse: Tensor,
    delta: Tensor, grad_qkv: Tensor, grad_bias: Tensor, grad_pads: Tensor, *, bias_grad: bool,
) -> None:  # fmt: skip
    """bias is [kinds, h, key, query]. Writes dk and dv into grad_qkv, grad_bias [G, h, SIDE, SIDE] if it is wanted, and grad_pads [G * tiles, 2, h, D]."""
    config = walking_config("keys", call.form)
    assert config is not None
    size, groups, tiles = key_programs(call)
    walking_key_kernel[(groups * tiles * call.heads,)](
        grad_out, qkv, bias, multiplier, pad_kv, lse, delta, grad_qkv, grad_bias, grad_pads, *call.sizes,
        *bias_strides(bias), call.scale, size,
        BIAS_GRAD=bias_grad, **constants(call.form, config), **config.options,
    )  # fmt: skip


def constants(form: Form, config: Config) -> dict[str, Any]:
    """Those that both kernels take."""
    return {
        **shared_constants(form), **pieces(form.slots), "SIDE": form.side, "BLOCK": config.queries,
        "PADS_ARE_KEYS": form.pads_are_keys,
    }  # fmt: skip
