"""How a call to the Triton kernels of the contrastive loss is cut into programs. No Triton is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kernels.launch import Config, forced, power_of_two, processor

Kernel = Literal["sums", "grads"]


@dataclass(frozen=True)
class Form:
    """What the choice of a configuration depends on."""

    width: int  # D
    half: bool  # float16 or bfloat16
    arch: int  # 80 or 90

    @classmethod
    def of(cls, rows: Tensor) -> Form:
        """Of rows [N, D]."""
        return cls(rows.shape[1], rows.dtype.itemsize == 2, processor(rows.device)[0])

    @property
    def block_d(self) -> int:
        """Numbers of a row that are multiplied at a time."""
        return min(64 if self.half else 32, power_of_two(self.width))


def configure(kernel: Kernel, form: Form) -> Config:
    """Tiles that compile without spilling registers; none was timed."""
    if (config := forced.get(f"contrastive {kernel}")) is not None:
        return config
    if not form.half:  # no tensor cores: products are unrolled, so the tiles are small
        return Config(32, 32, 4, 1)
    return Config(128, 128 if kernel == "sums" else 64, 8, 3)
