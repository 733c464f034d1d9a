"""A clipped optimizer step, against clip_grad_norm_ and torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("optimizer_step",)


def bench_optimizer_step(measure: Callable[[], None]) -> None:
    measure()
