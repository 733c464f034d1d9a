"""Pairs per second and core, and pictures per CPU-second of whole pipelines, from JPEGs in tar shards."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("loader", "image_pipeline")


def bench_loader(measure: Callable[[], None]) -> None:
    measure()
