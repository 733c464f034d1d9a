"""Which AdamW a run gets, and how a step of it is clipped.

    torch        torch's fused AdamW; clipping happens inside its step
    apex         NVIDIA apex's FusedAdam (CUDA)
    torch-8bit   torchao's AdamW8bit: both moments in 8 bits, in blocks of 256 (arXiv:2110.02861)

"auto" is apex where NVIDIA's is really there and the model is on a GPU, else torch. One that is named is that one, or an
OptimizerError says why not.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from train.config import ConfigError, OptimConfig

APEX_INSTALL = (
    "NVIDIA's is built from its repository, github.com/NVIDIA/apex: "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ./apex"
)
EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


class OptimizerError(ConfigError):
    """An optimizer that was asked for by name cannot run here; the message says why, and what can."""


@dataclass(frozen=True)
class Built:
    """An optimizer, and which one it is."""

    optimizer: torch.optim.Optimizer
    kind: str
    """"torch", "apex" or "torch-8bit"."""
    why: str


NAMES = {
    "torch": "torch's fused AdamW, clipping inside its step",
    "apex": "NVIDIA apex's FusedAdam",
    "torch-8bit": "torchao's AdamW8bit",
}


def build_optimizer(
    model: nn.Module, config: OptimConfig, device: torch.device, groups: list[dict[str, Any]] | None = None
) -> Built:
    """AdamW over the model's parameter groups (models.parameter_groups, or `groups` instead); the rate is set at every step.

    Raises OptimizerError where config.kind names one that cannot run.
    """
    kind, why = choose(config.kind, device)
    groups = groups or models.parameter_groups(model, config.weight_decay)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    match kind:
        case "apex":
            from apex.optimizers import FusedAdam

            return Built(FusedAdam(groups, adam_w_mode=True, **settings), kind, why)
        case "torch-8bit":
            from torchao.optim import AdamW8bit

            return Built(AdamW8bit(groups, **settings), kind, why)
    return Built(torch.optim.AdamW(groups, fused=True, **settings), "torch", why)


def choose(asked: str, device: torch.device) -> tuple[str, str]:
    """(kind, why) of the optimizer for what the configuration asks. Raises OptimizerError."""
    refusals = {"torch": None, "apex": apex_refusal(device), "torch-8bit": eight_bit_refusal()}
    if asked == "auto":
        missing = refusals["apex"]
        return (
            ("apex", "NVIDIA's apex is installed") if missing is None else ("torch", f"not apex: {missing}")
        )
    if asked not in refusals:
        raise OptimizerError(f"optim.kind is {asked!r}; supported: 'auto', {', '.join(map(repr, refusals))}")
    if (why := refusals[asked]) is not None:
        able = ", ".join(name for name, reason in refusals.items() if reason is None)
        raise OptimizerError(f"optim.kind {asked!r} cannot run here: {why}. These can: {able}")
    return asked, "asked for by name"


def in_words(config: OptimConfig, device: torch.device) -> str:
    """What `build_optimizer` gives, for the lines that a run begins with. Raises OptimizerError as it does."""
    kind, why = choose(config.kind, device)
    return f"{NAMES[kind]} ({why})"


def apex_refusal(device: torch.device) -> str | None:
    """Why apex's FusedAdam cannot run on `device`; None where it can. Looks at files, imports nothing: the package that
    the index calls apex is another project, and to import that can fail in any way."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, got {device}"
    found = find_spec("apex")
    if found is None:
        return "it is not installed. " + APEX_INSTALL
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return f"the apex that is installed{_distribution('apex')} is another project. " + APEX_INSTALL
    if find_spec("amp_C") is None:
        return "it was built without its CUDA extensions (there is no amp_C). " + APEX_INSTALL
    return None


def eight_bit_refusal() -> str | None:
    """Why torchao's AdamW8bit cannot run; None where it can."""
    return None if find_spec("torchao") else "it needs torchao: pip install 'auroraio[torchao]'"


def _distribution(name: str) -> str:
    try:
        return f" ({name} {version(name)})"
    except PackageNotFoundError:
        return ""


def clip_and_step(
    optimizer: torch.optim.Optimizer, lr: float, clip: float, healthy: Tensor, norm: Tensor | None = None
) -> Tensor:
    """One update at rate `lr` with gradients scaled down to the global norm `clip` (0: as they are), or none at all where
    `healthy` (bool, []) is False or that norm is not finite. Returns the norm before clipping, fp32 [].

    As torch.nn.utils.clip_grad_norm_ and the optimizer's step, to rounding. torch's fused AdamW divides by the clipping
    factor and skips on the device, inside its own pass over the gradients: one pass to clip is saved, and nothing waits.
    The others clip first and look at the norm on the host. Gradients are undefined afterwards.

    norm: the global norm, where these gradients are only this rank's shards.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if norm is None:
        norm = global_norm(gradients)
    if optimizer.defaults.get("fused"):
        good = torch.isfinite(norm) & healthy.to(norm.device)
        optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        # None rather than 1 where nothing is clipped: then gradients are not written again.
        optimizer.grad_scale = ((norm + EPS) / clip).clamp(min=1.0) if clip else None  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        return norm
    if bool(torch.isfinite(norm) & healthy.to(norm.device)):
        if clip:
            torch._foreach_mul_(gradients, (clip / (norm + EPS)).clamp(max=1.0))
        with _interpreted(norm.device):
            optimizer.step()
    return norm


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Drops them. `zero_grad` has arguments of its own in every optimizer: apex's takes none."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all numbers of all gradients, fp32 []; 0 of none."""
    if not gradients:
        return torch.zeros(())
    half = any(g.dtype in (torch.float16, torch.bfloat16) for g in gradients)
    parts = torch._foreach_norm(gradients, 2, torch.float32 if half else None)
    return torch.linalg.vector_norm(torch.stack(parts)).float()


def _interpreted(device: torch.device) -> Any:
    """torchao compiles its step for each shape, which on a CPU takes minutes; there it runs as it is written."""
    return torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()
