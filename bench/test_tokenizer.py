"""Captions per CPU second to ids, beside Hugging Face's tokenizers with the same model."""

from __future__ import annotations

from collections.abc import Callable

SUBJECTS = ("tokenizer",)


def bench_tokenizer(measure: Callable[[], None]) -> None:
    measure()
