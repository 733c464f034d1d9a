"""What `kernels.accelerate` makes of timm's attention layers, and of a training step of a whole model."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = (
    "accelerated_attention",
    "accelerated_step",
)


def bench_accelerated(measure: Callable[[], None]) -> None:
    measure()
