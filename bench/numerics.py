"""The rule that comes before any time: how far a result may be from the exact one.

Exact is the same function in fp64. Against it, plain PyTorch in the same dtype makes some error; an output may make
twice that, a gradient three times, plus what rounding to the dtype alone does:
atol = 2 max|(exact + 0.3 - 0.3) - exact|. Beside the largest error the relative one is bounded, RMSE / RMS(exact),
so that an error of 1% everywhere cannot hide below one bad element. See CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.record import Accuracy

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}
OUTPUT, GRADIENT = 2.0, 3.0
# A gradient of a few numbers is a few long sums, whose terms may cancel: its relative error may also be what is allowed
# against plain PyTorch's.
FEW = 64


def judge(
    results: Mapping[str, Tensor],
    plain: Sequence[Mapping[str, Tensor]],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    slack: float = 1.0,
    depth: float = 1.0,
) -> tuple[Accuracy, ...]:
    """One verdict for "out" and for each gradient. `plain` are results of plain PyTorch, written in one way or more:
    the largest error among them counts, or a gradient of a single number would be judged by luck. `exact` are those
    in fp64; `dtype` is the one of the call; `slack` multiplies every bound, `depth` that on the relative error.

    Raises ValueError where results are missing, or of another shape or dtype than plain PyTorch's: that is no
    matter of accuracy.
    """
    verdicts = []
    for name, true in exact.items():
        if name not in results:
            raise ValueError(f"{name} is missing; there are {', '.join(results) or 'none'}")
        mine, kind = results[name], plain[0][name].dtype
        if mine.shape != true.shape or mine.dtype != kind:
            raise ValueError(f"{name} is {mine.dtype} {list(mine.shape)}, expected {kind} {list(true.shape)}")
        factor = OUTPUT if name == "out" else GRADIENT
        errors = [other[name].double() - true for other in plain]
        allowed = slack * (factor * max(map(largest, errors)) + rounding(true, kind))
        relative = slack * depth * RELATIVE[dtype] * factor / OUTPUT
        if true.numel() < FEW:
            relative = max(relative, slack * factor * max(map(rms, errors)) / max(rms(true), 1e-300))
        error = mine.double() - true
        verdicts.append(
            Accuracy(name, largest(error), allowed, rms(error) / max(rms(true), 1e-300), relative)
        )
    return tuple(verdicts)


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """2 max|(x + 0.3 - 0.3) - x| with x = exact in the dtype: what two roundings near x cost."""
    x = exact.to(dtype)
    return 2 * largest((x + 0.3 - 0.3).double() - x.double())


def largest(x: Tensor) -> float:
    """max|x|, 0 for nothing; not-a-number wherever there is one (so that it fails every bound)."""
    return float(x.abs().max()) if x.numel() else 0.0


def rms(x: Tensor) -> float:
    """Root of the mean square, 0 for nothing."""
    return math.sqrt(float(x.double().square().mean())) if x.numel() else 0.0
