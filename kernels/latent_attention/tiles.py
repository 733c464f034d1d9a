"""What the Triton kernels of latent attention share. Legend in launch.py. Importing this file imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers whose divisibility makes no better code: a form of its own for each would be compiled for nothing.
SIZES = ["queries", "heads", "group", "parts", "padded"]


@triton.jit
def part_of(length, part, parts, BLOCK: tl.constexpr):
    """first and last of `length` things that part `part` of `parts` has, in whole blocks: the parts are equal but for
    rounding, whatever the sample's own length."""
    size = tl.cdiv(tl.cdiv(length, BLOCK), parts) * BLOCK
    first = tl.minimum(part * size, length)
    return first, tl.minimum(first + size, length)


@triton.jit
def kept(
    seed, probability, sample, head, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """bool [BLOCK_M, BLOCK_N]: what dropout keeps, as dropout.keep_mask says. first_key is a multiple of 4."""
    m = first_query + tl.arange(0, BLOCK_M)
    quad = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    c0, c1, c2, c3 = tl.philox(seed, zero + quad[None, :], zero + m[:, None], zero + head, zero + sample)
    # Word w of a quad belongs to key 4 * quad + w: interleave the four.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(BLOCK_M, BLOCK_N)
    uniform = (words.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return uniform >= probability
