"""The bias as the kernels that walk take it (backward_walking.py), in Triton: the kernel and its launcher.

fp16, an operand of the tensor cores, finite, with the mask of each kind of window in it, once by queries and once by keys.
fp16 is finest near 0, and a softmax asks for its largest logits most exactly: so the largest bias of each head, its
centre, is taken off, and the kernels take it off the log-sum-exp too. The rounding is then at most 2^-12 of the distance
from there, less than that of the weights to bf16 wherever a weight is not itself small.

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
    centre: Tensor  # [h] fp32, times log2 e


@triton.jit(do_not_specialize=["heads", "sy", "sx"], do_not_specialize_on_alignment=["bias", "centre"])
def half_bias_kernel(
    bias: tl.tensor,  # TABLE: [R, h]; else [h, N, N]; fp32. Not looked at without HAS_BIAS
    centre: tl.tensor,  # [h] fp32
    by_query: tl.tensor,  # [kinds, h, SIDE, SIDE] fp16
    by_key: tl.tensor,  # the same, transposed
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
    """One tile of one head and kind. Grid: (kinds * h, SIDE / TILE, SIDE / TILE)."""
    slots: tl.constexpr = WY * WX
    head, kind = tl.program_id(0) % heads, tl.program_id(0) // heads
    q = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.program_id(2) * TILE + tl.arange(0, TILE)
    real = (q < slots)[:, None] & (k < slots)[None, :]
    value = tl.zeros([TILE, TILE], tl.float32)
    if HAS_BIAS:
        if TABLE:
            q_place = q // WX * (2 * WX - 1) + q % WX
            k_place = k // WX * (2 * WX - 1) + k % WX
            row = q_place[:, None] - k_place[None, :] + ((WY - 1) * (2 * WX - 1) + WX - 1)
            at = bias + row * heads + head
        else:
            at = bias + head.to(tl.int64) * (slots * slots) + q[:, None] * slots + k[None, :]
        value = (tl.load(at, mask=real, other=0.0) * LOG2_E - tl.load(centre + head)) * multiplier
    q_region, _ = regions(q, kind // 2, kind % 2, 0, 0, 0, 0, WY, WX, sy, sx, True)
    k_region, _ = regions(k, kind // 2, kind % 2, 0, 0, 0, 0, WY, WX, sy, sx, True)
    hidden = (q_region[:, None] != k_region[None, :]) | (k >= slots)[None, :]
    value = tl.where(hidden, -LARGEST_HALF, tl.maximum(value, -LARGEST_HALF)).to(tl.float16)
    place = tl.program_id(0).to(tl.int64) * (SIDE * SIDE)
    tl.store(by_query + place + q[:, None] * SIDE + k[None, :], value)
    tl.store(by_key + place + k[:, None] * SIDE + q[None, :], tl.trans(value))


def half_bias(call: Call, bias: Tensor | None, like: Tensor) -> HalfBias:
    """Of a table [R, h], of [h, N, N], or of none; on the device of `like`. In units of the call's scale, but for cosine
    attention, where each query has its own."""
    side, kinds = call.form.side, KINDS if call.masked else 1
    by_query = like.new_empty((kinds, call.heads, side, side), dtype=torch.float16)
    by_key = torch.empty_like(by_query)
    wide = (
        like.new_zeros(call.heads, dtype=torch.float32)
        if bias is None
        else bias.detach().float().contiguous()
    )
    centre = wide
    if bias is not None:
        largest = wide.amax(0) if wide.dim() == 2 else wide.amax((1, 2))
        centre = largest.nan_to_num(0.0, 0.0, 0.0) * LOG2_E.value
    wy, wx = call.grid.window
    tiles = side // TILE
    about = {
        "WY": wy,
        "WX": wx,
        "SIDE": side,
        "TILE": TILE,
        "HAS_BIAS": bias is not None,
        "TABLE": wide.dim() == 2,
    }
    with torch.cuda.device_of(like):
        half_bias_kernel[kinds * call.heads, tiles, tiles](
            wide, centre, by_query, by_key, call.heads, *call.grid.shift, 1.0 if call.cosine else 1 / call.scale,
            num_warps=WARPS, num_stages=STAGES, **about, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return HalfBias(by_query, by_key, centre)


def aot_case(form: Form) -> AotCase:
    """For a table."""
    wy, wx = form.window
    types = {"bias": "*fp32", "centre": "*fp32", "by_query": "*fp16", "by_key": "*fp16"}
    numbers = {"heads": "i32", "sy": "i32", "sx": "i32", "multiplier": "fp32"}
    return AotCase(
        kernel=half_bias_kernel,
        config=f"fp16 {wy}x{wx}",
        signature=types | numbers,
        constants={"WY": wy, "WX": wx, "SIDE": form.side, "TILE": TILE, "HAS_BIAS": True, "TABLE": True},
        divisible=frozenset({"by_query", "by_key"}),
        num_warps=WARPS,
        num_stages=STAGES,
        expects=Expects("a copy", wide_accesses=True, min_blocks_per_sm=3),
    )
