"""torch.compile for peers that are meant to be compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from bench.subject import Absent


@cache
def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` compiled for static shapes, once per run. Raises Absent where nothing can compile."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise Absent("torch.compile needs a C++ compiler on a CPU (Debian, Ubuntu: apt-get install g++)")
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    return torch.compile(function, dynamic=False)
