"""Latent attention, forward, in Triton: kernels beside their launcher.

    latent_forward_kernel   a tile of queries of one head over one part of a sample's keys, with the online softmax of
                            FlashAttention (arXiv:2205.14135); all of it where the keys are not split
    combine_kernel          the parts of each query together, in the order of the parts: deterministic

launch.py has the legend and the choice of parts. Importing this file imports Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.latent_attention.launch import Form, blocks_per_sm, configure, splits
from kernels.latent_attention.tiles import SIZES, kept, part_of
from kernels.launch import LOG2_E, Config, processor
from kernels.triton_parts import LN_2, load_rows, product, store_rows

COMBINE = Config(queries=16, keys=0, num_warps=4, num_stages=1)  # rows of the result to a program


class Call(NamedTuple):
    """One call, as the launchers take it."""

    q: Tensor  # [B, M, h, dqk], contiguous
    k: Tensor  # [rows, h_kv, dqk], a row's heads contiguous
    v: Tensor  # [rows, h_kv, dv], likewise
    starts: Tensor  # int64 [B]: each sample's first row
    lengths: Tensor  # int64 [B]: how many rows it has
    longest: int  # no sample has more: N, or all rows where they are packed
    dense: bool  # every row is a key of some sample
    mask: Tensor | None  # uint8 [B, N], 0 = hidden
    scale: float
    dropout_p: float
    seed: Tensor | None  # int64 []

    @property
    def form(self) -> Form:
        """What the choice of configurations depends on."""
        arch, half = processor(self.q.device)[0], self.q.dtype.itemsize == 2
        masked, dropout = self.mask is not None, self.seed is not None
        return Form(self.q.shape[3], self.v.shape[2], half, masked, dropout, arch)

    @property
    def average(self) -> int:
        """Keys of a sample, about."""
        return len(self.k) // max(len(self.q), 1)

    def parts(self, config: Config, programs: int, things: int, block: int) -> int:
        """`launch.splits` of so many keys or queries."""
        return splits(programs, -(-things // block), blocks_per_sm(config) * processor(self.q.device)[1])


@triton.jit(do_not_specialize=SIZES)
def latent_forward_kernel(
    q: tl.tensor,  # [B, M, h, DQK]
    k: tl.tensor,  # [rows, h_kv, DQK]
    v: tl.tensor,  # [rows, h_kv, DV]
    starts: tl.tensor,  # int64 [B]
    lengths: tl.tensor,  # int64 [B]
    mask: tl.tensor,  # uint8 [B, padded]
    seed: tl.tensor,  # int64 []
    out: tl.tensor,  # [parts, B, M, h, DV], fp32 where there are several parts
    lse: tl.tensor,  # [parts, B, h, M] fp32, natural log
    k_stride: tl.int32,
    v_stride: tl.int32,
    queries: tl.int32,
    heads: tl.int32,
    group: tl.int32,  # g
    parts: tl.int32,
    padded: tl.int32,  # N of the mask
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
    """Grid: B * parts * h * tiles, tile fastest, then head: programs that run together share keys."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    part = tl.program_id(0) // (tiles * heads) % parts
    sample = tl.program_id(0) // (tiles * heads * parts)
    samples = tl.num_programs(0) // (tiles * heads * parts)
    start, length = tl.load(starts + sample), tl.load(lengths + sample).to(tl.int32)
    first, last = part_of(length, part, parts, BLOCK_N)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = load_rows(
        q + (sample.to(tl.int64) * queries * heads + head) * DQK, m, heads * DQK, m < queries, DQK, BLOCK_DQK
    )
    if scale < 0:  # then the largest logit is that of the smallest product
        q_tile = -q_tile
    scale = tl.maximum(tl.abs(scale), 1e-30)  # 0 times -inf would be no number
    kv_head = head // group
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k_start, v_start, mask_start = k + kv_head * DQK, v + kv_head * DV, mask + sample.to(tl.int64) * padded
    whole = last
    if APART:
        whole = first + tl.maximum(last - first, 0) // BLOCK_N * BLOCK_N
    for begin in range(first, whole, BLOCK_N):
        acc, largest, total = attend(
            acc, largest, total, q_tile, k_start, v_start, k_stride, v_stride, mask_start, seed, scale, dropout_p,
            sample, head, tile * BLOCK_M, start, begin, last, APART,
            BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, MASKED, DROPOUT,
        )  # fmt: skip
    if APART:
        if whole < last:
            acc, largest, total = attend(
                acc, largest, total, q_tile, k_start, v_start, k_stride, v_stride, mask_start, seed, scale, dropout_p,
                sample, head, tile * BLOCK_M, start, whole, last, False,
                BLOCK_M, BLOCK_N, DQK, DV, BLOCK_DQK, BLOCK_DV, MASKED, DROPOUT,
            )  # fmt: skip

    if DROPOUT:
        acc = acc / (1.0 - dropout_p)
    safe = tl.where(total == 0.0, 1.0, total)
    place = part.to(tl.int64) * samples + sample
    out_start = out + (place * queries * heads + head) * DV
    store_rows(out_start, m, heads * DV, m < queries, acc * (1.0 / safe)[:, None], DV, BLOCK_DV)
    # A row that sees nothing: largest is -inf, and so is its lse.
    tl.store(lse + (place * heads + head) * queries + m, (largest + tl.log2(safe)) * LN_2, mask=m < queries)


