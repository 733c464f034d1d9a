"""The two operators that both chunked backends run in, and what autograd keeps for them.

sum    losses and gradients in one sweep; the gradients wait for their factor, which is one number
rows   losses alone; when each token's factor is known, a second sweep makes the gradients: a third more arithmetic
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.linear_cross_entropy import eager, liger
from kernels.linear_cross_entropy.reference import Settings
from kernels.once import once_differentiable
from kernels.operators import operator

SWEEPS = {"eager": eager.sweep, "liger": liger.sweep}


def total(hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings, backend: str) -> Tensor:
    """The sum of the losses."""
    wants = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    numbers = (settings.ignore_index, settings.label_smoothing, settings.z_loss, settings.compute)
    loss: Tensor = _sum(hidden, weight, targets, *numbers, *wants, backend)[0]
    return loss


def rows(hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings, backend: str) -> Tensor:
    """The losses [M]."""
    numbers = (settings.ignore_index, settings.label_smoothing, settings.z_loss, settings.compute)
    losses: Tensor = _rows(hidden, weight, targets, *numbers, backend)
    return losses


def kept_dtype(weight: Tensor) -> torch.dtype:
    """The type of the weight's gradient of the sum: float16 would overflow where many tokens want the same piece."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _fake_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    compute: torch.dtype, want_hidden: bool, want_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = Settings(ignore_index, label_smoothing, z_loss, compute).wide
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0, dtype=kept_dtype(weight)),
    )


def _keep_sum(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # those would be zeros as large as the saved gradients
    ctx.save_for_backward(*output[1:])
    ctx.wants = inputs[7:9]
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]


@once_differentiable("linear_cross_entropy")
def _sum_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    found = [
        _times(kept.detach(), grad).to(dtype) if wanted else None
        for kept, wanted, dtype in zip(ctx.saved_tensors, ctx.wants, ctx.dtypes, strict=True)
    ]
    return (*found, *[None] * 8)


def _times(kept: Tensor, factor: Tensor) -> Tensor:
    """kept times factor; in kept's own memory where the graph is used up, so that no gradient is there twice."""
    traced = torch.compiler.is_compiling() or type(kept) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return kept * factor.to(kept.dtype)
    return kept.mul_(factor)


@operator("linear_cross_entropy_sum", _fake_sum, (_sum_backward, _keep_sum))
def _sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    compute: torch.dtype, want_hidden: bool, want_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of the losses, and its gradients; a gradient that is not wanted has no numbers in it."""
    settings = Settings(ignore_index, label_smoothing, z_loss, compute)
    losses, d_hidden, d_weight = SWEEPS[backend](
        hidden, weight, targets, settings, scale=None, want_hidden=want_hidden, want_weight=want_weight
    )
    return (
        losses.sum(),
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0, dtype=kept_dtype(weight))
        if d_weight is None
        else d_weight.to(kept_dtype(weight)),
    )


def _fake_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    compute: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    wide = Settings(ignore_index, label_smoothing, z_loss, compute).wide
    return hidden.new_empty(len(hidden), dtype=wide)


def _keep_rows(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad[:2]
    found = _rows_gradients(grad, *ctx.saved_tensors, *ctx.rest[:4], *wants, ctx.rest[4])
    return (*(g if wanted else None for g, wanted in zip(found, wants, strict=True)), *[None] * 6)


@operator("linear_cross_entropy_rows", _fake_rows, (_rows_backward, _keep_rows))
def _rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    compute: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """The losses [M]."""
    settings = Settings(ignore_index, label_smoothing, z_loss, compute)
    return SWEEPS[backend](
        hidden, weight, targets, settings, scale=None, want_hidden=False, want_weight=False
    )[0]


def _fake_rows_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, compute: torch.dtype, want_hidden: bool, want_weight: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
    )


@operator("linear_cross_entropy_rows_backward", _fake_rows_gradients)
def _rows_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, compute: torch.dtype, want_hidden: bool, want_weight: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of sum(grad * losses)."""
    settings = Settings(ignore_index, label_smoothing, z_loss, compute)
    _, d_hidden, d_weight = SWEEPS[backend](
        hidden,
        weight,
        targets,
        settings,
        scale=grad.contiguous(),
        want_hidden=want_hidden,
        want_weight=want_weight,
    )
    return (
        hidden.new_empty(0) if d_hidden is None else d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight.to(weight.dtype),
    )
