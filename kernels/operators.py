"""Operators that torch.compile does not look into, with little time spent on the way to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("CPU", "CUDA")


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function of tensors the operator `auroraio::name`, whose results' shapes `fake` gives.

    torch.library.custom_op does the same and more: it looks at every call for results that share memory with arguments,
    and that takes longer than the launch of a kernel. What is decorated here must not return an argument, a view of one, or
    one tensor twice.
    """

    def make(function: Callable[..., Any]) -> Any:
        full = f"auroraio::{name}"
        torch.library.define(full, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(full, DEVICES)(function)
        torch.library.register_fake(full)(fake)
        return getattr(torch.ops.auroraio, name).default

    return make
