"""Layers as they are trained: fp32 weights, and a half type by autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and inputs for a call in `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Autocast(nn.Module):
    """A module with weights in `wide(dtype)`, run under autocast where `dtype` is a half type; its result is in
    `wide(dtype)`."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(device, wide(dtype))
        self.device, self.dtype = device, dtype

    def forward(self, *inputs: Any) -> Tensor:
        low = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(self.device, self.dtype if low else torch.bfloat16, enabled=low):
            out = self.module(*inputs)
        return out.to(wide(self.dtype))
