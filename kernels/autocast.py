"""Autocast, handled once at the entrance of each public function."""

from __future__ import annotations

import torch
from torch import Tensor

# Asked once: torch 2.11's compiler cannot look into the question.
KNOWN = (
    "cpu",
    "cuda",
    "xpu",
    "mps",
    "hpu",
    "mtia",
    "xla",
    "ipu",
    "maia",
    torch._C._get_privateuse1_backend_name(),
)
DEVICES = {name for name in KNOWN if torch.amp.is_autocast_available(name)}


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts to on this tensor's device, or None where it is off (float64 is left alone)."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or device not in DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