@triton.jit
def attend(
    acc, largest, total, q_tile, k_start, v_start, k_stride, v_stride, mask_start, seed, scale, dropout_p,
    sample, head, first_query, start, begin, last, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DQK: tl.constexpr, DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys from `begin` on, WHOLE: as many as there are in a step. `largest` is of
    logits times log2 e."""
    n = tl.arange(0, BLOCK_N)
    real = begin + n < last
    row = start + begin
    k_tile = load_rows(k_start + row * k_stride, n, k_stride, real, DQK, BLOCK_DQK, WHOLE)
    v_tile = load_rows(v_start + row * v_stride, n, v_stride, real, DV, BLOCK_DV, WHOLE)
    products = product(q_tile, tl.trans(k_tile))
    if MASKED:
        real = real & (tl.load(mask_start + begin + n, mask=real, other=0) != 0)
    if MASKED or not WHOLE:
        products = tl.where(real[None, :], products, float("-inf"))
    new = tl.maximum(largest, tl.max(products, 1) * scale)
    shown = tl.where(new == float("-inf"), 0.0, new)  # where nothing was visible yet, not -inf - -inf
    weights = tl.exp2(products * scale - shown[:, None])
    decay = tl.exp2(largest - shown)
    total = total * decay + tl.sum(weights, 1)  # of all keys: dropout does not change the normaliser
    if DROPOUT:
        keep = kept(tl.load(seed), dropout_p, sample, head, first_query, begin, BLOCK_M, BLOCK_N)
        weights = tl.where(keep, weights, 0.0)
    acc = acc * decay[:, None] + product(weights.to(v_tile.dtype), v_tile)
    return acc, new, total


@triton.jit(do_not_specialize=[*SIZES, "rows"])
def combine_kernel(
    outs: tl.tensor,  # [parts, B, M, h, DV] fp32
    lses: tl.tensor,  # [parts, B, h, M] fp32
    out: tl.tensor,  # [B, M, h, DV]
    lse: tl.tensor,  # [B, h, M] fp32
    rows: tl.int32,  # B * M * h
    queries: tl.int32,
    heads: tl.int32,
    parts: tl.int32,
    BLOCK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
) -> None:
    """BLOCK rows of the result: exp(lse of a part) is what the part weighs."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    head = row % heads
    query = row // heads % queries
    line = (row // (heads * queries) * heads + head) * queries + query
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    lse_part = lses
    for _ in range(parts):
        largest = tl.maximum(largest, tl.load(lse_part + line, mask=real, other=float("-inf")))
        lse_part += rows
    shown = tl.where(largest == float("-inf"), 0.0, largest)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    lse_part, out_part = lses, outs
    for _ in range(parts):
        weight = tl.exp(tl.load(lse_part + line, mask=real, other=float("-inf")) - shown)
        acc += weight[:, None] * load_rows(out_part, row, DV, real, DV, BLOCK_DV)
        total += weight
        lse_part += rows
        out_part += rows * DV
    safe = tl.where(total == 0.0, 1.0, total)
    store_rows(out, row, DV, real, acc / safe[:, None], DV, BLOCK_DV)
    tl.store(lse + line, largest + tl.log(safe), mask=real)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, M, h, dv] and lse [B, h, M] fp32, natural log, -inf for a row that sees nothing."""
    q, form = call.q, call.form
    batch, queries, heads, _ = q.shape
    config = configure("forward", form)
    tiles = triton.cdiv(queries, config.queries)
    parts = call.parts(config, batch * heads * tiles, call.average, config.keys)
    out = q.new_empty((batch, queries, heads, form.dv))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    several = parts > 1
    outs = q.new_empty((parts, *out.shape), dtype=torch.float32) if several else out
    lses = q.new_empty((parts, *lse.shape), dtype=torch.float32) if several else lse
    with torch.cuda.device_of(q):
        latent_forward_kernel[(batch * parts * heads * tiles,)](
            q, call.k, call.v, call.starts, call.lengths, *optional(call), outs, lses, *numbers(call, parts),
            call.scale * LOG2_E, call.dropout_p,
            BLOCK_M=config.queries, BLOCK_N=config.keys, APART=config.apart, **form.constants, **config.options,
        )  # fmt: skip
        if several:
            rows = batch * queries * heads
            combine_kernel[(triton.cdiv(rows, COMBINE.queries),)](
                outs, lses, out, lse, rows, queries, heads, parts,
                BLOCK=COMBINE.queries, DV=form.dv, BLOCK_DV=form.constants["BLOCK_DV"], **COMBINE.options,
            )  # fmt: skip
    return out, lse


def optional(call: Call) -> tuple[Tensor, Tensor]:
    """mask and seed; another tensor stands for what the kernels will not look at."""
    return (
        call.starts.view(torch.uint8) if call.mask is None else call.mask,
        call.starts if call.seed is None else call.seed,
    )


def numbers(call: Call, parts: int) -> tuple[int, ...]:
    """What the kernels take, in their order: strides, queries, heads, group, parts, padded."""
    _, queries, heads, _ = call.q.shape
    group = heads // call.k.shape[1]
    return call.k.stride(0), call.v.stride(0), queries, heads, group, parts, call.longest
