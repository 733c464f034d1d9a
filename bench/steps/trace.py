"""Where the time of a step goes on a GPU: kernels by torch's profiler, grouped by what they do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first whose pattern a kernel's name has. Triton's are those of kernels/.
GROUPS = (
    ("window attention", r"whole_forward|whole_backward|tiled_forward|bias_(grad|expand|sum|gather)"),
    # Both kernels of the project have tiles whose backward passes are called query_grad_kernel and key_grad_kernel.
    ("attention", r"query_grad|key_grad|latent_forward|combine_kernel|flash|fmha|sdpa|attention"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|wgmma|cublas|splitk|gemv|convolve|conv2d|implicit|dgrad|wgrad|fprop"),
    ("norms", r"layer_?norm|rms_?norm|GammaBeta|batch_?norm"),
    ("softmax", r"softmax|nll_loss|logsumexp"),
    ("copies and sets", r"^mem(cpy|set)"),
    ("elementwise", r"elementwise|vectorized|copy|fill|reduce|CatArray|index|scatter|gather|roll|distribution|sort|triton"),
)  # fmt: skip
RANGES = ("Optimizer.", "ProfilerStep", "Memory")  # marks that span kernels, and are none
TOP = 15


def group_of(name: str) -> str:
    """The group of a kernel."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """One call: seconds, the share of them in which no kernel ran, seconds by group, and the longest kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    found = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in recorded.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA and not marks(event)
    ]
    return summed(found)


def marks(event: Any) -> bool:
    """Whether this is no kernel but a named stretch of several."""
    return event.name().startswith(RANGES) or bool(getattr(event, "is_user_annotation", bool)())


def summed(events: list[tuple[str, int, int]]) -> dict[str, Any]:
    """The same of (name, start, duration) in nanoseconds."""
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    busy, end = 0, 0
    for name, start, duration in sorted(events, key=lambda event: event[1]):
        groups[group_of(name)] += duration / 1e9
        names[name][0] += duration / 1e9
        names[name][1] += 1
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    span = end - min((start for _, start, _ in events), default=0)
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "seconds": span / 1e9, "idle share": 1 - busy / span if span else 0.0, "kernels": len(events),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "longest": [{"name": n[:110], "group": group_of(n), "seconds": s, "calls": c} for n, (s, c) in longest],
    }  # fmt: skip
