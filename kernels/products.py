"""What the operands of matrix products are in: their own dtype where the device multiplies it by instructions."""

from __future__ import annotations

import torch

# Asked once: the compiler cannot look into the question.
CPU_HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
"""Whether this CPU multiplies bfloat16 by instructions of its own: 2 to 4 times as fast as float32 there, 5 times as
slow elsewhere."""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a product's operands where the caller's are of `dtype`; sums are float32 at least in any case."""
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return dtype
    return dtype if dtype == torch.bfloat16 and CPU_HAS_BFLOAT16 else torch.float32
