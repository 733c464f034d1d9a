"""Window attention, backward, of windows of 65 to 256 slots, in Triton: two kernels that walk, beside their launcher.

    walking_query_grad_kernel   dq, delta = sum(dout * out), and the bias gradient, for a tile of queries, over all keys
    walking_key_grad_kernel     dk and dv for a tile of keys, over all queries

A program has one tile of one head and walks over windows of one kind. What is the same in all of them is made once: where
the slots lie, the bias with its mask, in shared memory as an operand of the tensor cores (`tiles.identity`), and the bias
gradient's tile, in registers. The other side of a window is in pieces (`launch.Form.pieces`), written out: nothing about them
is computed in the loop. For maps that the window divides; backward.py has the formulas and the kernels
for all others, tiles.py the legend.

Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_parts import LN_2, product, store_rows
from kernels.window_attention.half_bias import HalfBias
from kernels.window_attention.launch import Call, walking_config
from kernels.window_attention.partials import Gradients, empty_partials
from kernels.window_attention.tiles import (
    SIZES,
    bias_of,
    corner_of,
    grad_of_unit,
    identity,
    inverse_norm,
    next_place,
    number_of,
    offset_of,
    place_of,
    windows_of,
)


@triton.jit
def rows_at(start, offset, stride, n, HEAD_DIM: tl.constexpr, SLOTS: tl.constexpr, END: tl.constexpr):
    """[len(n), HEAD_DIM]: rows of HEAD_DIM numbers from start + offset * stride; 0 from slot SLOTS on, if END is beyond it."""
    at = start + (offset * stride)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    if END <= SLOTS:
        return tl.load(at)
    return tl.load(at, mask=(n < SLOTS)[:, None], other=0.0)


@triton.jit
def sums_at(near, delta, line, n, SLOTS: tl.constexpr):
    """lse, less its centre, and delta of the slots n: those beyond the window have no weight."""
    inside = n < SLOTS
    return (
        tl.load(near + line + n, mask=inside, other=float("inf")),
        tl.load(delta + line + n, mask=inside, other=0.0),
    )


@triton.jit
def weights_of(left, left_scale, right, scale, eye, bias, COSINE: tl.constexpr):
    """Logits less the query's centre, and right's rows, for COSINE of unit length. Without it bias is in units of `scale`."""
    if COSINE:
        unit = (right * inverse_norm(right)[:, None]).to(right.dtype)
        return tl.dot(eye, bias, product(left, tl.trans(unit)) * left_scale[:, None]), unit
    return tl.dot(left, tl.trans(right), tl.dot(eye, bias)) * scale, right


@triton.jit
def query_step(
    acc, bias_acc, q, q_scale, q_lse, q_delta, d_out, k, v, scale, eye, bias, COSINE: tl.constexpr, BIAS_GRAD: tl.constexpr
):  # fmt: skip
    """One piece of keys: dq and the piece's bias gradient so far."""
    logits, k = weights_of(q, q_scale, k, scale, eye, bias, COSINE)
    weights = tl.exp2(logits - q_lse[:, None])
    d_logits = weights * (product(d_out, tl.trans(v)) - q_delta[:, None])
    if BIAS_GRAD:
        bias_acc += d_logits
    return acc + product(d_logits.to(k.dtype), k), bias_acc


