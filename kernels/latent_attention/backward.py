"""Latent attention, backward, in Triton: kernels beside their launcher. Nothing is added atomically.

    query_grad_kernel   dq of a tile of queries, over one part of a sample's keys
    key_grad_kernel     dk and dv of a tile of keys, over one part of the queries of all heads that share them

With P = softmax(s Q K^T) and delta = sum(dout * out) - dlse: dV = P^T dO, dL = P * (dO V^T - delta), dQ = s dL K,
dK = s dL^T Q (FlashAttention-2, arXiv:2307.08691). Under dropout, P in dV and dO V^T are those of the kept weights. Partial
sums of parts have a place of their own, and torch adds them in their order: the same bits every time.

launch.py has the legend. Importing this file imports Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.latent_attention.forward import Call, numbers, optional
from kernels.latent_attention.launch import configure
from kernels.latent_attention.tiles import SIZES, kept, part_of
from kernels.launch import LOG2_E
from kernels.triton_parts import LN_2, load_rows, product, store_rows


@triton.jit(do_not_specialize=SIZES)
def query_grad_kernel(
    grad_out: tl.tensor,  # [B, M, h, DV]
    q: tl.tensor,  # [B, M, h, DQK]
    k: tl.tensor,  # [rows, h_kv, DQK]
    v: tl.tensor,  # [rows, h_kv, DV]
    starts: tl.tensor,  # int64 [B]
    lengths: tl.tensor,  # int64 [B]
    mask: tl.tensor,  # uint8 [B, padded]
    seed: tl.tensor,  # int64 []
    lse: tl.tensor,  # [B, h, M] fp32, base 2; +inf for a row that sees nothing, whose weights are then 0
    delta: tl.tensor,  # [B, h, M] fp32
    grad_q: tl.tensor,  # [parts, B, M, h, DQK], fp32 where there are several parts
    k_stride: tl.int32,
    v_stride: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    parts: tl.int32,
    padded: tl.int32,
    scale: tl.float32,  # times log2 e
    dropout_p: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    APART: tl.constexpr,  # a step that is not full has code of its own, and the others no mask
) -> None:
    """Grid: B * parts * h * tiles, tile fastest, then head."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    part = tl.program_id(0) // (tiles * heads) % parts
    sample = tl.program_id(0) // (tiles * heads * parts)
    samples = tl.num_programs(0) // (tiles * heads * parts)
    start, length = tl.load(starts + sample), tl.load(lengths + sample).to(tl.int32)
    first, last = part_of(length, part, parts, BLOCK_N)
    kv_head = head // group

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = m < queries
    place = sample.to(tl.int64) * queries * heads + head
    q_tile = load_rows(q + place * DQK, m, heads * DQK, there, DQK, BLOCK_DQK)
    d_out = load_rows(grad_out + place * DV, m, heads * DV, there, DV, BLOCK_DV)
    line = (sample.to(tl.int64) * heads + head) * queries
    q_lse = tl.load(lse + line + m, mask=there, other=float("inf"))
    q_delta = tl.load(delta + line + m, mask=there, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DQK], tl.float32)
    k_start, v_start, mask_start = k + kv_head * DQK, v + kv_head * DV, mask + sample.to(tl.int64) * padded
    whole = last
    if APART:
        whole = first + tl.maximum(last - first, 0) // BLOCK_N * BLOCK_N
    for begin in range(first, whole, BLOCK_N):
        acc = query_step(
            acc, q_tile, d_out, q_lse, q_delta, k_start, v_start, k_stride, v_stride, mask_start, seed, scale,
            dropout_p, sample, head, tile * BLOCK_M, start, begin, last, APART,
            BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, MASKED, DROPOUT,
        )  # fmt: skip
    if APART:
        if whole < last:
            acc = query_step(
                acc, q_tile, d_out, q_lse, q_delta, k_start, v_start, k_stride, v_stride, mask_start, seed, scale,
                dropout_p, sample, head, tile * BLOCK_M, start, whole, last, False,
                BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, MASKED, DROPOUT,
            )  # fmt: skip
    place = ((part.to(tl.int64) * samples + sample) * queries * heads + head) * DQK
    store_rows(grad_q + place, m, heads * DQK, there, acc * (scale * LN_2), DQK, BLOCK_DQK)


