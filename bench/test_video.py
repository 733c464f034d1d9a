"""Clips of videos per CPU-second."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("video",)


def bench_video(measure: Callable[[], None]) -> None:
    measure()
