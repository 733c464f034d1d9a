"""Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989) under our own autograd.

Liger's own function multiplies the gradients that it keeps in place when the backward pass comes, so a second backward
pass is wrong, and it looks at that factor on the host. Here only its forward is used, which makes losses and gradients.
It counts the tokens with a target on the host, once per call.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from kernels.linear_cross_entropy import eager
from kernels.linear_cross_entropy.eager import Result
from kernels.linear_cross_entropy.reference import Settings

HAS_LIGER = find_spec("liger_kernel") is not None  # asked once, as for Triton
INSTALL = "it needs Liger-Kernel: pip install 'auroraio[liger]'"


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Liger cannot run in `dtype` on `device`; None where it can. Nothing is imported."""
    if not HAS_LIGER:
        return INSTALL
    if dtype == torch.float64:
        return "it computes in float32, got float64"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it runs on CUDA devices, got {device}"
    return None


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
    """As eager.sweep. The weight's gradient is added up in float32."""
    if not len(hidden):  # Triton launches no empty grid
        return eager.sweep(
            hidden, weight, targets, settings, scale=scale, want_hidden=want_hidden, want_weight=want_weight
        )
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    wanted = want_hidden or want_weight
    rows = scale is not None or not wanted
    found = fused_linear_cross_entropy_forward(
        hidden.to(settings.compute).contiguous(), weight.to(settings.compute).contiguous(), targets.contiguous(),
        ignore_index=settings.ignore_index, lse_square_scale=settings.z_loss, label_smoothing=settings.label_smoothing,
        reduction="none" if rows else "sum", accum_dtype=torch.float32, token_grad_output=scale,
        compute_gradients=wanted, weight_requires_grad=want_weight,
    )  # fmt: skip
    losses, d_hidden, d_weight = found[0], found[4], found[5]
    return (
        losses.reshape(-1),  # of a sum: one number, which is what summing it gives
        d_hidden.to(hidden.dtype) if want_hidden else None,
        d_weight if want_weight else None,
    )
