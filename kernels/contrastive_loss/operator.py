"""The loss and its gradients as one operator that torch.compile does not look into: auroraio::contrastive_loss.

All communication is in the forward, so the backward of one rank never waits for another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.contrastive_loss import eager
from kernels.contrastive_loss.distributed import Group
from kernels.contrastive_loss.eager import Grads
from kernels.once import once_differentiable
from kernels.operators import operator

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the loss; N times its gradients


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    group: str,
    backend: str,
) -> Tensor:
    """image [N, D], text [N*K, D] of this rank -> its loss, whose mean over ranks is that of the global batch."""
    inputs = (image, text, logit_scale, logit_bias)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    loss: Tensor = _run(*inputs, kind == "sigmoid", group, backend == "triton", training)[0]
    return loss


def _kept(rows: Tensor) -> torch.dtype:
    """The type of N times a gradient: float16 would overflow where many pairs pull at one embedding."""
    return torch.float32 if rows.dtype == torch.float16 else rows.dtype


def _fake(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    sigmoid: bool,
    group: str,
    triton: bool,
    training: bool,
) -> Result:
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    rows = [rows.new_empty(rows.shape if training else (0,), dtype=_kept(rows)) for rows in (image, text)]
    scalars = [image.new_empty((), dtype=wide) for _ in range(3)]
    return scalars[0], rows[0], rows[1], scalars[1], scalars[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
    image, _, logit_scale, logit_bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # those would be zeros as large as the saved gradients
    ctx.save_for_backward(*output[1:])
    ctx.pairs, ctx.scale_dtype = max(len(image), 1), logit_scale.dtype
    ctx.rows_dtype = image.dtype
    ctx.bias_dtype = None if logit_bias is None else logit_bias.dtype


@once_differentiable("contrastive_loss")
def _autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    image, text, scale, bias = ctx.saved_tensors
    factor = grad / ctx.pairs
    d_bias = None if ctx.bias_dtype is None else (bias * factor).to(ctx.bias_dtype)
    grads = ((rows * factor).to(ctx.rows_dtype) for rows in (image, text))
    return *grads, (scale * factor).to(ctx.scale_dtype), d_bias, None, None, None, None


@operator("contrastive_loss", _fake, (_autograd, _setup_context))
def _run(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    sigmoid: bool,
    group: str,
    triton: bool,
    training: bool,
) -> Result:
    """The loss, and where `training` the gradients of N times the loss for image, text, logit_scale, logit_bias."""
    ranks = Group(group)
    ranks.agree(image, text, sigmoid, training)
    check_pairs(len(image), len(text))
    empty = _fake(image, text, logit_scale, logit_bias, sigmoid, group, triton, training=False)
    wide = empty[0].dtype
    if len(image) == 0:
        zero, d_scale, d_bias = (torch.zeros_like(empty[i]) for i in (0, 3, 4))
        return (
            zero,
            torch.zeros_like(image, dtype=_kept(image)),
            torch.zeros_like(text, dtype=_kept(text)),
            d_scale,
            d_bias,
        )
    captions, first = len(text) // len(image), ranks.rank * len(image)
    image, own = image.detach().contiguous(), text.detach().contiguous()
    texts = ranks.gather(own)
    scale = logit_scale.detach().double().exp()
    bias = None if logit_bias is None or not sigmoid else logit_bias.detach()
    grads: Grads | None = None
    ways: Any = eager
    if triton:
        from kernels.contrastive_loss import triton_problem

        ways = triton_problem
    problem = ways.Problem(image, texts, scale, captions, first)
    if sigmoid:
        total, grads = ways.sigmoid(problem, bias, training)
        loss = total / len(image)
    else:
        softmax = ways.Softmax(problem)
        rows, columns, positives = softmax.normalizers(training)
        columns = ranks.logsumexp(columns)
        # Differences first: logits are up to 100, a loss is near 0.
        to_image = (ranks.own(columns) - positives).mean()
        loss = ((rows - positives.double().unflatten(0, (-1, captions)).mean(1)).mean() + to_image) / 2
        grads = softmax.grads(rows, columns) if training else None
    if grads is None:
        return loss.to(wide), *map(torch.zeros_like, empty[1:])
    return (
        loss.to(wide),
        grads.image.to(_kept(image)),
        ranks.own_sum(grads.text).to(_kept(image)),
        grads.logit_scale.to(wide),
        grads.logit_bias.to(wide),
    )


def check_pairs(images: int, texts: int) -> None:
    """Raise ValueError unless every image has as many texts."""
    if (images == 0) != (texts == 0) or (images and texts % images):
        raise ValueError(
            f"contrastive_loss: {texts} texts cannot belong to {images} images in equal numbers; "
            "text must be [N*K, D], rows i*K to i*K+K-1 those of image i"
        )
