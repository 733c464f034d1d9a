"""Names of the backends, and how one is chosen.

    reference   the definition, written to be read: explicit indices, explicit masks
    eager       plain torch operations, written to be fast
    sdpa        torch.nn.functional.scaled_dot_product_attention does the attention
    triton      this project's kernels; on CUDA devices, for the functions that have them
    flash_attn  FlashAttention, where it is installed; latent_attention alone
    liger       Liger-Kernel's kernels; on CUDA devices, for linear_cross_entropy

`auto` (the default) takes what measured fastest for the call's device, dtype and shape: the rule and the
figures stand in each function's op.py. A backend that is named runs, or raises BackendError; it is never
silently replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch

import kernels
from kernels.clash import check_marker

check_marker(kernels)

BACKENDS = ("reference", "eager", "sdpa", "triton", "flash_attn")
HAS_TRITON = (
    find_spec("triton") is not None
)  # asked once: torch 2.11's compiler cannot look into the question


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run this call."""


class Plan(NamedTuple):
    """What a function knows about one call before it runs."""

    preferred: str  # what `auto` takes
    reason: str  # why
    refusals: Mapping[str, str]  # backend -> why it cannot run this call; backends that can are absent
    names: tuple[str, ...] = BACKENDS  # the function's backends, where they are not those of attention


@dataclass(frozen=True)
class Choice:
    """What `kernels.explain` returns; printed, it is one readable line."""

    function: str
    backend: str | None  # what would run; None where the backend that was named cannot
    reason: str
    others: Mapping[str, str]  # every other backend -> why it would not run

    def __str__(self) -> str:
        runs = f"{self.backend} runs" if self.backend else "nothing runs"
        others = "; ".join(f"{name}: {why}" for name, why in self.others.items())
        return f"{self.function}: {runs} ({self.reason}). Others: {others}"


def resolve(function: str, requested: str, plan: Plan) -> str:
    """The backend that runs: `requested` is "auto" or a name.

    Raises ValueError for a name that does not exist and BackendError for one that cannot run this call.
    """
    if requested == "auto":
        return plan.preferred
    why = _refusal(function, requested, plan)
    if why is not None:
        able = ", ".join(name for name in plan.names if name not in plan.refusals)
        raise BackendError(
            f"{function}: backend {requested!r} cannot run this call: {why}. These can: {able}"
        )
    return requested


def describe(function: str, requested: str, plan: Plan) -> Choice:
    """The same decision in words, without raising for a named backend that cannot run the call."""
    if requested == "auto":
        backend, reason, passed = plan.preferred, plan.reason, f"able, but auto prefers {plan.preferred}"
    elif (why := _refusal(function, requested, plan)) is None:
        backend, reason, passed = requested, "asked for by name", "able, but not asked for"
    else:
        backend, reason, passed = None, f"{requested} was asked for: {why}", "able, but not asked for"
    others = {name: plan.refusals.get(name, passed) for name in plan.names if name != backend}
    return Choice(function, backend, reason, others)


def _refusal(function: str, requested: str, plan: Plan) -> str | None:
    if requested in plan.names:
        return plan.refusals.get(requested)
    names = ", ".join(map(repr, ("auto", *plan.names)))
    raise ValueError(f"{function}: unknown backend {requested!r}; supported: {names}")


def is_hopper(device: torch.device) -> bool:
    """Whether what was measured on an H200 counts for this device: it has Hopper multiprocessors (compute capability 9.0)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_properties(device).major == 9


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can. Triton is not imported by a mere question."""
    if not HAS_TRITON:
        return "it needs Triton, which is for Linux: pip install 'triton>=3.6'"
    if device.type == "cuda":
        return capability_refusal(device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on CUDA devices, got {device} (TRITON_INTERPRET=1, set before Triton is imported, interprets it)"


def capability_refusal(device: torch.device) -> str | None:
    """Why `device` is not a GPU that kernels for NVIDIA's Ampere and newer run on; None where it is."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, got {device}"
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and found.major >= 8:
        return None
    have = f"{found.name} ({found.major}.{found.minor})"
    return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, got {have}"
