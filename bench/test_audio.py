"""Sound to 16 kHz mono: seconds of sound per CPU-second."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("audio",)


def bench_audio(measure: Callable[[], None]) -> None:
    measure()
