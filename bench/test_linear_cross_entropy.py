"""Linear cross-entropy, against all logits at once and Liger-Kernel."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("linear_cross_entropy",)


def bench_linear_cross_entropy(measure: Callable[[], None]) -> None:
    measure()
