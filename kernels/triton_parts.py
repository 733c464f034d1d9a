"""What every Triton kernel here does: rows in, rows out, products. Importing this file imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)  # from the softmax's powers of 2 to the gradient


@triton.jit
def load_rows(
    start, index, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALL: tl.constexpr = False
):
    """[len(index), BLOCK_D]: rows of HEAD_DIM numbers from start + index * stride; 0 where not `real`. With ALL, `real` is
    not looked at."""
    d = tl.arange(0, BLOCK_D)
    if ALL and BLOCK_D == HEAD_DIM:
        return tl.load(start + (index * stride)[:, None] + d[None, :])
    mask = real[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(start + (index * stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(start, index, stride, real, value, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`, in the type that `start` points to."""
    d = tl.arange(0, BLOCK_D)
    mask = real[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(start + (index * stride)[:, None] + d[None, :], value.to(start.dtype.element_ty), mask=mask)


@triton.jit
def product(left, right):
    """left @ right in fp32: tensor cores for half types, true fp32 (not TF32) for fp32."""
    return tl.dot(left, right, input_precision="ieee")
