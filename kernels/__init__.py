"""AuroraIO's kernels: attention and loss functions, useful alone. README.md has what they mean and how to add to
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__auroraio__ = True  # tells this package from another of the same name; see clash.py

from kernels import clash
from kernels.contrastive_loss.op import contrastive_loss
from kernels.explain import available_backends, explain
from kernels.latent_attention.merge import merge_attention
from kernels.latent_attention.op import latent_attention
from kernels.latent_module import LatentAttention
from kernels.linear_cross_entropy.op import linear_cross_entropy
from kernels.modules import WindowAttention
from kernels.patch import accelerate, restore
from kernels.window_attention.op import window_attention

__all__ = [
    "LatentAttention",
    "WindowAttention",
    "accelerate",
    "available_backends",
    "contrastive_loss",
    "explain",
    "latent_attention",
    "linear_cross_entropy",
    "merge_attention",
    "restore",
    "window_attention",
]

_HERE = Path(__file__).resolve().parent
clash.warn_if_installed(_HERE)


def __getattr__(name: str) -> Any:
    clash.refuse(name, _HERE)
