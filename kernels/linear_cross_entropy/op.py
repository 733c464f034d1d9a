"""The public function: checks, choice of the backend, dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autocast import autocast_dtype
from kernels.backend import Choice, Plan, describe, resolve
from kernels.linear_cross_entropy import fused, liger, reference
from kernels.linear_cross_entropy.reference import Settings
from kernels.transforms import refuse_transforms, require_tensors

NAME = "linear_cross_entropy"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NAMES = ("reference", "eager", "liger")  # the backends of this function
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits hidden weight^T, of which a few rows exist at a time, forward and backward.

    hidden: [M, H]; float64, float32, float16 or bfloat16. weight: [V, H], of hidden's dtype.
    targets: int64 [M], from 0 to V - 1, or ignore_index: such tokens count nowhere and have loss 0.
    label_smoothing: from 0 to 1, as in torch.nn.functional.cross_entropy.
    z_loss: weight of logsumexp(logits)^2, added to each token's loss (PaLM, arXiv:2204.02311).
    reduction: "mean" over the tokens that have a target (nan where none has, with gradients 0, as torch's), "sum" (0
        where none has), or "none": [M].
    backend: "auto", "reference", "eager" or "liger"; `kernels.explain` tells what auto takes.

    Returns float32 for half types, else hidden's dtype. Gradients: hidden and weight. Under autocast both
    tensors may be float32, float16 or bfloat16, the products are in autocast's dtype (float32 on a CPU without instructions
    for it), and gradients come in the tensors' own dtypes.
    Raises TypeError (dtypes), ValueError (shapes, values), IndexError (a target out of range, on a CPU; on a GPU a device
    assertion, which does not wait), BackendError (a named backend that cannot run the call).
    """
    require_tensors(NAME, hidden=hidden, weight=weight, targets=targets)
    refuse_transforms(NAME, backend, hidden, weight)
    settings = _check(hidden, weight, targets, ignore_index, label_smoothing, z_loss, reduction)
    name = resolve(NAME, backend, plan(hidden, settings.compute))
    _check_range(targets, len(weight), ignore_index)
    if autocast_dtype(hidden) is None:
        return _run(name, hidden, weight, targets, settings, reduction)
    with torch.autocast(hidden.device.type, enabled=False):
        return _run(name, hidden, weight, targets, settings, reduction)


def _run(
    name: str, hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings, reduction: str
) -> Tensor:
    if name == "reference":
        losses = reference.losses(hidden, weight, targets, settings)
        if reduction == "none":
            return losses
        total = losses.sum()
    elif reduction == "none":
        return fused.rows(hidden, weight, targets, settings, name)
    else:
        total = fused.total(hidden, weight, targets, settings, name)
    if reduction == "sum":
        return total
    count = (targets != settings.ignore_index).sum()
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))


def explain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Choice:
    """`kernels.explain(linear_cross_entropy, ...)`."""
    settings = _check(hidden, weight, targets, ignore_index, label_smoothing, z_loss, reduction)
    return describe(NAME, backend, plan(hidden, settings.compute))


def plan(hidden: Tensor, compute: torch.dtype) -> Plan:
    """What auto takes for this call. The figures behind it are in kernels/README.md."""
    why = liger.refusal(hidden.device, compute)
    refusals = {} if why is None else {"liger": why}
    if hidden.device.type == "cuda" and why is None:
        reason = "one kernel for each row of logits; not measured here yet"
        return Plan("liger", reason, refusals, NAMES)
    if hidden.device.type == "cpu":
        reason = "measured faster than all logits at once on a CPU, in a fraction of the memory"
        return Plan("eager", reason, refusals, NAMES)
    return Plan("eager", "runs anywhere, in a fraction of the memory of all logits", refusals, NAMES)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    reduction: str,
) -> Settings:  # fmt: skip
    """The call's settings, or an error that says what came and what is supported."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: hidden must be [M, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{NAME}: only hidden's rows may be none, got weight {list(weight.shape)}")
    if list(targets.shape) != [len(hidden)]:
        raise ValueError(f"{NAME}: targets must be [M] = [{len(hidden)}], got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{NAME}: targets must be int64, got {targets.dtype}")
    devices = {tensor.device for tensor in (hidden, weight, targets)}
    if len(devices) > 1:
        raise ValueError(f"{NAME}: hidden, weight and targets must be on one device, got {hidden.device}, "
                         f"{weight.device} and {targets.device}")  # fmt: skip
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{NAME}: {name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}"
            )
    low = autocast_dtype(hidden)
    if hidden.dtype != weight.dtype and (low is None or torch.float64 in (hidden.dtype, weight.dtype)):
        raise TypeError(f"{NAME}: weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{NAME}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"{NAME}: z_loss must be 0 or positive, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{NAME}: unknown reduction {reduction!r}; supported: 'mean', 'sum', 'none'")
    return Settings(ignore_index, float(label_smoothing), float(z_loss), low or hidden.dtype)


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise where a target is no row of the weight: here on a CPU, on the device elsewhere, without a wait."""
    fits = ((targets >= 0) & (targets < vocabulary)) | (targets == ignore_index)
    said = f"{NAME}: targets must be from 0 to {vocabulary - 1}, or ignore_index {ignore_index}"
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        if not fits.all():
            raise IndexError(f"{said}; got {int(targets[~fits][0])}")
    elif targets.device.type != "meta":
        torch._assert_async(fits.all(), said)
