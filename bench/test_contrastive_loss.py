"""The contrastive losses of image-text pairs."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("contrastive_loss",)


def bench_contrastive_loss(measure: Callable[[], None]) -> None:
    measure()
