"""Seconds until a loader of ten million samples has opened its shards, and has resumed in the middle of them."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("open_shards",)


def bench_opening(measure: Callable[[], None]) -> None:
    measure()
