"""Window attention: qkv in, map out; and a whole SwinV2 block around it."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = (
    "window_attention",
    "swin_block",
)


def bench_window_attention(measure: Callable[[], None]) -> None:
    measure()
