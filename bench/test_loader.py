"""Pairs per second and core from JPEGs in tar shards."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("loader",)


def bench_loader(measure: Callable[[], None]) -> None:
    measure()
