"""The bias as the kernels that walk take it (backward_walking.py), in Triton: the kernel and its launcher.

fp16, an operand of the tensor cores, finite, with the mask of each kind of window in it, once by queries and once by keys.
fp16 is finest near 0, and a softmax asks for its largest logits most exactly: so of each query the largest bias that it sees,
its centre, is taken off, and the kernels take it off the log-sum-exp too. The rounding is then at most 2^-12 of the distance
from there.

Importing this file imports Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import LAUNCH_OPTIONS, AotCase, Expects
from kernels.window_attention.launch import Call, Form
from kernels.window_attention.tiles import LARGEST_HALF, LOG2_E, regions

TILE = 64
WARPS, STAGES = 4, 1
KINDS = 4


class HalfBias(NamedTuple):
    """kinds: 4, or 1 where all windows are alike."""

    rows: Tensor  # [kinds, h, SIDE, SIDE] fp16, query by key
    columns: Tensor  # [kinds, h, SIDE, SIDE] fp16, key by query
    centre: Tensor  # [kinds, h, SIDE] fp32, of each query, times log2 e


@triton.jit(do_not_specialize=["heads", "sy", "sx"], do_not_specialize_on_alignment=["bias"])
def half_bias_kernel(
    bias: tl.tensor,  # TABLE: [R, h]; else [h, N, N]; fp32. Not looked at without HAS_BIAS
    by_query: tl.tensor,  # [kinds, h, SIDE, SIDE] fp16
    by_key: tl.tensor,  # the same, transposed
    centre: tl.tensor,  # [kinds, h, SIDE] fp32
    heads: tl.int32,
    sy: tl.int32,
    sx: tl.int32,
    multiplier: tl.float32,  # 1, or 1 / scale
    WY: tl.constexpr,
    WX: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TABLE: tl.constexpr,
) -> None:
    """The rows of TILE queries of one head and kind. Grid: (kinds * h, SIDE / TILE)."""
    head, kind = tl.program_id(0) % heads, tl.program_id(0) // heads
    q = tl.program_id(1) * TILE + tl.arange(0, TILE)
    largest = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, SIDE, TILE):
        k = start + tl.arange(0, TILE)
        value = visible_bias(bias, head, heads, kind, q, k, sy, sx, WY, WX, HAS_BIAS, TABLE)
        largest = tl.maximum(largest, tl.max(value, 1))
    largest = tl.where(largest == float("-inf"), 0.0, largest)  # a query that sees nothing
    tl.store(centre + tl.program_id(0) * SIDE + q, largest)
    place = tl.program_id(0).to(tl.int64) * (SIDE * SIDE)
    for start in range(0, SIDE, TILE):
        k = start + tl.arange(0, TILE)
        value = visible_bias(bias, head, heads, kind, q, k, sy, sx, WY, WX, HAS_BIAS, TABLE)
        value = tl.maximum((value - largest[:, None]) * multiplier, -LARGEST_HALF).to(tl.float16)
        tl.store(by_query + place + q[:, None] * SIDE + k[None, :], value)
        tl.store(by_key + place + k[:, None] * SIDE + q[None, :], tl.trans(value))


@triton.jit
def visible_bias(
    bias, head, heads, kind, q, k, sy, sx, WY: tl.constexpr, WX: tl.constexpr, HAS_BIAS: tl.constexpr, TABLE: tl.constexpr
):  # fmt: skip
    """[q, k] fp32, times log2 e: -inf for what a window of the kind hides, and for keys from N on."""
    slots: tl.constexpr = WY * WX
    value = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    if HAS_BIAS:
        if TABLE:
            q_place = q // WX * (2 * WX - 1) + q % WX
            k_place = k // WX * (2 * WX - 1) + k % WX
            row = q_place[:, None] - k_place[None, :] + ((WY - 1) * (2 * WX - 1) + WX - 1)
            at = bias + row * heads + head
        else:
            at = bias + head.to(tl.int64) * (slots * slots) + q[:, None] * slots + k[None, :]
        value = tl.load(at, mask=(q < slots)[:, None] & (k < slots)[None, :], other=0.0) * LOG2_E
    q_region, _ = regions(q, kind // 2, kind % 2, 0, 0, 0, 0, WY, WX, sy, sx, True)
    k_region, _ = regions(k, kind // 2, kind % 2, 0, 0, 0, 0, WY, WX, sy, sx, True)
    hidden = (q_region[:, None] != k_region[None, :]) | (k >= slots)[None, :]
    return tl.where(hidden, float("-inf"), value)


def half_bias(call: Call, bias: Tensor | None, like: Tensor) -> HalfBias:
    """Of a table [R, h], of [h, N, N], or of none; on the device of `like`. In units of the call's scale, but for cosine
    attention, where each query has its own."""
    side, kinds = call.form.side, KINDS if call.masked else 1
    by_query = like.new_empty((kinds, call.heads, side, side), dtype=torch.float16)
    by_key, centre = (
        torch.empty_like(by_query),
        like.new_empty((kinds, call.heads, side), dtype=torch.float32),
    )
    wide = centre if bias is None else bias.detach().float().contiguous()
    wy, wx = call.grid.window
    about = {
        "WY": wy,
        "WX": wx,
        "SIDE": side,
        "TILE": TILE,
        "HAS_BIAS": bias is not None,
        "TABLE": wide.dim() == 2,
    }
    with torch.cuda.device_of(like):
        half_bias_kernel[kinds * call.heads, side // TILE](
            wide, by_query, by_key, centre, call.heads, *call.grid.shift, 1.0 if call.cosine else 1 / call.scale,
            num_warps=WARPS, num_stages=STAGES, **about, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return HalfBias(by_query, by_key, centre)


def aot_case(form: Form) -> AotCase:
    """For a table."""
    wy, wx = form.window
    types = {"bias": "*fp32", "by_query": "*fp16", "by_key": "*fp16", "centre": "*fp32"}
    numbers = {"heads": "i32", "sy": "i32", "sx": "i32", "multiplier": "fp32"}
    return AotCase(
        kernel=half_bias_kernel,
        config=f"fp16 {wy}x{wx}",
        signature=types | numbers,
        constants={"WY": wy, "WX": wx, "SIDE": form.side, "TILE": TILE, "HAS_BIAS": True, "TABLE": True},
        divisible=frozenset({"by_query", "by_key", "centre"}),
        num_warps=WARPS,
        num_stages=STAGES,
        expects=Expects("a copy", wide_accesses=True, min_blocks_per_sm=3),
    )
