"""A training step of a Perceiver against transformers', and the cost of the read from 1,000 to 1,000,000 inputs."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("perceiver_step", "latent_read")


def bench_perceiver(measure: Callable[[], None]) -> None:
    measure()