@triton.jit(do_not_specialize=SIZES)
def walking_query_grad_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    out: tl.tensor,  # [B, H, W, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp16: HalfBias.rows
    centre: tl.tensor,  # [kinds, h, SIDE] fp32: HalfBias.centre
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    lse: tl.tensor,  # [windows, h, N] fp32, base 2
    near: tl.tensor,  # [windows, h, N] fp32, written: lse less its query's centre
    delta: tl.tensor,  # [windows, h, N] fp32, written
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dq is written
    grad_bias: tl.tensor,  # [G, h, SIDE, SIDE] fp32
    grad_multiplier: tl.tensor,  # [G * tiles, h] fp32
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,
    scale: tl.float32,  # times log2 e
    group_size: tl.int32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COSINE: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
) -> None:
    """BLOCK queries of the windows of one group, for one head. Grid: groups * h * tiles, tile fastest, then head."""
    slots: tl.constexpr = WY * WX
    tiles: tl.constexpr = (slots + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    group = tl.program_id(0) // (tiles * heads)
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    qn = tile * BLOCK + tl.arange(0, BLOCK)
    q_at = offset_of(qn, at_bottom, at_right, height, width, sy, sx, WY, WX)
    n0 = tl.arange(0, N0)
    n1 = N0 + tl.arange(0, N1)
    at0 = offset_of(n0, at_bottom, at_right, height, width, sy, sx, WY, WX)
    at1 = offset_of(n1, at_bottom, at_right, height, width, sy, sx, WY, WX)
    lines = bias_of(bias, kind_stride, SIDE * SIDE, at_bottom, at_right, head) + (qn * SIDE)[:, None]
    bias0 = tl.load(lines + n0[None, :])
    bias1 = tl.load(lines + n1[None, :])
    acc0 = tl.zeros([BLOCK, N0], tl.float32)
    acc1 = tl.zeros([BLOCK, N1], tl.float32)
    if N2 > 0:
        n2 = N0 + N1 + tl.arange(0, N2)
        at2 = offset_of(n2, at_bottom, at_right, height, width, sy, sx, WY, WX)
        bias2 = tl.load(lines + n2[None, :])
        acc2 = tl.zeros([BLOCK, N2], tl.float32)
    if N3 > 0:
        n3 = N0 + N1 + N2 + tl.arange(0, N3)
        at3 = offset_of(n3, at_bottom, at_right, height, width, sy, sx, WY, WX)
        bias3 = tl.load(lines + n3[None, :])
        acc3 = tl.zeros([BLOCK, N3], tl.float32)
    eye = identity(BLOCK)
    kind = tl.where(kind_stride == 0, 0, 2 * at_bottom + at_right)
    q_centre = tl.load(centre + (kind * heads + head) * SIDE + qn)
    if COSINE:
        scale = tl.load(multiplier + head)
    multiplier_acc = tl.zeros([BLOCK], tl.float32)

    width_of_all = heads * HEAD_DIM
    token_stride = 3 * width_of_all
    sample, row, column = place_of(first, down, across)
    for _ in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        corner = sample.to(tl.int64) * (height * width) + (top + sy) * width + left + sx
        q_start = qkv + corner * token_stride + head * HEAD_DIM
        k_start = q_start + width_of_all
        v_start = k_start + width_of_all
        o_start = corner * width_of_all + head * HEAD_DIM
        q = rows_at(q_start, q_at, token_stride, qn, HEAD_DIM, slots, tiles * BLOCK)
        d_out = rows_at(grad_out + o_start, q_at, width_of_all, qn, HEAD_DIM, slots, tiles * BLOCK)
        result = rows_at(out + o_start, q_at, width_of_all, qn, HEAD_DIM, slots, tiles * BLOCK)
        q_delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
        number = number_of(sample, row, column, at_bottom, at_right, rows, columns)
        line = (number.to(tl.int64) * heads + head) * slots
        tl.store(delta + line + qn, q_delta, mask=qn < slots)
        q_lse = tl.load(lse + line + qn, mask=qn < slots, other=float("inf")) - q_centre
        tl.store(near + line + qn, q_lse, mask=qn < slots)
        q_scale = tl.zeros([BLOCK], tl.float32)
        if COSINE:
            q_norm = inverse_norm(q)
            q_scale = scale * q_norm

        acc = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        k = rows_at(k_start, at0, token_stride, n0, HEAD_DIM, slots, N0)
        v = rows_at(v_start, at0, token_stride, n0, HEAD_DIM, slots, N0)
        acc, acc0 = query_step(
            acc, acc0, q, q_scale, q_lse, q_delta, d_out, k, v, scale, eye, bias0, COSINE, BIAS_GRAD
        )
        k = rows_at(k_start, at1, token_stride, n1, HEAD_DIM, slots, N0 + N1)
        v = rows_at(v_start, at1, token_stride, n1, HEAD_DIM, slots, N0 + N1)
        acc, acc1 = query_step(
            acc, acc1, q, q_scale, q_lse, q_delta, d_out, k, v, scale, eye, bias1, COSINE, BIAS_GRAD
        )
        if N2 > 0:
            k = rows_at(k_start, at2, token_stride, n2, HEAD_DIM, slots, N0 + N1 + N2)
            v = rows_at(v_start, at2, token_stride, n2, HEAD_DIM, slots, N0 + N1 + N2)
            acc, acc2 = query_step(
                acc, acc2, q, q_scale, q_lse, q_delta, d_out, k, v, scale, eye, bias2, COSINE, BIAS_GRAD
            )
        if N3 > 0:
            k = rows_at(k_start, at3, token_stride, n3, HEAD_DIM, slots, N0 + N1 + N2 + N3)
            v = rows_at(v_start, at3, token_stride, n3, HEAD_DIM, slots, N0 + N1 + N2 + N3)
            acc, acc3 = query_step(
                acc, acc3, q, q_scale, q_lse, q_delta, d_out, k, v, scale, eye, bias3, COSINE, BIAS_GRAD
            )

        if COSINE:
            acc, along = grad_of_unit(acc, q, q_norm, scale * LN_2)
            multiplier_acc += along
        else:
            acc = acc * (scale * LN_2)
        d_start = grad_qkv + corner * token_stride + head * HEAD_DIM
        store_rows(d_start, q_at, token_stride, qn < slots, acc, HEAD_DIM, HEAD_DIM)
        sample, row, column = next_place(sample, row, column, down, across)

    if BIAS_GRAD:
        d_lines = grad_bias + (group * heads + head).to(tl.int64) * (SIDE * SIDE) + (qn * SIDE)[:, None]
        tl.store(d_lines + n0[None, :], acc0)
        tl.store(d_lines + n1[None, :], acc1)
        if N2 > 0:
            tl.store(d_lines + n2[None, :], acc2)
        if N3 > 0:
            tl.store(d_lines + n3[None, :], acc3)
    if COSINE:
        tl.store(grad_multiplier + (group * tiles + tile) * heads + head, tl.sum(multiplier_acc, 0))


@triton.jit
def key_step(d_k, d_v, k, k_scale, v, q, d_out, q_lse, q_delta, scale, eye, bias, COSINE: tl.constexpr):
    """One piece of queries. Logits and all that has their shape are transposed: [keys, queries]."""
    logits, q = weights_of(k, k_scale, q, scale, eye, bias, COSINE)
    weights = tl.exp2(logits - q_lse[None, :])
    d_v += product(weights.to(d_out.dtype), d_out)
    d_logits = weights * (product(v, tl.trans(d_out)) - q_delta[None, :])
    return d_k + product(d_logits.to(q.dtype), q), d_v


@triton.jit(do_not_specialize=SIZES)
def walking_key_grad_kernel(
    grad_out: tl.tensor,  # [B, H, W, h, D]
    qkv: tl.tensor,  # [B, H, W, 3, h, D]
    bias: tl.tensor,  # [kinds, h, SIDE, SIDE] fp16: HalfBias.columns
    multiplier: tl.tensor,  # [h] fp32, times log2 e
    near: tl.tensor,  # [windows, h, N] fp32, base 2
    delta: tl.tensor,  # [windows, h, N] fp32
    grad_qkv: tl.tensor,  # [B, H, W, 3, h, D], dk and dv are written
    batch: tl.int32,
    height: tl.int32,
    width: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    heads: tl.int32,
    kind_stride: tl.int64,
    scale: tl.float32,
    group_size: tl.int32,
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COSINE: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    N3: tl.constexpr,
) -> None:
    """BLOCK keys of the windows of one group, for one head. Grid: groups * h * tiles, tile fastest, then head."""
    slots: tl.constexpr = WY * WX
    tiles: tl.constexpr = (slots + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    group = tl.program_id(0) // (tiles * heads)
    first, last, at_bottom, at_right, down, across = windows_of(group, group_size, batch, rows, columns)
    kn = tile * BLOCK + tl.arange(0, BLOCK)
    k_at = offset_of(kn, at_bottom, at_right, height, width, sy, sx, WY, WX)
    n0 = tl.arange(0, N0)
    n1 = N0 + tl.arange(0, N1)
    at0 = offset_of(n0, at_bottom, at_right, height, width, sy, sx, WY, WX)
    at1 = offset_of(n1, at_bottom, at_right, height, width, sy, sx, WY, WX)
    lines = bias_of(bias, kind_stride, SIDE * SIDE, at_bottom, at_right, head) + (kn * SIDE)[:, None]
    bias0 = tl.load(lines + n0[None, :])
    bias1 = tl.load(lines + n1[None, :])
    if N2 > 0:
        n2 = N0 + N1 + tl.arange(0, N2)
        at2 = offset_of(n2, at_bottom, at_right, height, width, sy, sx, WY, WX)
        bias2 = tl.load(lines + n2[None, :])
    if N3 > 0:
        n3 = N0 + N1 + N2 + tl.arange(0, N3)
        at3 = offset_of(n3, at_bottom, at_right, height, width, sy, sx, WY, WX)
        bias3 = tl.load(lines + n3[None, :])
    eye = identity(BLOCK)
    if COSINE:
        scale = tl.load(multiplier + head)

    width_of_all = heads * HEAD_DIM
    token_stride = 3 * width_of_all
    sample, row, column = place_of(first, down, across)
    for _ in range(first, last):
        top, left = corner_of(row, column, at_bottom, at_right, rows, columns, WY, WX)
        corner = sample.to(tl.int64) * (height * width) + (top + sy) * width + left + sx
        q_start = qkv + corner * token_stride + head * HEAD_DIM
        o_start = grad_out + corner * width_of_all + head * HEAD_DIM
        number = number_of(sample, row, column, at_bottom, at_right, rows, columns)
        line = (number.to(tl.int64) * heads + head) * slots
        k = rows_at(q_start + width_of_all, k_at, token_stride, kn, HEAD_DIM, slots, tiles * BLOCK)
        v = rows_at(q_start + 2 * width_of_all, k_at, token_stride, kn, HEAD_DIM, slots, tiles * BLOCK)
        k_scale = tl.zeros([BLOCK], tl.float32)
        if COSINE:
            k_norm = inverse_norm(k)
            k_scale = scale * k_norm

        d_k = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        d_v = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        q = rows_at(q_start, at0, token_stride, n0, HEAD_DIM, slots, N0)
        d_out = rows_at(o_start, at0, width_of_all, n0, HEAD_DIM, slots, N0)
        q_lse, q_delta = sums_at(near, delta, line, n0, slots)
        d_k, d_v = key_step(d_k, d_v, k, k_scale, v, q, d_out, q_lse, q_delta, scale, eye, bias0, COSINE)
        q = rows_at(q_start, at1, token_stride, n1, HEAD_DIM, slots, N0 + N1)
        d_out = rows_at(o_start, at1, width_of_all, n1, HEAD_DIM, slots, N0 + N1)
        q_lse, q_delta = sums_at(near, delta, line, n1, slots)
        d_k, d_v = key_step(d_k, d_v, k, k_scale, v, q, d_out, q_lse, q_delta, scale, eye, bias1, COSINE)
        if N2 > 0:
            q = rows_at(q_start, at2, token_stride, n2, HEAD_DIM, slots, N0 + N1 + N2)
            d_out = rows_at(o_start, at2, width_of_all, n2, HEAD_DIM, slots, N0 + N1 + N2)
            q_lse, q_delta = sums_at(near, delta, line, n2, slots)
            d_k, d_v = key_step(d_k, d_v, k, k_scale, v, q, d_out, q_lse, q_delta, scale, eye, bias2, COSINE)
        if N3 > 0:
            q = rows_at(q_start, at3, token_stride, n3, HEAD_DIM, slots, N0 + N1 + N2 + N3)
            d_out = rows_at(o_start, at3, width_of_all, n3, HEAD_DIM, slots, N0 + N1 + N2 + N3)
            q_lse, q_delta = sums_at(near, delta, line, n3, slots)
            d_k, d_v = key_step(d_k, d_v, k, k_scale, v, q, d_out, q_lse, q_delta, scale, eye, bias3, COSINE)

        if COSINE:
            d_k, _ = grad_of_unit(d_k, k, k_norm, scale * LN_2)
        else:
            d_k = d_k * (scale * LN_2)
        d_start = grad_qkv + corner * token_stride + head * HEAD_DIM
        store_rows(d_start + width_of_all, k_at, token_stride, kn < slots, d_k, HEAD_DIM, HEAD_DIM)
        store_rows(d_start + 2 * width_of_all, k_at, token_stride, kn < slots, d_v, HEAD_DIM, HEAD_DIM)
        sample, row, column = next_place(sample, row, column, down, across)


def backward(
    call: Call,
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: HalfBias,
    multiplier: Tensor,
    *,
    bias_grad: bool,
) -> Gradients:
    """The gradients of `forward.forward`, whose results are out and lse; grad_out [B, H, W, h * D] is contiguous."""
    heads, grad_qkv = call.heads, torch.empty_like(qkv)
    near, delta = torch.empty_like(lse), torch.empty_like(lse)
    queries, keys = (walking_config(kernel, call.launched) for kernel in ("walking queries", "walking keys"))
    q_tiles, k_tiles = -(-call.slots // queries.queries), -(-call.slots // keys.keys)
    q_size, k_size = call.group_size(queries, q_tiles), call.group_size(keys, k_tiles)
    groups = call.groups(q_size)
    grads = empty_partials(call, qkv, bias_grad, groups, groups * q_tiles, 0)
    d_bias, d_multiplier, _ = (delta if part is None else part for part in grads)
    numbers = *call.sizes, 0 if len(bias.rows) == 1 else bias.rows.stride(0), call.scale
    about = {key: call.constants[key] for key in ("WY", "WX", "HEAD_DIM", "COSINE")} | {
        "SIDE": call.form.side
    }
    pieces = dict(zip(("N0", "N1", "N2", "N3"), call.form.pieces, strict=True))
    with torch.cuda.device_of(qkv):
        walking_query_grad_kernel[(groups * heads * q_tiles,)](
            grad_out, qkv, out, bias.rows, bias.centre, multiplier, lse, near, delta, grad_qkv, d_bias, d_multiplier,
            *numbers, q_size,
            BLOCK=queries.queries, BIAS_GRAD=bias_grad, **about, **pieces, **queries.options,
        )  # fmt: skip
        walking_key_grad_kernel[(call.groups(k_size) * heads * k_tiles,)](
            grad_out, qkv, bias.columns, multiplier, near, delta, grad_qkv, *numbers, k_size,
            BLOCK=keys.keys, **about, **pieces, **keys.options,
        )  # fmt: skip
    return Gradients(grad_qkv, *grads)
