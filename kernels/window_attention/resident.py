"""Window attention in Triton for windows of 65 to 256 slots: two kernels, each beside its launcher.

    resident_forward_kernel     a program has one window and head; it loads keys and values once, then walks over tiles of
                                queries, each of which sees all of its keys at once: no online softmax
    resident_backward_kernel    likewise; dk and dv grow in registers, dq is complete with each tile of queries

A window's N keys come in up to three pieces whose sizes are powers of two, the least that add up to N: 196 is 128 + 64 + 16.
tiles.py has the legend, launch.py the choice. Importing this file imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_parts import LN_2, load_rows, product, store_rows
from kernels.window_attention.launch import Call, bias_strides, configure, pieces
from kernels.window_attention.tiles import (
    SIZES,
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
    BLOCK_Q: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,  # 0: there is no such piece
    K3: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
    PADS_ARE_KEYS: tl.constexpr,
    KEEP_LSE: tl.constexpr,  # for a backward
) -> None:
    """One window, for one head. Grid: windows * h, head fastest."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads  # of one window
    window, _, at_bottom, at_right, down, across = windows_of(group, 1, batch, rows, columns)
    sample, row, column = place_of(window, down, across)
    top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    out_start = out + plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (group.to(tl.int64) * heads + head) * (WY * WX)
    if COSINE:
        scale = tl.load(multiplier + head)

    n1 = tl.arange(0, K1)
    k1, v1 = keys_of(
        n1, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
    )  # fmt: skip
    if K2 > 0:
        n2 = K1 + tl.arange(0, K2)
        k2, v2 = keys_of(
            n2, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip
    if K3 > 0:
        n3 = K1 + K2 + tl.arange(0, K3)
        k3, v3 = keys_of(
            n3, q_start, token_stride, pad_kv, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, PADS_ARE_KEYS,
        )  # fmt: skip

    for begin in range(0, WY * WX, BLOCK_Q):
        n = begin + tl.arange(0, BLOCK_Q)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
        q_scale = tl.zeros([BLOCK_Q], tl.float32) + scale
        if COSINE:
            q_scale = scale * inverse_norm(q)

        logits1 = product(q, tl.trans(k1)) * q_scale[:, None] + tl.load(bias_rows + n1[None, :])
        largest = tl.max(logits1, 1)
        if K2 > 0:
            logits2 = product(q, tl.trans(k2)) * q_scale[:, None] + tl.load(bias_rows + n2[None, :])
            largest = tl.maximum(largest, tl.max(logits2, 1))
        if K3 > 0:
            logits3 = product(q, tl.trans(k3)) * q_scale[:, None] + tl.load(bias_rows + n3[None, :])
            largest = tl.maximum(largest, tl.max(logits3, 1))
        largest = tl.where(largest == float("-inf"), 0.0, largest)  # a pad query may see nothing

        weights1 = tl.exp2(logits1 - largest[:, None])
        total = tl.sum(weights1, 1)
        acc = product(weights1.to(v1.dtype), v1)
        if K2 > 0:
            weights2 = tl.exp2(logits2 - largest[:, None])
            total += tl.sum(weights2, 1)
            acc += product(weights2.to(v2.dtype), v2)
        if K3 > 0:
            weights3 = tl.exp2(logits3 - largest[:, None])
            total += tl.sum(weights3, 1)
            acc += product(weights3.to(v3.dtype), v3)
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        store_rows(out_start, token, heads * HEAD_DIM, real, acc * (1.0 / total)[:, None], HEAD_DIM, BLOCK_D)
        if KEEP_LSE:
            found = tl.where(nothing, float("inf"), largest + tl.log2(total))
            tl.store(lse + line + n, found, mask=n < WY * WX)


@triton.jit
def piece(
    d_q, d_k, d_v, k, v, n, q, q_unit, q_scale, d_out, q_lse, q_delta, bias_rows
):
    """The part of one piece of the keys in dq, and of one tile of queries in its dk and dv; all without the factor of
    the logits."""
    logits = product(q, tl.trans(k)) * q_scale[:, None] + tl.load(bias_rows + n[None, :])
    weights = tl.exp2(logits - q_lse[:, None])
    d_logits = (weights * (product(d_out, tl.trans(v)) - q_delta[:, None])).to(k.dtype)
    d_v += product(tl.trans(weights.to(v.dtype)), d_out)
    d_k += product(tl.trans(d_logits), q_unit)
    return d_q + product(d_logits, k), d_k, d_v


@triton.jit
def store_keys(
    d_k, d_v, n, q_start, d_start, token_stride, natural, heads, top, left, height, width, sy, sx,
    WY: tl.constexpr, WX: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    """Stores dk and dv of one piece. For COSINE the key is loaded again: what is there was of unit length."""
    token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
    if COSINE:
        k = load_rows(q_start + heads * HEAD_DIM, token, token_stride, real, HEAD_DIM, BLOCK_D)
        d_k, _ = grad_of_unit(d_k, k, inverse_norm(k), natural)
    else:
        d_k = d_k * natural
    store_rows(d_start + heads * HEAD_DIM, token, token_stride, real, d_k, HEAD_DIM, BLOCK_D)
    store_rows(d_start + 2 * heads * HEAD_DIM, token, token_stride, real, d_v, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def resident_backward_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    out: tl.tensor,  # [B, H, W, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp32, times log2 e, -inf for what is hidden and for keys from N on
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32, written: sum(dout * out)
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D]
    grad_multiplier: tl.tensor,  # [windows, h] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int32,
    bias_stride: tl.int32,
    scale: tl.float32,  # times log2 e
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """One window, for one head. Grid: windows * h, head fastest."""
    head = tl.program_id(0) % heads
    group = tl.program_id(0) // heads
    window, _, at_bottom, at_right, down, across = windows_of(group, 1, batch, rows, columns)
    sample, row, column = place_of(window, down, across)
    top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
    plane = sample.to(tl.int64) * (height * width)
    token_stride = 3 * heads * HEAD_DIM
    q_start = qkv + plane * token_stride + head * HEAD_DIM
    d_start = grad_qkv + plane * token_stride + head * HEAD_DIM
    bias_start = bias_of(bias, kind_stride, bias_stride, at_bottom, at_right, head)
    place = plane * (heads * HEAD_DIM) + head * HEAD_DIM
    line = (group.to(tl.int64) * heads + head) * (WY * WX)
    if COSINE:
        scale = tl.load(multiplier + head)
    natural = scale * LN_2  # without log2 e

    n1 = tl.arange(0, K1)
    k1, v1 = keys_of(
        n1, q_start, token_stride, q_start, head, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE, False,
    )  # fmt: skip
    d_k1, d_v1 = tl.zeros([K1, BLOCK_D], tl.float32), tl.zeros([K1, BLOCK_D], tl.float32)
    if K2 > 0:
        n2 = K1 + tl.arange(0, K2)
        k2, v2 = keys_of(
            n2, q_start, token_stride, q_start, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, False,
        )  # fmt: skip
        d_k2, d_v2 = tl.zeros([K2, BLOCK_D], tl.float32), tl.zeros([K2, BLOCK_D], tl.float32)
    if K3 > 0:
        n3 = K1 + K2 + tl.arange(0, K3)
        k3, v3 = keys_of(
            n3, q_start, token_stride, q_start, head, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE, False,
        )  # fmt: skip
        d_k3, d_v3 = tl.zeros([K3, BLOCK_D], tl.float32), tl.zeros([K3, BLOCK_D], tl.float32)

    multiplier_acc = tl.zeros([BLOCK_Q], tl.float32)
    for begin in range(0, WY * WX, BLOCK_Q):
        n = begin + tl.arange(0, BLOCK_Q)
        token, real = locate(n, top, left, height, width, WY, WX, sy, sx)
        q = load_rows(q_start, token, token_stride, real, HEAD_DIM, BLOCK_D)
        d_out = load_rows(grad_out + place, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        result = load_rows(out + place, token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        q_delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
        tl.store(delta + line + n, q_delta, mask=real)
        q_lse = tl.load(lse + line + n, mask=real, other=float("inf"))  # its weights are 0
        bias_rows = bias_start + (tl.minimum(n, SIDE - 1) * SIDE)[:, None]
        q_scale = tl.zeros([BLOCK_Q], tl.float32) + scale
        q_unit = q
        if COSINE:
            q_norm = inverse_norm(q)
            q_scale = scale * q_norm
            q_unit = (q * q_norm[:, None]).to(q.dtype)

        d_q = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        d_q, d_k1, d_v1 = piece(
            d_q, d_k1, d_v1, k1, v1, n1, q, q_unit, q_scale, d_out, q_lse, q_delta, bias_rows
        )
        if K2 > 0:
            d_q, d_k2, d_v2 = piece(
                d_q, d_k2, d_v2, k2, v2, n2, q, q_unit, q_scale, d_out, q_lse, q_delta, bias_rows
            )
        if K3 > 0:
            d_q, d_k3, d_v3 = piece(
                d_q, d_k3, d_v3, k3, v3, n3, q, q_unit, q_scale, d_out, q_lse, q_delta, bias_rows
            )
        if COSINE:
            d_q, along = grad_of_unit(d_q, q, q_norm, natural)
            multiplier_acc += along
        else:
            d_q = d_q * natural
        store_rows(d_start, token, token_stride, real, d_q, HEAD_DIM, BLOCK_D)

    store_keys(
        d_k1, d_v1, n1, q_start, d_start, token_stride, natural, heads, top, left, height, width, sy, sx,
        WY, WX, HEAD_DIM, BLOCK_D, COSINE,
    )  # fmt: skip
    if K2 > 0:
        store_keys(
            d_k2, d_v2, n2, q_start, d_start, token_stride, natural, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip
    if K3 > 0:
        store_keys(
            d_k3, d_v3, n3, q_start, d_start, token_stride, natural, heads, top, left, height, width, sy, sx,
            WY, WX, HEAD_DIM, BLOCK_D, COSINE,
        )  # fmt: skip
    if COSINE:
        tl.store(grad_multiplier + tl.program_id(0), tl.sum(multiplier_acc, 0))


def forward(
    call: Call, qkv: Tensor, bias: Tensor, multiplier: Tensor, pad_kv: Tensor, lse: Tensor, out: Tensor
) -> None:
    """Writes out, and lse unless it is empty."""
    config = configure("resident", call.form)
    resident_forward_kernel[(call.windows * call.heads,)](
        qkv, bias, multiplier, pad_kv, out, lse, *call.sizes, *bias_strides(bias), call.scale,
        SIDE=call.form.side, BLOCK_Q=config.queries, **pieces(call.slots), KEEP_LSE=lse.numel() > 0,
        PADS_ARE_KEYS=call.pads_are_keys, **call.constants, **config.options,
    )  # fmt: skip


def backward(
    call: Call, grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, delta: Tensor, bias: Tensor,
    multiplier: Tensor, grad_qkv: Tensor, grad_multiplier: Tensor,
) -> None:  # fmt: skip
    """Writes grad_qkv, delta, and for cosine attention grad_multiplier [windows, h]."""
    config = configure("resident_backward", call.form)
    resident_backward_kernel[(call.windows * call.heads,)](
        grad_out, qkv, out, bias, multiplier, lse, delta, grad_qkv, grad_multiplier, *call.sizes, *bias_strides(bias),
        call.scale, SIDE=call.form.side, BLOCK_Q=config.queries, **pieces(call.slots), **call.constants, **config.options,
    )  # fmt: skip
