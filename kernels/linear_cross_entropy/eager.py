"""Linear cross-entropy in plain torch operations, some rows at a time.

The logits of a chunk of rows become its softmax and then their own gradient in one buffer, which the next chunk
overwrites. Both products of the gradient follow at once, while the chunk is at hand, so that nothing is computed twice.
Rows whose target is ignored cost nothing on a CPU. Half types are multiplied as they are where the device has
instructions for it, else in float32, and everything between the products is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.linear_cross_entropy.reference import Settings
from kernels.products import product_dtype

# Bytes of logits at a time, and the fewest rows. Measured on a CPU (2,048 x 768 by 32,768, float32): 64 rows 5.9 s, 128
# 5.3 s, 256 4.9 s, 512 4.8 s, 1,024 5.0 s, all at once 6.1 s. On GPUs larger pieces keep the products efficient.
CHUNK = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
FEWEST_ROWS = {"cpu": 128, "cuda": 2048}

Result = tuple[Tensor, Tensor | None, Tensor | None]


def sweep(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    settings: Settings,
    *,
    scale: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> Result:
    """Losses [M], and the gradients of hidden [M, H] and weight [V, H] that are wanted (else None), of the sum of the
    losses or, with scale [M], of the sum of scale times the losses."""
    product = product_dtype(settings.compute, hidden.device)
    table = weight.to(product)
    losses = hidden.new_zeros(len(hidden), dtype=settings.wide)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if want_hidden else None
    d_weight = weight.new_zeros(weight.shape, dtype=settings.wide) if want_weight else None
    chunks = _chunks(targets, settings, len(weight), product)
    size = max((len(targets[rows]) for rows in chunks), default=0)
    buffer = hidden.new_empty(size, len(weight), dtype=product)
    for rows in chunks:
        x, labels = hidden[rows].to(product), targets[rows]
        logits = torch.mm(x, table.T, out=buffer[: len(x)]).to(settings.wide)  # [r, V]
        valid = labels != settings.ignore_index
        labels = torch.where(valid, labels, 0)[:, None]
        loss, log_z = _consume(logits, labels, settings)
        losses[rows] = torch.where(valid, loss, 0)
        if not (want_hidden or want_weight):
            continue
        _differentiate(logits, labels, log_z, settings)
        factor = valid.to(logits.dtype) if scale is None else torch.where(valid, scale[rows].to(logits), 0)
        d_logits = logits.mul_(factor[:, None]).to(product)
        if d_hidden is not None:
            d_hidden[rows] = torch.mm(d_logits, table).to(hidden.dtype)
        if d_weight is not None:
            _add_product(d_weight, d_logits.T, x)
    return losses, d_hidden, d_weight


def _chunks(
    targets: Tensor, settings: Settings, vocabulary: int, product: torch.dtype
) -> list[Tensor | slice]:
    """The rows to do, in pieces: on a CPU those that have a target, elsewhere all (to ask would be to wait)."""
    kind = "cpu" if targets.device.type == "cpu" else "cuda"
    rows = max(CHUNK[kind] // (max(vocabulary, 1) * product.itemsize), FEWEST_ROWS[kind])
    if kind == "cpu":
        wanted = (targets != settings.ignore_index).nonzero()[:, 0]
        if len(wanted) < len(targets):
            return list(wanted.split(rows)) if len(wanted) else []
    return [slice(start, start + rows) for start in range(0, len(targets), rows)]


def _consume(logits: Tensor, labels: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps [r] of logits [r, V], which become their softmax in place.

    The largest probability p is at the largest logit m, so logsumexp = m - log p, and p >= 1 / V.
    """
    largest = logits.amax(1)
    of_label = logits.gather(1, labels)[:, 0]
    smoothing = settings.label_smoothing
    mean = logits.mean(1) if smoothing else None
    torch.softmax(logits, 1, out=logits)
    log_z = largest - logits.amax(1).log_()
    loss = log_z - of_label if mean is None else log_z - (1 - smoothing) * of_label - smoothing * mean
    if settings.z_loss:
        loss = loss + settings.z_loss * log_z.square()
    return loss, log_z


def _differentiate(probabilities: Tensor, labels: Tensor, log_z: Tensor, settings: Settings) -> None:
    """Probabilities [r, V] become the gradient of the logits, in place."""
    if settings.z_loss:
        probabilities.mul_((1 + 2 * settings.z_loss * log_z)[:, None])
    if settings.label_smoothing:
        probabilities.sub_(settings.label_smoothing / probabilities.shape[1])
    ones = torch.full_like(labels, 1, dtype=probabilities.dtype)
    probabilities.scatter_add_(1, labels, ones.mul_(settings.label_smoothing - 1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, added up in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(left, right))
