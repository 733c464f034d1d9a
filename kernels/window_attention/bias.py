"""The relative position bias in Triton: each kernel beside its launcher.

    expand       table [R, h] -> bias [h, Np, Np], padded and scaled
    table_grad   partial gradients of the bias [G, h, Np, Np] -> gradient of the table

Importing this file imports Triton.

Legend: window wy x wx, N = wy * wx slots of which the query's is q and the key's k, Np >= N the padded side, h heads, G
groups, R = (2wy-1)(2wx-1) rows of the table. No index is read from memory. With place(n) = n // wx * (2wx-1) + n % wx,
the table's row for (q, k) is place(q) - place(k) + place(N-1), which is geometry.relative_index; and the pairs of
one row, relative position (dy, dx), are k = q - (dy * wx + dx) for each q whose column q % wx - dx is in the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import LAUNCH_OPTIONS, AotCase, Expects


class Config(NamedTuple):
    """A program's tile and how it is compiled."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **LAUNCH_OPTIONS}


def configure(kernel: Literal["expand", "sum", "gather"], columns: int) -> Config:
    """The tile for a call whose rows are `columns` wide: Np for expand and sum, 2wx-1 for gather.

    About a thousand elements for four warps throughout: all of it is bound by memory or by the launch. The same on every
    GPU; no other tiles were timed.
    """
    match kernel:
        case "expand":  # queries x keys
            return Config(16, 64, num_warps=4, num_stages=1)
        case "sum":  # groups x keys
            rows, columns = (16, 64) if columns <= 64 else (4, 256)
            return Config(rows, columns, num_warps=4, num_stages=1)
        case "gather":  # queries x relative columns
            rows, columns = (64, 16) if columns <= 16 else (32, 32) if columns <= 32 else (32, 64)
            return Config(rows, columns, num_warps=4, num_stages=1)


# ---- table -> bias


