"""Gathering rows by a permutation, with a gradient that is a gather too.

torch's own gradient of an index is a scatter-add: much slower on the CPU, and in no fixed order on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return source.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def gather_rows(source: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """source [R, ...], index int64 [S] -> source[index] [S, ...].

    inverse int64 [R] says in which place of the result each source row is. It is for index without
    repetition. Places of the result that no source row claims must be overwritten by the caller (their
    gradient is dropped), and so must source rows that are not gathered have no gradient of their own (they
    would get that of the place they claim).
    """
    result: Tensor = _GatherRows.apply(source, index, inverse)
    return result
