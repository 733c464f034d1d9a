"""The public function: checks, choice of the backend, dispatch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.autocast import autocast_dtype
from kernels.backend import Choice, Plan, describe, resolve, triton_refusal
from kernels.contrastive_loss import operator, reference
from kernels.contrastive_loss.distributed import DTYPES
from kernels.transforms import refuse_transforms, require_tensors

NAME = "contrastive_loss"
KINDS = ("sigmoid", "softmax")
NAMES: tuple[str, ...] = ("reference", "eager", "triton")  # the backends of this function
Kind = Literal["sigmoid", "softmax"]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: Kind = "sigmoid",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss of pairs, without the N x N logits in memory, forward or backward.

    image: [N, D], normally of unit length; float64, float32, float16 or bfloat16.
    text: [N, D], row i belongs to image i; or [N*K, D], rows i*K to i*K+K-1 belong to image i.
    logit_scale: [], the log of what cosines are multiplied by. logit_bias: [] or None, added to all logits.
    kind: "sigmoid" (SigLIP, arXiv:2303.15343): sum over all pairs of -log sigmoid(+-logit), divided by the number of
        texts. "softmax" (CLIP, arXiv:2103.00020): mean of both directions' cross-entropies; an image's K texts share its
        target. A bias cancels there: it is not used and its gradient is 0.
    group: a process group whose ranks all call this with as many pairs: then these N images meet the texts of all
        ranks, and the texts all images. The mean over ranks is the loss of the global batch. Gradients of image and text
        are those of the sum of all ranks' losses, so that the mean of the parameters' gradients over ranks, which
        DistributedDataParallel takes, is the gradient of the global batch's loss; so is the mean over ranks of those of
        logit_scale and logit_bias. None: this process alone, whether or not there are others.
    backend: "auto", "reference", "eager" or "triton"; `kernels.explain` tells what auto takes.

    Returns a scalar, float32 (float64 for float64 rows); 0 for no pairs at all. Gradients: image, text, logit_scale,
    logit_bias. Under autocast float32 rows are cast to autocast's dtype; logits and sums are float32 in any case.
    Raises TypeError (dtypes), ValueError (shapes, values; on every rank where ranks differ in their numbers),
    BackendError (a named backend that cannot run the call).
    """
    require_tensors(NAME, image=image, text=text)
    refuse_transforms(NAME, backend, image, text, logit_scale, logit_bias)
    low = autocast_dtype(image)
    if low is not None:
        image, text = image.to(low), text.to(low)
    _check(image, text, logit_scale, logit_bias, kind, group)
    chosen = resolve(NAME, backend, plan(image, group))
    with nullcontext() if low is None else torch.autocast(image.device.type, enabled=False):
        if chosen == "reference":
            return reference.contrastive_loss(image, text, logit_scale, logit_bias, kind)
        name = "" if group is None else group.group_name
        return operator.contrastive_loss(image, text, logit_scale, logit_bias, kind, name, chosen)


def explain(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: Kind = "sigmoid",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Choice:
    """`kernels.explain(contrastive_loss, ...)`."""
    if (low := autocast_dtype(image)) is not None:
        image, text = image.to(low), text.to(low)
    _check(image, text, logit_scale, logit_bias, kind, group)
    return describe(NAME, backend, plan(image, group))


def plan(image: Tensor, group: dist.ProcessGroup | None) -> Plan:
    """What auto takes for this call. The figures behind it are in kernels/README.md."""
    refusals: dict[str, str] = {}
    if group is not None:
        refusals["reference"] = "it is for one process, and a group was given"
    why = triton_refusal(image.device)
    if why is None and image.dtype == torch.float64:
        why = "it computes in float32 at most, got float64"
    if why is not None:
        refusals["triton"] = why
    if image.device.type == "cpu":
        return Plan("eager", "chunks of logits in the cache; measured faster on a CPU", refusals, NAMES)
    reason = f"nothing was measured on {image.device.type}: chunks of torch's own products"
    return Plan("eager", reason, refusals, NAMES)


def _check(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    group: dist.ProcessGroup | None,
) -> None:
    """An error that says what came and what is supported. Numbers of rows may differ between the ranks of a group, where
    one that raised alone would leave the others waiting: those are compared first, in the operator."""
    if image.dim() != 2 or text.dim() != 2 or image.shape[1] != text.shape[1] or image.shape[1] == 0:
        raise ValueError(
            f"{NAME}: image must be [N, D] and text [N, D] or [N*K, D], got {list(image.shape)} and {list(text.shape)}"
        )
    if image.dtype not in DTYPES or text.dtype != image.dtype:
        raise TypeError(
            f"{NAME}: image and text must have one dtype, float64, float32, float16 or bfloat16, "
            f"got {image.dtype} and {text.dtype}"
        )
    if kind not in KINDS:
        raise ValueError(f"{NAME}: kind must be 'sigmoid' or 'softmax', got {kind!r}")
    for name, scalar in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if scalar is None:
            continue
        if not isinstance(scalar, Tensor) or scalar.dim() != 0:
            got = list(scalar.shape) if isinstance(scalar, Tensor) else repr(scalar)
            raise ValueError(f"{NAME}: {name} must be a tensor without dimensions, got {got}")
        if not scalar.is_floating_point():
            raise TypeError(f"{NAME}: {name} must be floating point, got {scalar.dtype}")
    for name, tensor in (("text", text), ("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if tensor is not None and tensor.device != image.device:
            raise ValueError(f"{NAME}: {name} must be on image's device {image.device}, got {tensor.device}")
    if group is None:
        operator.check_pairs(len(image), len(text))