@triton.jit(do_not_specialize=["heads", "wy", "wx"], do_not_specialize_on_alignment=["table"])
def bias_expand_kernel(
    table: tl.tensor,  # [R, h] fp32
    out: tl.tensor,  # [h, Np, Np] fp32
    heads: tl.int32,
    wy: tl.int32,
    wx: tl.int32,
    padded: tl.int32,
    multiplier: tl.float32,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One tile of one head. Grid: (h, Np / BLOCK_Q, Np / BLOCK_K)."""
    head = tl.program_id(0)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    slots = wy * wx
    q_place = q // wx * (2 * wx - 1) + q % wx
    k_place = k // wx * (2 * wx - 1) + k % wx
    centre = (wy - 1) * (2 * wx - 1) + wx - 1
    row = q_place[:, None] - k_place[None, :] + centre

    real = (q < slots)[:, None] & (k < slots)[None, :]
    bias = tl.load(table + row * heads + head, mask=real, other=0.0) * multiplier
    bias = tl.where((k < slots)[None, :], bias, float("-inf"))
    inside = (q < padded)[:, None] & (k < padded)[None, :]
    place = head.to(tl.int64) * padded * padded + (q * padded)[:, None] + k[None, :]
    tl.store(out + place, bias, mask=inside)


def expand(table: Tensor, wy: int, wx: int, padded: int, multiplier: float) -> Tensor:
    """table [R, h] fp32 -> multiplier * table [h, Np, Np], looked up for every (query, key). Columns of keys from N on are -inf
    in every row: a softmax then gives them no weight, without a mask. Rows of queries from N on are 0 in the others: what a
    padded query computes is finite, and the caller drops it."""
    table = table.contiguous()
    heads = table.shape[1]
    out = table.new_empty((heads, padded, padded))
    config = configure("expand", padded)
    grid = (heads, triton.cdiv(padded, config.rows), triton.cdiv(padded, config.columns))
    with torch.cuda.device_of(out):
        bias_expand_kernel[grid](
            table,
            out,
            heads,
            wy,
            wx,
            padded,
            multiplier,
            BLOCK_Q=config.rows,
            BLOCK_K=config.columns,
            **config.options,
        )
    return out


# ---- gradient: partials -> table


@triton.jit(do_not_specialize=["groups", "heads", "slots"])
def bias_sum_kernel(
    partials: tl.tensor,  # [G, h, Np, Np] fp32
    total: tl.tensor,  # [h, Np, Np] fp32; rows of padded queries are left as they are
    groups: tl.int32,
    heads: tl.int32,
    slots: tl.int32,
    padded: tl.int32,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """The sum over G for a piece of one query's row. Grid: (h * N, Np / BLOCK_K)."""
    head, q = tl.program_id(0) // slots, tl.program_id(0) % slots
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = (head.to(tl.int64) * padded + q) * padded + k
    inside = (k < padded)[None, :]
    acc = tl.zeros([BLOCK_G, BLOCK_K], tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        group = g.to(tl.int64) * heads * padded * padded
        acc += tl.load(
            partials + group[:, None] + place[None, :], mask=(g < groups)[:, None] & inside, other=0.0
        )
    tl.store(total + place, tl.sum(acc, 0), mask=k < padded)


@triton.jit(do_not_specialize=["heads", "wy", "wx", "padded"], do_not_specialize_on_alignment=["bias_grad"])
def bias_gather_kernel(
    bias_grad: tl.tensor,  # [h, Np, Np] fp32
    table_grad: tl.tensor,  # [R, h] fp32
    heads: tl.int32,
    wy: tl.int32,
    wx: tl.int32,
    padded: tl.int32,
    multiplier: tl.float32,
    BLOCK_Q: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    """The sums of one head's pairs at one dy and BLOCK_X dx. Grid: (h, 2wy-1, (2wx-1) / BLOCK_X)."""
    head = tl.program_id(0)
    dy = tl.program_id(1) - (wy - 1)
    dx = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X) - (wx - 1)
    base = bias_grad + head.to(tl.int64) * padded * padded
    # The queries whose key's row is in the window.
    first, last = tl.maximum(dy, 0) * wx, (wy + tl.minimum(dy, 0)) * wx
    acc = tl.zeros([BLOCK_Q, BLOCK_X], tl.float32)
    for start in range(first, last, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        k = q[:, None] - (dy * wx + dx)[None, :]
        key_column = (q % wx)[:, None] - dx[None, :]
        pair = (q < last)[:, None] & (key_column >= 0) & (key_column < wx)
        acc += tl.load(base + (q * padded)[:, None] + k, mask=pair, other=0.0)
    row = tl.program_id(1) * (2 * wx - 1) + dx + wx - 1
    tl.store(table_grad + row * heads + head, tl.sum(acc, 0) * multiplier, mask=dx < wx)


def table_grad(partials: Tensor, wy: int, wx: int, multiplier: float) -> Tensor:
    """partials [G, h, Np, Np] fp32 -> [R, h] fp32. G is summed first, in streams of whole rows; then each program
    owns some rows of the table. Every sum is in an order that the shape alone determines."""
    partials = partials.contiguous()
    if partials.data_ptr() % 16:  # a view from the middle of a tensor: 16-byte loads need more
        partials = partials.clone()
    groups, heads, padded, _ = partials.shape
    slots = wy * wx
    grad = partials.new_empty(((2 * wy - 1) * (2 * wx - 1), heads))
    with torch.cuda.device_of(partials):
        total = partials[0]
        if groups > 1:
            total = torch.empty_like(total)
            config = configure("sum", padded)
            bias_sum_kernel[heads * slots, triton.cdiv(padded, config.columns)](
                partials,
                total,
                groups,
                heads,
                slots,
                padded,
                BLOCK_G=config.rows,
                BLOCK_K=config.columns,
                **config.options,
            )
        config = configure("gather", 2 * wx - 1)
        bias_gather_kernel[heads, 2 * wy - 1, triton.cdiv(2 * wx - 1, config.columns)](
            total,
            grad,
            heads,
            wy,
            wx,
            padded,
            multiplier,
            BLOCK_Q=config.rows,
            BLOCK_X=config.columns,
            **config.options,
        )
    return grad


# ---- for bench.aot


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Every form in which the launchers above launch: tiles, and whether Triton sees that Np is a multiple of
    16. The tiles are those of every side up to 1024, so of windows up to 32 x 32; the same for every `arch`."""
    sides = range(1, 1025)
    for config, whole in sorted({(configure("expand", side), side % 16 == 0) for side in sides}):
        expects = Expects("a copy", wide_accesses=whole, min_blocks_per_sm=12)
        yield _case(bias_expand_kernel, config, expects, whole, table="*fp32", out="*fp32")
    for config, whole in sorted({(configure("sum", side), side % 16 == 0) for side in sides}):
        expects = Expects("a sum over the slowest dimension", wide_accesses=whole, min_blocks_per_sm=8)
        yield _case(bias_sum_kernel, config, expects, whole, partials="*fp32", total="*fp32")
    for config in sorted({configure("gather", side) for side in sides}):
        expects = Expects("sums of diagonals", min_blocks_per_sm=6)
        yield _case(bias_gather_kernel, config, expects, False, bias_grad="*fp32", table_grad="*fp32")


def _case(kernel: Any, config: Config, expects: Expects, whole: bool, **pointers: str) -> AotCase:
    """One form; `whole`: Np is a multiple of 16. torch's memory starts at multiples of 16 bytes, and where a kernel may
    not rely on it, Triton was told not to look."""
    blocks = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
    unaligned = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    types = {parameter.name: parameter.annotation_type for parameter in kernel.params} | pointers
    dtype = list(pointers.values())[-1].removeprefix("*")
    return AotCase(
        kernel=kernel,
        config=f"{dtype}, {config.rows}x{config.columns}, Np {'= 16n' if whole else 'any'}",
        signature={name: kind for name, kind in types.items() if name not in blocks},
        constants=dict(zip(blocks, config[:2], strict=True)),
        divisible=frozenset(pointers) - unaligned | ({"padded"} if whole else set()),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=expects,
    )