@triton.jit
def query_step(
    acc, q_tile, d_out, q_lse, q_delta, k_start, v_start, k_stride, v_stride, mask_start, seed, scale,
    dropout_p, sample, head, first_query, start, begin, last, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """acc + dL K of the keys from `begin` on, WHOLE: as many as there are in a step."""
    n = tl.arange(0, BLOCK_N)
    real = begin + n < last
    row = start + begin
    k_tile = load_rows(k_start + row * k_stride, n, k_stride, real, DQK, BLOCK_DQK, WHOLE)
    v_tile = load_rows(v_start + row * v_stride, n, v_stride, real, DV, BLOCK_DV, WHOLE)
    weights = tl.exp2(product(q_tile, tl.trans(k_tile)) * scale - q_lse[:, None])
    if MASKED:
        real = real & (tl.load(mask_start + begin + n, mask=real, other=0) != 0)
    if MASKED or not WHOLE:
        weights = tl.where(real[None, :], weights, 0.0)
    d_weights = product(d_out, tl.trans(v_tile))
    if DROPOUT:
        keep = kept(tl.load(seed), dropout_p, sample, head, first_query, begin, BLOCK_M, BLOCK_N)
        d_weights = tl.where(keep, d_weights / (1.0 - dropout_p), 0.0)
    d_logits = weights * (d_weights - q_delta[:, None])
    return acc + product(d_logits.to(k_tile.dtype), k_tile)


@triton.jit(do_not_specialize=[*SIZES, "samples", "rows"])
def key_grad_kernel(
    grad_out: tl.tensor,  # [B, M, h, DV]
    q: tl.tensor,  # [B, M, h, DQK]
    k: tl.tensor,  # [rows, h_kv, DQK]
    v: tl.tensor,  # [rows, h_kv, DV]
    starts: tl.tensor,  # int64 [B]
    lengths: tl.tensor,  # int64 [B]
    mask: tl.tensor,  # uint8 [B, padded]
    seed: tl.tensor,  # int64 []
    lse: tl.tensor,  # [B, h, M] fp32, base 2; +inf for a row that sees nothing
    delta: tl.tensor,  # [B, h, M] fp32
    owners: tl.tensor,  # int32 [tiles]: the sample of each tile of keys, B for a tile that is not used
    places: tl.tensor,  # int32 [tiles]: which of its sample's tiles it is
    grad_k: tl.tensor,  # [parts, rows, h_kv, DQK], fp32 where there are several parts
    grad_v: tl.tensor,  # [parts, rows, h_kv, DV], likewise
    k_stride: tl.int32,
    v_stride: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    group: tl.int32,
    parts: tl.int32,
    padded: tl.int32,
    samples: tl.int32,
    rows: tl.int32,
    scale: tl.float32,  # times log2 e
    dropout_p: tl.float32,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    APART: tl.constexpr,  # a step that is not full has code of its own, and the others no mask
) -> None:
    """Grid: tiles * parts * h_kv, head fastest. Logits and all that has their shape are transposed: [keys, queries]."""
    kv_heads = heads // group
    kv_head = tl.program_id(0) % kv_heads
    part = tl.program_id(0) // kv_heads % parts
    tile = tl.program_id(0) // (kv_heads * parts)
    sample = tl.load(owners + tile)
    if sample >= samples:
        return
    begin = tl.load(places + tile) * BLOCK_N
    row, length = tl.load(starts + sample) + begin, tl.load(lengths + sample).to(tl.int32)
    n = tl.arange(0, BLOCK_N)
    real = begin + n < length
    k_tile = load_rows(k + row * k_stride + kv_head * DQK, n, k_stride, real, DQK, BLOCK_DQK)
    v_tile = load_rows(v + row * v_stride + kv_head * DV, n, v_stride, real, DV, BLOCK_DV)
    visible = real
    if MASKED:
        seen = tl.load(mask + sample.to(tl.int64) * padded + begin + n, mask=real, other=0)
        visible = real & (seen != 0)

    first, last = part_of(queries, part, parts, BLOCK_M)
    whole = last
    if APART:
        whole = first + tl.maximum(last - first, 0) // BLOCK_M * BLOCK_M
    d_k = tl.zeros([BLOCK_N, BLOCK_DQK], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):  # heads that share these keys, one after the other
        head = kv_head * group + member
        place = sample.to(tl.int64) * queries * heads + head
        line = (sample.to(tl.int64) * heads + head) * queries
        for begin_m in range(first, whole, BLOCK_M):
            d_k, d_v = key_step(
                d_k, d_v, k_tile, v_tile, q + place * DQK, grad_out + place * DV, lse + line, delta + line, heads,
                seed, scale, dropout_p, sample, head, begin_m, begin, last, APART,
                BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, DROPOUT,
            )  # fmt: skip
        if APART:
            if whole < last:
                d_k, d_v = key_step(
                    d_k, d_v, k_tile, v_tile, q + place * DQK, grad_out + place * DV, lse + line, delta + line, heads,
                    seed, scale, dropout_p, sample, head, whole, begin, last, False,
                    BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, DROPOUT,
                )  # fmt: skip
    if MASKED:  # whatever a hidden key got
        d_k, d_v = tl.where(visible[:, None], d_k, 0.0), tl.where(visible[:, None], d_v, 0.0)
    row += part.to(tl.int64) * rows
    k_start = grad_k + (row * kv_heads + kv_head) * DQK
    v_start = grad_v + (row * kv_heads + kv_head) * DV
    store_rows(k_start, n, kv_heads * DQK, real, d_k * (scale * LN_2), DQK, BLOCK_DQK)
    store_rows(v_start, n, kv_heads * DV, real, d_v, DV, BLOCK_DV)


@triton.jit
def key_step(
    d_k, d_v, k_tile, v_tile, q_start, d_out_start, lse_start, delta_start, heads,
    seed, scale, dropout_p, sample, head, begin_m, begin, last, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """d_k + dL^T Q and d_v + P^T dO of the queries from begin_m on, WHOLE: as many as there are in a step."""
    m = begin_m + tl.arange(0, BLOCK_M)
    there = m < last
    q_tile = load_rows(q_start, m, heads * DQK, there, DQK, BLOCK_DQK, WHOLE)
    d_out = load_rows(d_out_start, m, heads * DV, there, DV, BLOCK_DV, WHOLE)
    q_lse = tl.load(lse_start + m, mask=there, other=float("inf"))
    q_delta = tl.load(delta_start + m, mask=there, other=0.0)
    weights = tl.exp2(product(k_tile, tl.trans(q_tile)) * scale - q_lse[None, :])
    d_weights = product(v_tile, tl.trans(d_out))
    used = weights
    if DROPOUT:
        keep = tl.trans(kept(tl.load(seed), dropout_p, sample, head, begin_m, begin, BLOCK_M, BLOCK_N))
        used = tl.where(keep, weights / (1.0 - dropout_p), 0.0)
        d_weights = tl.where(keep, d_weights / (1.0 - dropout_p), 0.0)
    d_v += product(used.to(d_out.dtype), d_out)
    d_logits = weights * (d_weights - q_delta[None, :])
    return d_k + product(d_logits.to(q_tile.dtype), q_tile), d_v


def backward(
    call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; grad_out is contiguous, and the rows of k and v that belong to no sample get 0."""
    q, k, v, form = call.q, call.k, call.v, call.form
    batch, queries, heads, _ = q.shape
    rows, kv_heads, _ = k.shape
    delta = (grad_out.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # [B, h, M]
    if grad_lse is not None:
        delta -= grad_lse
    base_2 = torch.where(lse == float("-inf"), float("inf"), lse * LOG2_E)

    config = configure("queries", form)
    tiles = triton.cdiv(queries, config.queries)
    parts = call.parts(config, batch * heads * tiles, call.average, config.keys)
    grad_q = q.new_empty((parts, *q.shape), dtype=torch.float32 if parts > 1 else q.dtype)
    operands = (grad_out, q, k, v, call.starts, call.lengths, *optional(call), base_2, delta)
    with torch.cuda.device_of(q):
        query_grad_kernel[(batch * parts * heads * tiles,)](
            *operands, grad_q, *numbers(call, parts), call.scale * LOG2_E, call.dropout_p,
            BLOCK_M=config.queries, BLOCK_N=config.keys, APART=config.apart, **form.constants, **config.options,
        )  # fmt: skip

        config = configure("keys", form)
        owners, places = tiles_of(call, config.keys)
        parts = call.parts(config, len(owners) * kv_heads, queries * heads // kv_heads, config.queries)
        kind = torch.float32 if parts > 1 else k.dtype
        room = torch.empty if call.dense else torch.zeros  # the rows that belong to no sample are no tile's
        grad_k, grad_v = (room((parts, *t.shape), dtype=kind, device=t.device) for t in (k, v))
        key_grad_kernel[(len(owners) * parts * kv_heads,)](
            *operands, owners, places, grad_k, grad_v, *numbers(call, parts), batch, rows,
            call.scale * LOG2_E, call.dropout_p,
            BLOCK_M=config.queries, BLOCK_N=config.keys, APART=config.apart, **form.constants, **config.options,
        )  # fmt: skip
    d_q, d_k, d_v = (
        part[0] if len(part) == 1 else part.sum(0).to(q.dtype) for part in (grad_q, grad_k, grad_v)
    )
    return d_q, d_k, d_v


def tiles_of(call: Call, block: int) -> tuple[Tensor, Tensor]:
    """int32 [tiles] each: the sample of every tile of keys (B: none), and which of its tiles it is. Lengths stay on the
    device, so there are as many tiles as there can be at most."""
    batch, rows = len(call.q), len(call.k)
    most = min(batch * triton.cdiv(call.longest, block), rows // block + batch)
    end = (-(-call.lengths // block)).cumsum(0)  # [B]: tiles up to and with each sample
    tile = torch.arange(most, device=end.device)
    owner = torch.searchsorted(end, tile, right=True)
    begin = torch.cat([end.new_zeros(1), end])[owner.clamp(max=batch)]
    return owner.to(torch.int32), (tile - begin).to(torch.int32)
