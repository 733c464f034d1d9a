"""Gathering rows by a permutation, with a gradient that is a gather too.

torch's own gradient of an index is a scatter-add: much slower on the CPU, and in no fixed order on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return source.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def gather_rows(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """source [R, ...], index int64 [S] -> source[index] [S, ...].

    inverse int64 [R] says in which place of the result each source row is; no row may be gathered twice, except
    where the caller overwrites the copies (a place that no source row claims drops its gradient). A source row
    that is gathered nowhere gets the gradient of the place it claims, so the caller must make that harmless.
    """
    result: Tensor = _GatherRows.apply(source, index, inverse)
    return result
