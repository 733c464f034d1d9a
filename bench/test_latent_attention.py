"""Few queries over many keys; and Perceiver's cross-attention layer around it."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = (
    "latent_attention",
    "perceiver_cross_attention",
)


def bench_latent_attention(measure: Callable[[], None]) -> None:
    measure()
