"""Gradients of the logits, a chunk of rows at a time, from logits that are made again in tiles; two products with torch turn
them into those of the rows. For "sigmoid", which has no normalizer, the loss comes along."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.contrastive_loss.eager import split
from kernels.contrastive_loss.launch import Form, configure
from kernels.contrastive_loss.tiles import logits_tile, softplus_parts


@triton.jit(do_not_specialize=["rows", "columns", "first", "captions"])
def logit_grads_kernel(
    left: tl.tensor,  # [rows, WIDTH]: images of the chunk; texts where SWAPPED
    right: tl.tensor,  # [columns, WIDTH]: all texts; images
    scale: tl.tensor,  # fp32 []
    bias: tl.tensor,  # fp32 []
    row_lse: tl.tensor,  # fp32 [2, rows]: natural log-sum-exp, and exp(-what fp32 leaves of it)
    column_lse: tl.tensor,  # fp32 [2, columns]
    grad: tl.tensor,  # [rows, columns]: of N * K times the loss (softmax: of N times the loss)
    sums: tl.tensor,  # fp32 [3, programs]: loss, gradient, gradient times logit
    rows: tl.int32,
    columns: tl.int32,
    first: tl.int32,  # the number among all images of the first row (SWAPPED: of the first column, less that of the row's)
    captions: tl.int32,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIGMOID: tl.constexpr,
    SWAPPED: tl.constexpr,
) -> None:
    """Grid: row tiles * column tiles, row tile fastest."""
    tiles = tl.cdiv(rows, BLOCK_M)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    logits = logits_tile(left, right, m, n, rows, columns, WIDTH, BLOCK_D, BLOCK_M, BLOCK_N) * tl.load(scale)
    if (
        SWAPPED
    ):  # `first` counts texts here: row m is text first + m, whose image is column (first + m) // captions
        owner = tl.where(first + m < 0, -1, (first + m) // captions)  # a division rounds towards 0
        positive = owner[:, None] == n[None, :]
    else:
        positive = (first + m)[:, None] == (n // captions)[None, :]
    real = (m < rows)[:, None] & (n < columns)[None, :]
    loss = 0.0
    if SIGMOID:
        x = logits + tl.load(bias)
        value, slope = softplus_parts(tl.where(positive, -x, x))
        loss = tl.sum(tl.sum(tl.where(real, value, 0.0), 1), 0)
        found = tl.where(positive, -slope, slope)
    else:
        share = 1.0 / captions
        by_row = tl.exp(logits - tl.load(row_lse + m, mask=m < rows, other=0.0)[:, None])
        by_row *= tl.load(row_lse + rows + m, mask=m < rows, other=0.0)[:, None]
        by_column = tl.exp(logits - tl.load(column_lse + n, mask=n < columns, other=0.0)[None, :])
        by_column *= tl.load(column_lse + columns + n, mask=n < columns, other=0.0)[None, :]
        if SWAPPED:
            found = 0.5 * (by_row * share + by_column)
        else:
            found = 0.5 * (by_row + by_column * share)
        found = tl.where(positive, found - share, found)
    found = tl.where(real, found, 0.0)
    at = sums + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(at, loss)
    tl.store(at + programs, tl.sum(tl.sum(found, 1), 0))
    tl.store(at + 2 * programs, tl.sum(tl.sum(found * tl.where(real, logits, 0.0), 1), 0))
    out = grad + (m.to(tl.int64) * columns)[:, None] + n[None, :]
    tl.store(out, found.to(grad.dtype.element_ty), mask=real)


def logit_grads(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor | None, lse: tuple[Tensor, Tensor] | None,
    grad: Tensor, first: int, captions: int, *, swapped: bool = False,
) -> Tensor:  # fmt: skip
    """Fills grad [rows, columns]; returns float64 [3]: loss, sum of the gradients, sum of gradients times logits. Without
    `lse` (of rows, of columns) it is the sigmoid loss. first: the number among all images of left's first row; swapped: left
    is texts, right images, and it is the number of left's first text, less that of right's first image's first text."""
    form = Form.of(left)
    config = configure("grads", form)
    rows, columns = len(left), len(right)
    programs = triton.cdiv(rows, config.queries) * triton.cdiv(columns, config.keys)
    sums = scale.new_empty(3, programs)
    row_lse, column_lse = (torch.stack(split(part, torch.float32)) for part in lse) if lse else (scale, scale)
    with torch.cuda.device_of(left):
        logit_grads_kernel[(programs,)](
            left, right, scale, scale if bias is None else bias, row_lse, column_lse, grad, sums,
            rows, columns, first, captions,
            WIDTH=form.width, BLOCK_D=form.block_d, BLOCK_M=config.queries, BLOCK_N=config.keys,
            SIGMOID=lse is None, SWAPPED=swapped, **config.options,
        )  # fmt: skip
    return sums.double().sum(1)
