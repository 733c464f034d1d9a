"""A training step of an encoder, against timm's SwinV2."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("training_step",)


def bench_training_step(measure: Callable[[], None]) -> None:
    measure()
