"""torch.compile for peers that are meant to be compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from bench.subject import Absent

F = TypeVar("F", bound=Callable[..., object])


@cache
def compiled(function: F, device: str) -> F:
    """`function` (or a module) compiled for static shapes, once per run. Raises Absent where nothing can compile."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise Absent("torch.compile needs a C++ compiler on a CPU (Debian, Ubuntu: apt-get install g++)")
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    made: F = torch.compile(function, dynamic=False)  # type: ignore[assignment]
    return made


def compiled_for_gpu(function: F, device: str) -> F:
    """The same, where compiling is worth its time. Raises Absent on a CPU."""
    if device == "cpu":
        raise Absent("compiled for GPUs alone: on a CPU that takes longer than everything else here")
    return compiled(function, device)
