"""The softmax's first pass: every tile of logits gives the largest logit and the sum of exponentials of each of its rows
and of each of its columns, so one product serves both directions. The logits are not stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contrastive_loss.launch import Form, configure
from kernels.contrastive_loss.tiles import logits_tile


@triton.jit(do_not_specialize=["rows", "columns"])
def logit_sums_kernel(
    image: tl.tensor,  # [rows, WIDTH]
    text: tl.tensor,  # [columns, WIDTH]
    scale: tl.tensor,  # fp32 []
    row_max: tl.tensor,  # fp32 [column tiles, rows]
    row_sum: tl.tensor,  # fp32, likewise
    column_max: tl.tensor,  # fp32 [row tiles, columns]
    column_sum: tl.tensor,
    rows: tl.int32,
    columns: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid: row tiles * column tiles, row tile fastest: programs that run together share texts."""
    tiles = tl.cdiv(rows, BLOCK_M)
    tile_m = tl.program_id(0) % tiles
    tile_n = tl.program_id(0) // tiles
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = logits_tile(image, text, m, n, rows, columns, WIDTH, BLOCK_D, BLOCK_M, BLOCK_N)
    logits *= tl.load(
        scale
    )  # as in backward.py, to the bit: the largest probability is then as exact as float32 allows
    logits = tl.where((m < rows)[:, None] & (n < columns)[None, :], logits, float("-inf"))

    largest = tl.max(logits, 1)
    shown = tl.where(largest == float("-inf"), 0.0, largest)
    place = tile_n.to(tl.int64) * rows + m
    tl.store(row_max + place, largest, mask=m < rows)
    tl.store(row_sum + place, tl.sum(tl.exp(logits - shown[:, None]), 1), mask=m < rows)
    largest = tl.max(logits, 0)
    shown = tl.where(largest == float("-inf"), 0.0, largest)
    place = tile_m.to(tl.int64) * columns + n
    tl.store(column_max + place, largest, mask=n < columns)
    tl.store(column_sum + place, tl.sum(tl.exp(logits - shown[None, :]), 0), mask=n < columns)


def logit_sums(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """log-sum-exp of the rows [N] and of the columns [M], float64, of the logits of these images."""
    form = Form.of(image)
    config = configure("sums", form)
    rows, columns = len(image), len(text)
    tiles_m, tiles_n = triton.cdiv(rows, config.queries), triton.cdiv(columns, config.keys)
    row_max, row_sum = (scale.new_empty(tiles_n, rows) for _ in range(2))
    column_max, column_sum = (scale.new_empty(tiles_m, columns) for _ in range(2))
    with torch.cuda.device_of(image):
        logit_sums_kernel[(tiles_m * tiles_n,)](
            image, text, scale, row_max, row_sum, column_max, column_sum, rows, columns,
            WIDTH=form.width, BLOCK_D=form.block_d, BLOCK_M=config.queries, BLOCK_N=config.keys, **config.options,
        )  # fmt: skip
    return combine(row_max, row_sum), combine(column_max, column_sum)


def combine(largest: Tensor, total: Tensor) -> Tensor:
    """Parts [parts, n] -> natural log-sum-exp [n], float64, in the parts' order."""
    top = largest.amax(0)
    return top + (total * torch.exp(largest - top)).sum(0).double().log()
