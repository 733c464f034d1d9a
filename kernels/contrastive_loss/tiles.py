"""What both Triton kernels of the contrastive loss do: a tile of logits. Importing this file imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_parts import product


@triton.jit
def logits_tile(
    left, right, m, n, rows, columns, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp32 products [BLOCK_M, BLOCK_N] of the rows m of left with the rows n of right, WIDTH numbers each; beyond the last row
    of either they are of no meaning."""
    d = tl.arange(0, BLOCK_D)
    m = tl.minimum(m, rows - 1).to(tl.int64)
    n = tl.minimum(n, columns - 1).to(tl.int64)
    left_at = left + (m * WIDTH)[:, None] + d[None, :]
    right_at = right + (n * WIDTH)[:, None] + d[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, WIDTH, BLOCK_D):
        if WIDTH % BLOCK_D == 0:
            a = tl.load(left_at + begin)
            b = tl.load(right_at + begin)
        else:
            real = (begin + d < WIDTH)[None, :]
            a = tl.load(left_at + begin, mask=real, other=0.0)
            b = tl.load(right_at + begin, mask=real, other=0.0)
        acc += product(a, tl.trans(b))
    return acc


@triton.jit
def softplus_parts(x):
    """log(1 + exp(x)) and its derivative. A GPU's logarithm is exact to 2^-22 of 1, so near 1 a series takes its place."""
    e = tl.exp(-tl.abs(x))
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * (0.25 - e * (0.2 - e * (1.0 / 6))))))
    log = tl.where(e < 0.0625, series, tl.log(1.0 + e))
    return tl.maximum(x, 0.0) + log, tl.where(x >= 0, 1.0, e) / (1.0 + e)
